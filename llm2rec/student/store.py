"""Finished students on disk, in a run folder's ``student/``: configuration, weights, items' ids and titles, a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import feather

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import check_hashes, read_object, replaced_folder, write_hashes, write_json
from llm2rec.core.hub import CARD, obtained
from llm2rec.core.train.checkpoint import read_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from llm2rec.student.models import SequentialRecommender

__all__ = ["load_item_table", "read_student", "save_student"]

_ITEMS = "items.arrow"


def save_student(
    folder: Path,
    model: SequentialRecommender,
    name: str,
    arguments: dict[str, Any],
    items: pa.Table | None = None,
    card: str | None = None,
) -> None:
    """Write a student so that `llm2rec.student.models.load_student` needs nothing else.

    Args:
        folder: Usually ``<run>/student``.
        model: The trained model; fused item tables are computed out.
        name: Its name in `MODELS`.
        arguments: What it was built with, plain values.
        items: ``raw_id`` and ``title`` of each item, in the order of item ids, so that the folder alone can answer in
            them; None for a student that is read by item id only.
        card: Its model card (`llm2rec.cards`); None for a student that belongs to something else.
    """
    with replaced_folder(folder) as aside:
        save_tensors(model.weights_to_serve(), aside / "model.safetensors")
        write_json(aside / "config.json", {"model": name, "arguments": arguments})
        if items is not None:
            feather.write_feather(items.select(["raw_id", "title"]), str(aside / _ITEMS), compression="uncompressed")
        if card is not None:
            (aside / CARD).write_text(card, encoding="utf-8")
        write_hashes(aside, editable=(CARD,))


def load_item_table(folder: Path) -> pa.Table:
    """Load ``raw_id`` and ``title`` of each item, as `save_student` wrote them.

    Raises:
        CheckpointError: If there is no such table, or none that can be read.
    """
    file = folder / _ITEMS
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no {_ITEMS}, which names the items; students of earlier versions were saved without it: "
            "train this one again."
        )
    try:
        table = feather.read_table(str(file), columns=["raw_id", "title"])
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); copy the student's folder again, as a whole."
        ) from error


def read_student(place: Path | str, revision: str | None = None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read what `save_student` wrote; `llm2rec.student.models.load_student` makes a model of it.

    Args:
        place: A student's folder, that of its run, or its id on the Hugging Face Hub, ``user/name``.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The student's folder; its configuration, with ``model`` and ``arguments``; and its weights by name.

    Raises:
        CheckpointError: If the folder holds no student, or a damaged one.
        HubError: If it cannot be downloaded.
    """
    folder = obtained(place, revision)
    if (folder / "student" / "config.json").is_file():  # of a run
        folder = folder / "student"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no student (no config.json); name the folder of a finished student run.")
    try:
        check_hashes(folder)
        config = read_object(folder / "config.json", "model", "arguments")
    except DataError as error:
        raise CheckpointError(f"{folder} holds no student that can be built: {error}") from error
    return folder, config, read_tensors(folder / "model.safetensors")
