"""Item vectors of new items, as a student that reads texts computes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import read_object
from llm2rec.core.train.checkpoint import read_tensors, save_tensors
from llm2rec.core.vectors import Preparation
from llm2rec.student.items import ReadingItemTable
from llm2rec.student.models import SequentialRecommender

__all__ = ["TextReader", "load_reader"]

_FILE, _KEY, _MAP = "reading.safetensors", "reading", "map."


@dataclass(frozen=True)
class TextReader:
    """What a student has learned to make of the vectors of texts.

    Attributes:
        maps: Linear map from a prepared vector to the vector of an item without offset, ``(D, c)``, for each of the
            student's item tables by name (`SequentialRecommender.item_tables`).
        preparation: Prepares vectors of texts; None takes them as they are.
        encoders: Records of the text encoders whose vectors stand side by side, as the manifest of the teacher outputs
            has them.
        text_columns: Columns of the items that the encoders read after the title.
        text_length: Most characters of title and columns together.
    """

    maps: Mapping[str, Tensor]
    preparation: Preparation | None
    encoders: list[dict[str, Any]] = field(default_factory=list)
    text_columns: list[str] = field(default_factory=list)
    text_length: int = 1000

    @classmethod
    def of(cls, model: SequentialRecommender, preparation: Preparation | None, **about: Any) -> "TextReader":
        """Read the maps from a student whose item tables are all fused.

        Args:
            model: The student.
            preparation: How its vectors of texts were prepared.
            about: The other attributes.
        """
        tables = {name: table for name, table in model.item_tables.items() if isinstance(table, ReadingItemTable)}
        assert len(tables) == len(model.item_tables), "a table is not fused"
        return cls({name: table.vector_map().cpu() for name, table in tables.items()}, preparation, **about)

    def vectors(self, texts: Tensor) -> dict[str, Tensor]:
        """Item vectors by table, ``(M, D)`` each, from the encoders' vectors of texts, side by side, ``(M, d)``.

        Raises:
            CheckpointError: If the vectors have another width than those of training.
        """
        width = next(iter(self.maps.values())).shape[1] if self.preparation is None else len(self.preparation.mean)
        if texts.shape[1] != width:
            raise CheckpointError(
                f"vectors of texts have {texts.shape[1]} numbers, but those of training had {width}; use the language "
                "model of training."
            )
        prepared = texts.float() if self.preparation is None else self.preparation(texts)
        return {name: prepared @ each.T for name, each in self.maps.items()}

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tensors into a student's folder.

        Returns:
            What its ``config.json`` must hold for `load_reader`.
        """
        tensors = {f"{_MAP}{name}": tensor for name, tensor in self.maps.items()}
        save_tensors(tensors | ({} if self.preparation is None else self.preparation.tensors()), folder / _FILE)
        names = ("encoders", "text_columns", "text_length")
        return {_KEY: {"prepares": self.preparation is not None} | {name: getattr(self, name) for name in names}}


def load_reader(folder: Path) -> TextReader | None:
    """Load what a student has learned to make of texts.

    Args:
        folder: The student's folder.

    Returns:
        The reader; None for a student that does not read texts.

    Raises:
        CheckpointError: If its files are damaged.
    """
    about = read_object(folder / "config.json").get(_KEY)
    if about is None:
        return None
    tensors = read_tensors(folder / _FILE)
    maps = {name.removeprefix(_MAP): tensor for name, tensor in tensors.items() if name.startswith(_MAP)}
    try:
        prepares, options = about["prepares"], {key: value for key, value in about.items() if key != "prepares"}
        return TextReader(maps, Preparation.of(tensors) if prepares else None, **options)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"what {folder / 'config.json'} says of texts is damaged ({error!r}); copy the whole folder again."
        ) from error
