"""Save an ensemble, and load a finished one."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import read_object, replaced_folder, write_json
from llm2rec.core.train.checkpoint import read_tensors, save_tensors
from llm2rec.data import RecData
from llm2rec.ensemble.llm_teacher import LLMTeacherMember, lazily_loaded
from llm2rec.ensemble.members import ItemNeighbours, Member, Student, TitleNeighbours
from llm2rec.ensemble.model import Ensemble, GroupWeights
from llm2rec.ensemble.neighbours import Neighbours, training_sequences
from llm2rec.student.models import load_student

__all__ = ["counted", "load_ensemble", "save_ensemble"]


def counted(data: RecData, max_length: int | None = None) -> ItemNeighbours:
    """Neighbours of the training split; ``max_length`` defaults to the dataset's."""
    return ItemNeighbours(Neighbours(training_sequences(data), data.n_items), max_length or data.history_length)


def save_ensemble(
    folder: Path, members: Sequence[Member], weights: Mapping[str, GroupWeights], places: Mapping[str, Path]
) -> None:
    """Save an ensemble; `load_ensemble` needs it, the dataset, and the language model of a teacher.

    Students and teachers are copied, so that an ensemble does not depend on other runs: a teacher is saved without its
    frozen language model, a few megabytes.

    Args:
        folder: Usually ``<run>/ensemble``.
        members: The members.
        weights: Weights of their groups.
        places: Folders of students and teachers, ``<run>/student`` and ``<run>/teacher``, by run.
    """
    with replaced_folder(folder) as aside:
        saved = []
        for number, member in enumerate(members):
            entry = {"kind": member.kind, "group": member.group, "max_length": member.max_length, "about": member.about}
            if member.kind in ("student", "teacher"):
                entry |= {"folder": f"member_{number}", "parameters": member.n_parameters}
                shutil.copytree(places[str(member.about["run"])], aside / f"member_{number}")
            elif member.kind == "titles":
                assert member.item_vectors is not None, "title neighbours have vectors"
                save_tensors({"vectors": member.item_vectors}, aside / "titles.safetensors")
            saved.append(entry)
        groups = {
            name: {"share": each.share, "temperature": each.temperature, "options": dict(each.options)}
            for name, each in weights.items()
        }
        write_json(aside / "config.json", {"format": 2, "members": saved, "weights": groups})


def load_ensemble(folder: Path, data: RecData, device: torch.device | str = "cpu") -> Ensemble:
    """Load an ensemble; neighbours are counted again, and a teacher is loaded when it first scores a row.

    Args:
        folder: Usually ``<run>/ensemble``.
        data: Its dataset.
        device: Device of the members.

    Raises:
        CheckpointError: If the folder holds no ensemble, or a member cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no ensemble (no config.json); give a finished run of llm2rec.ensemble.")
    try:
        config = read_object(folder / "config.json", "members")
        if "format" not in config:
            return _of_first_format(folder, config, data, device)
        weights = {name: GroupWeights(**each) for name, each in config["weights"].items()}
        members = [_member(folder, entry, data, device) for entry in config["members"]]
        return Ensemble(members, weights)
    except (DataError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} holds a damaged ensemble: {error}") from error


def _member(folder: Path, entry: Mapping[str, Any], data: RecData, device: torch.device | str) -> Member:
    kind, about, length = entry["kind"], entry["about"], int(entry["max_length"])
    if kind == "student":
        return Student(load_student(folder / entry["folder"]), about, device)
    if kind == "neighbours":
        return counted(data, length)
    if kind == "titles":
        vectors = read_tensors(folder / "titles.safetensors")["vectors"]
        return TitleNeighbours(vectors, about, history=length, device=device)
    if kind == "teacher":
        load = lazily_loaded(folder / entry["folder"], data, torch.device(device))
        return LLMTeacherMember(load, about, int(entry["parameters"]), length)
    raise ValueError(f"a member is of unknown kind {kind!r}")


def _of_first_format(folder: Path, config: Mapping[str, Any], data: RecData, device: torch.device | str) -> Ensemble:
    """An ensemble of students with equal weights and neighbours, as earlier versions saved it."""
    share, names = float(config["neighbours"]), [str(name) for name in config["members"]]
    students = [Student(load_student(folder / name), {"run": name}, device) for name in names]
    neighbours = [counted(data, max(each.max_length for each in students))] if share > 0 else []
    weights = {"students": GroupWeights(1 - share, 1.0), "neighbours": GroupWeights(share, 2 / 3)}
    return Ensemble([*students, *neighbours], weights)
