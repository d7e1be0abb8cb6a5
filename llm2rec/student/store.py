"""Save and load students: configuration, weights, item ids and titles, and a model card in ``<run>/student``."""

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
    from llm2rec.student.reading import TextReader

__all__ = ["load_item_table", "read_student", "save_student", "validated_mask"]

_ITEMS = "items.arrow"


def save_student(
    folder: Path,
    model: SequentialRecommender,
    name: str,
    arguments: dict[str, Any],
    items: pa.Table | None = None,
    card: str | None = None,
    mask_seen: bool | None = None,
    reader: TextReader | None = None,
) -> None:
    """Save a student in a self-contained folder for `llm2rec.student.models.load_student`.

    Args:
        folder: Usually ``<run>/student``.
        model: The trained model; fused item tables are saved as plain tables.
        name: Its name in `MODELS`.
        arguments: Constructor arguments, plain values.
        items: ``raw_id`` and ``title`` of each item, in the order of item ids, for recommendations by raw id or title;
            None saves a student that is used by item id only.
        card: Model card (`llm2rec.cards`); None for a student inside another artifact.
        mask_seen: Whether its rankings leave out the items of a user's past, the default when it is served; None if
            that is not known.
        reader: What it has learned to make of texts, for new items; None for a student that does not read.
    """
    with replaced_folder(folder) as aside:
        save_tensors(model.weights_to_serve(), aside / "model.safetensors")
        reading = {} if reader is None else reader.save(aside)
        of_rankings = {} if mask_seen is None else {"mask_seen": mask_seen}
        write_json(aside / "config.json", {"model": name, "arguments": arguments, **of_rankings, **reading})
        if items is not None:
            feather.write_feather(items.select(["raw_id", "title"]), str(aside / _ITEMS), compression="uncompressed")
        if card is not None:
            (aside / CARD).write_text(card, encoding="utf-8")
        write_hashes(aside, editable=(CARD,))


def load_item_table(folder: Path) -> pa.Table:
    """Load ``raw_id`` and ``title`` of each item, as saved by `save_student`.

    Raises:
        CheckpointError: If the table is missing or damaged.
    """
    file = folder / _ITEMS
    if not file.is_file():
        raise CheckpointError(
            f"{folder} lacks {_ITEMS}, the table of item ids and titles, which earlier versions did not save; train "
            "the student again."
        )
    try:
        table = feather.read_table(str(file), columns=["raw_id", "title"])
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy the whole student folder again.") from error


def validated_mask(folder: Path) -> bool:
    """Whether the rankings of a student saved by `save_student` leave out the items of a user's past.

    True for students of earlier versions, which did not record it: serving them excluded these items.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        mask_seen = read_object(folder / "config.json").get("mask_seen", True)
    except DataError as error:
        raise CheckpointError(f"the student in {folder} cannot be used: {error}") from error
    if not isinstance(mask_seen, bool):
        raise CheckpointError(f"`mask_seen` in {folder / 'config.json'} is {mask_seen!r}, expected true or false.")
    return mask_seen


def read_student(place: Path | str, revision: str | None = None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Read a student saved by `save_student`; see `llm2rec.student.models.load_student` to build the model.

    Args:
        place: A student's folder, that of its run, or its id on the Hugging Face Hub, ``user/name``.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The student's folder; its configuration, with ``model`` and ``arguments``; and its weights by name.

    Raises:
        CheckpointError: If the folder has no student, or a damaged one.
        HubError: If it cannot be downloaded.
    """
    folder = obtained(place, revision)
    if (folder / "student" / "config.json").is_file():  # of a run
        folder = folder / "student"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no student (no config.json); pass the folder of a finished student run.")
    try:
        check_hashes(folder)
        config = read_object(folder / "config.json", "model", "arguments")
    except DataError as error:
        raise CheckpointError(f"the student in {folder} cannot be built: {error}") from error
    return folder, config, read_tensors(folder / "model.safetensors")
