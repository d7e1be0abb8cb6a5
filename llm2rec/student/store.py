"""Finished students on disk: ``student/config.json`` and ``student/model.safetensors`` in the run folder."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llm2rec.core.checkpoint import save_tensors
from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import read_json, replaced_folder, write_json
from llm2rec.student.models import SequentialRecommender, build_model

__all__ = ["load_student", "save_student"]


def save_student(folder: Path, model: SequentialRecommender, name: str, arguments: dict[str, Any]) -> None:
    """Write a student so that `load_student` needs nothing else.

    Args:
        folder: Usually ``<run>/student``.
        model: The trained model; fused item tables are computed out.
        name: Its name in `MODELS`.
        arguments: What it was built with, plain values.
    """
    with replaced_folder(folder) as aside:
        save_tensors(model.weights_to_serve(), aside / "model.safetensors")
        write_json(aside / "config.json", {"model": name, "arguments": arguments})


def load_student(folder: Path) -> SequentialRecommender:
    """Load a student, in evaluation mode.

    Raises:
        CheckpointError: If the folder holds no student, or its weights are not those of the model it names.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no student (no config.json); name the folder of a finished student run.")
    config = read_json(folder / "config.json")
    model = build_model(config["model"], **config["arguments"])
    try:
        model.load_served(load_file(folder / "model.safetensors"))
    except (KeyError, RuntimeError) as error:  # torch lists all missing and unknown names, over many lines
        raise CheckpointError(
            f"{folder / 'model.safetensors'} holds other weights than a {config['model']} of this version; train it "
            f"again, or load it with the version that wrote it ({str(error).splitlines()[0]})."
        ) from error
    return model.eval()
