"""Open the members of an ensemble: students, item neighbours, title neighbours and LLM teachers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.files import read_object
from llm2rec.core.logging import quiet_libraries
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.sharding import full_numel
from llm2rec.data import RecData, title_agreement
from llm2rec.ensemble.llm_teacher import (
    LLMTeacherMember,
    exported_ranking,
    lazily_loaded,
    rank_rows_of,
    ranked_training_rows,
)
from llm2rec.ensemble.members import Member, Student, TitleNeighbours
from llm2rec.ensemble.runs import FinishedRun
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.ensemble.store import counted
from llm2rec.student.models import load_student
from llm2rec.teacher.settings import LLMSettings

__all__ = [
    "Folders",
    "Vectors",
    "exported_vectors",
    "open_members",
    "open_teachers",
    "rank_training_rows",
    "read_titles",
    "vectors_to_export",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folders:
    """Folders that members read and write.

    Attributes:
        root: Base folder of relative paths.
        llm: Language models made here, and cached vectors.
        outputs: Teacher outputs of the dataset.
        blocks: Finished blocks of rankings, kept until the stage is done.
    """

    root: Path
    llm: Path
    outputs: Path
    blocks: Path


@dataclass(frozen=True)
class Vectors:
    """Raw title vectors of a language model.

    Attributes:
        vectors: Shape ``(N, d)``, float32.
        about: ``llm`` (its name) and ``text`` (`TextEncoder.about`).
    """

    vectors: Tensor
    about: dict[str, Any]


def read_titles(llm: LLMSettings, data: RecData, engine: Engine, folders: Folders) -> Vectors:
    """Encode the titles of a dataset, with its further texts if it has any, or read them from disk; a collective.

    Raises:
        ConfigError: If the language model cannot be loaded or cannot read texts.
    """
    from llm2rec.teacher.llm import locate  # transformers takes seconds to import
    from llm2rec.teacher.text_encoder import cached_vectors

    quiet_libraries()  # transformers was not there before
    if engine.is_main and (doubt := title_agreement(data).doubt()):
        logger.warning("%s", doubt)
    with engine.first_process_first():
        source = locate(llm, folders.root, folders.llm, data.titles)
    vectors, about = cached_vectors(data.texts, llm, source, folders.llm / "text_vectors", engine)
    return Vectors(vectors, {"llm": llm.name, "text": about})


def open_members(
    runs: Sequence[FinishedRun],
    titles: Vectors | None,
    settings: EnsembleSettings,
    data: RecData,
    device: torch.device | str = "cpu",
) -> list[Member]:
    """Open all members but teachers.

    Args:
        runs: Finished runs; teachers among them are skipped.
        titles: Title vectors; None if they are not needed.
        settings: Which members there are.
        data: The dataset.
        device: Device of the members.
    """
    members: list[Member] = [
        Student(load_student(each.model), each.about, device) for each in runs if not each.is_teacher
    ]
    if settings.neighbours.share != 0:
        members.append(counted(data))
    if settings.titles.share != 0:
        assert titles is not None, "title neighbours have vectors"
        members.append(TitleNeighbours(titles.vectors, titles.about, history=settings.titles.history, device=device))
    return members


def open_teachers(
    runs: Sequence[FinishedRun], settings: EnsembleSettings, data: RecData, engine: Engine, folders: Folders
) -> list[LLMTeacherMember]:
    """Open the LLM teachers among finished runs, and rank all validation rows with them; a collective.

    Raises:
        CheckpointError: If a teacher cannot be loaded.
        TeacherOutputsError: If its exported outputs are damaged.
    """
    if settings.teachers.share == 0:
        return []
    members = []
    for each in (run for run in runs if run.is_teacher):
        # A teacher leaves out the items of a history.
        k = min(settings.teachers.top_k, max(1, data.n_items - data.history_length))
        outputs = exported_ranking(folders.outputs / _outputs_name(each.folder), each.folder.name, data)
        if outputs is not None and (width := outputs.ranking.shape[1]) < k:
            if engine.is_main:
                message = "%s exported %d items per training row, and ensemble.teachers.top_k is %d: using %d"
                logger.warning(message, each.run, width, k, width)
            k = width
        load = lazily_loaded(each.model, data, engine.device)
        n_parameters = sum(full_numel(parameter) for parameter in load()[0].parameters())
        member = LLMTeacherMember(load, each.about | {"top_k": k}, n_parameters, data.history_length)
        numbers = np.arange(len(data.splits["validation"]))
        blocks = folders.blocks / each.run / "validation"
        member.add(
            "validation",
            rank_rows_of(load, data, "validation", numbers, k, engine, blocks, folders.llm / "gate_inputs"),
        )
        if outputs is not None:
            member.add("train", ranked_training_rows(outputs, k))
        members.append(member)
    return members


def rank_training_rows(
    members: Sequence[LLMTeacherMember], rows: NDArray[np.int64], data: RecData, engine: Engine, folders: Folders
) -> None:
    """Rank training rows with the teachers that have not exported them; a collective."""
    for member in members:
        if not member.has("train"):
            blocks = folders.blocks / str(member.about["run"]) / "train"
            k, gates = int(member.about["top_k"]), folders.llm / "gate_inputs"
            member.add("train", rank_rows_of(member.load, data, "train", rows, k, engine, blocks, gates))


def _outputs_name(folder: Path) -> str:
    """Name of the outputs that a teacher's run exported."""
    config = read_object(folder / "config.json", "teacher", "llm")
    return f"{config['teacher']['name']}-{config['llm']['name']}"


def vectors_to_export(settings: EnsembleSettings, runs: Sequence[FinishedRun]) -> list[str]:
    """Names of the members whose item vectors are exported: ``titles``, or names of runs; before anything is loaded.

    Raises:
        ConfigError: If a given name is unknown, or no member has vectors.
    """
    students = [each.run for each in runs if not each.is_teacher]
    teachers = [each.run for each in runs if each.is_teacher and settings.teachers.share != 0]
    if settings.vectors is None:
        usual = ["titles"] if settings.titles.share != 0 else students or teachers
        if not usual:
            raise ConfigError("item neighbours alone have no item vectors; leave titles on, or give `runs=[...]`.")
        return usual
    known = ["titles", *(["students"] if students else []), *students, *teachers]
    if unknown := [name for name in settings.vectors if name not in known]:
        raise ConfigError(f"ensemble.vectors names {unknown[0]!r}, expected some of {', '.join(known)}.")
    return [each for name in settings.vectors for each in (students if name == "students" else [name])]


def exported_vectors(
    names: Sequence[str], members: Sequence[Member], titles: Vectors | None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Item vectors to export.

    Args:
        names: Return value of `vectors_to_export`.
        members: The members.
        titles: Title vectors, if they were read.

    Returns:
        Vectors side by side, shape ``(N, d)``, float32, and what they are, in the order of their columns.
    """
    of_runs = {str(member.about["run"]): member for member in members if "run" in member.about}
    parts, entries = list[Tensor](), list[dict[str, Any]]()
    for name in names:
        if name == "titles":
            assert titles is not None, "they were read, since they are exported"
            vectors, about = titles.vectors, {"kind": "titles", **titles.about}
        else:
            found = of_runs[name].item_vectors
            assert found is not None, "students and teachers have item vectors"
            vectors, about = found, {"kind": of_runs[name].kind, "run": name}
        parts.append(vectors.float().cpu())
        entries.append({**about, "width": vectors.shape[1]})
    return torch.cat(parts, dim=1), entries
