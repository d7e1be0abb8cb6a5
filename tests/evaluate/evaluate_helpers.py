"""Run folders as the student's stage leaves them, with random weights."""

import torch

from llm2rec.core.files import write_json
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model
from llm2rec.student.store import save_student
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import AdapterSettings, PromptSettings, TeacherSettings, TinyRandomSettings, TitleSettings
from llm2rec.teacher.store import save_teacher


def student_run(results, data, name, *, label="sasrec", seed=1, max_length=None, **changes):
    """A run folder as the student's stage leaves it, with random weights."""
    folder = results / name
    arguments = {"n_items": data.n_items, "width": 16, "max_length": max_length or data.history_length}
    torch.manual_seed(seed)
    model = build_model("sasrec", **arguments)
    save_student(folder / "student", model, "sasrec", arguments)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    record = {"stage": "student", "status": "finished", "seed": seed, "label": label, "parameters": 5}
    write_json(folder / "run.json", {**record, "dataset": dataset, **changes})
    return folder, model.eval()


def title_run(results, data, name, *, n_candidates=6, max_tokens=400, **settings):
    """The run folder of a title teacher as its stage leaves it, with a random adapter, and the teacher."""
    title = TitleSettings(n_candidates=n_candidates, **settings.pop("title", {}))
    llm = TinyRandomSettings(
        name="tiny", pooling="mean", prompt=PromptSettings(max_tokens=max_tokens), width=32, n_heads=2
    )
    source = str(make_tiny_random(llm, data.folder.parent / "llm", data.titles))
    targets = Rows.of(data, "train").targets.numpy()
    chosen = TeacherSettings(objective="title", title=title, adapter=AdapterSettings(r=8), **settings)
    torch.manual_seed(4)
    model, recipe = build_teacher(llm, source, chosen, data, targets, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = results / name
    save_teacher(folder / "teacher", model.eval(), recipe)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    record = {"stage": "teacher", "status": "finished", "seed": 1, "label": "titles", "parameters": 5}
    write_json(folder / "run.json", {**record, "dataset": dataset})
    return folder, model
