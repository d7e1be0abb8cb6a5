"""LLM recommendation, distilled: an iLoRA teacher, DLLM2Rec distillation, and a small student to serve.

The public names, each imported on first use:

    run                 run a stage: data, student, teacher, ensemble, distill, evaluate
    load_data           open a prepared dataset; `prepare` makes one of `CsvTables`, `MovieLens100K` or `Toy`
    Recommender         recommendations of a finished student, distilled or not
    TeacherRecommender  recommendations of a finished teacher
    load_student        the student as a torch module; also `SequentialRecommender.from_pretrained`
    push                upload a finished student or teacher to the Hugging Face Hub; all of the above load it by its id
    ILoraConfig         instance-wise LoRA for any language model of PEFT

`examples/notebook.py` runs the whole chain.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2rec.data import CsvTables, MovieLens100K, Toy, prepare
    from llm2rec.data import load as load_data
    from llm2rec.ilora import ILoraConfig
    from llm2rec.launch import run
    from llm2rec.recommend import Recommendation, Recommender
    from llm2rec.recommend.teacher import TeacherRecommender
    from llm2rec.share.pushing import push
    from llm2rec.student.models import SequentialRecommender, load_student

# Idle OpenMP threads sleep instead of spinning, which on a busy machine makes steps 5 to 30 times slower. Set here
# because OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = [
    "CsvTables",
    "ILoraConfig",
    "MovieLens100K",
    "Recommendation",
    "Recommender",
    "SequentialRecommender",
    "TeacherRecommender",
    "Toy",
    "load_data",
    "load_student",
    "prepare",
    "push",
    "run",
]

_FROM = {
    "CsvTables": "data.CsvTables",
    "ILoraConfig": "ilora.ILoraConfig",
    "MovieLens100K": "data.MovieLens100K",
    "Recommendation": "recommend.Recommendation",
    "Recommender": "recommend.Recommender",
    "SequentialRecommender": "student.models.SequentialRecommender",
    "TeacherRecommender": "recommend.teacher.TeacherRecommender",
    "Toy": "data.Toy",
    "load_data": "data.load",
    "load_student": "student.models.load_student",
    "prepare": "data.prepare",
    "push": "share.pushing.push",
    "run": "launch.run",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _FROM[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
