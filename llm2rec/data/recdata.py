"""A prepared dataset on disk, as every later stage reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, load_from_disk
from numpy.typing import NDArray

from llm2rec.core.errors import DataError
from llm2rec.core.files import sha256_of_file
from llm2rec.data.splitting import EXAMPLE_FEATURES, SPLIT_NAMES

__all__ = [
    "FEATURES",
    "FORMAT_VERSION",
    "ITEM_FEATURES",
    "OPTIONAL_ITEM_FEATURES",
    "SEQUENCE_FEATURES",
    "ContentHash",
    "RecData",
    "content_hash",
    "item_features",
    "load",
]

FORMAT_VERSION = 1
"""Raised when the same raw files and settings give other content or another layout."""

ITEM_FEATURES = Features({"item_id": Value("int32"), "raw_id": Value("string"), "title": Value("string")})
SEQUENCE_FEATURES = Features(
    {
        "user_index": Value("int32"),
        "user_id": Value("string"),
        "items": List(Value("int32")),
        "timestamps": List(Value("int64")),
    }
)
OPTIONAL_ITEM_FEATURES = Features({"text": Value("string"), "order": Value("int32")})
"""Columns that items have only where the options of a dataset ask for them."""
FEATURES = {"items": ITEM_FEATURES, "sequences": SEQUENCE_FEATURES, **dict.fromkeys(SPLIT_NAMES, EXAMPLE_FEATURES)}


def item_features(columns: Iterable[str]) -> Features:
    """Features of a table of items that also has some optional columns."""
    return Features(ITEM_FEATURES | {name: each for name, each in OPTIONAL_ITEM_FEATURES.items() if name in columns})


@dataclass(frozen=True)
class RecData:
    """A prepared dataset; the tables are memory-mapped.

    Attributes:
        folder: Its folder.
        items: `item_id` (0 to N-1, equal to the row), `raw_id`, `title`, and the columns of `OPTIONAL_ITEM_FEATURES`
            that the dataset has.
        sequences: `user_index`, `user_id`, `items`, `timestamps`; one row per user, oldest first.
        splits: `train`, `validation` and `test`, with the columns of `EXAMPLE_FEATURES`. Row r of `train` has
            `example_id` r; validation and test ids continue from there.
        fingerprint: sha256 over items, examples and settings; teacher outputs are checked against it.
        manifest: Fingerprint, settings, sizes, hashes and versions, as saved.
        statistics: Counts and distributions, as saved; `format_statistics` prints them.
    """

    folder: Path
    items: Dataset
    sequences: Dataset
    splits: dict[str, Dataset]
    fingerprint: str
    manifest: dict[str, Any] = field(repr=False)
    statistics: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.manifest["settings"]["name"])

    @property
    def domain(self) -> str:
        """The word for one item in prompts."""
        return str(self.manifest["settings"]["domain"])

    @property
    def history_length(self) -> int:
        """Most items a history holds, L."""
        return int(self.manifest["settings"]["history_length"])

    @property
    def n_items(self) -> int:
        """Items in the catalogue, N."""
        return len(self.items)

    @cached_property
    def titles(self) -> list[str]:
        """Titles by item id, ``(N,)``."""
        return list(self.items["title"])

    @cached_property
    def texts(self) -> list[str]:
        """What a language model reads of each item, ``(N,)``: title and `dataset.text_columns`; else the title."""
        return list(self.items["text"]) if "text" in self.items.column_names else self.titles

    @cached_property
    def tie_order(self) -> NDArray[np.int64] | None:
        """Place of each item in the order in which its source lists ties, ``(N,)``; None if the data gives none.

        It is that of `dataset.tie_column`, or of the item ids as text if `dataset.ties` is `item`.
        """
        if "order" in self.items.column_names:
            return np.asarray(self.items["order"], np.int64)
        if self.manifest["settings"].get("ties") != "item":
            return None
        return np.unique(np.array(self.items["raw_id"], dtype=object), return_inverse=True)[1]

    def verify(self) -> None:
        """Read all tables and compare them with the hashes in the manifest.

        Raises:
            DataError: If a table is not what was written.
        """
        tables = {"items": self.items, "sequences": self.sequences, **self.splits}
        for name, table in tables.items():
            if content_hash(table) != self.manifest["hashes"][name]:
                raise DataError(
                    f"{self.folder / name} is not what was written (its hash differs); delete {self.folder} and "
                    "prepare the data again."
                )


def load(folder: Path) -> RecData:
    """Load a prepared dataset.

    Args:
        folder: Folder written by `prepare`.

    Returns:
        The dataset, memory-mapped.

    Raises:
        DataError: If the folder holds no prepared dataset, one of another format version, or a damaged one.
    """
    folder = Path(folder)
    remedy = f"Delete {folder} and prepare the data again (python -m llm2rec.data dataset=...)."
    if not (folder / "manifest.json").is_file():
        raise DataError(
            f"{folder} holds no prepared dataset (no manifest.json); prepare it with python -m llm2rec.data dataset=..."
        )
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{folder} has format version {manifest['format_version']}, expected {FORMAT_VERSION}. {remedy}"
            )
        statistics = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        tables = {name: load_from_disk(str(folder / name)) for name in FEATURES}
        fingerprint = str(manifest["fingerprint"])
        sizes = manifest["sizes"]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{folder} is damaged ({error!r}). {remedy}") from error
    for name, expected in manifest.get("files", {}).items():  # earlier versions wrote none
        if sha256_of_file(folder / name) != expected:
            raise DataError(f"{folder / name} is not what was written (its hash differs). {remedy}")
    expected_features = FEATURES | {"items": item_features(tables["items"].column_names)}
    for name, features in expected_features.items():
        table = tables[name]
        if len(table) != sizes.get(name) or table.features != features:
            raise DataError(f"{folder / name} holds {len(table)} rows, expected {sizes.get(name)}. {remedy}")
    return RecData(
        folder=folder,
        items=tables["items"],
        sequences=tables["sequences"],
        splits={name: tables[name] for name in SPLIT_NAMES},
        fingerprint=fingerprint,
        manifest=manifest,
        statistics=statistics,
    )


class ContentHash:
    """Hashes a table part by part: names, types and values count; parts, chunks, versions and files do not.

    Args:
        schema: Names and types of its columns.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        # Lengths and values are hashed apart, so that ["ab", "c"] differs from ["a", "bc"] and chunks do not count.
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in schema.names}

    def update(self, part: pa.RecordBatch | pa.Table) -> None:
        """Add the next rows."""
        for name, (lengths, values) in self._columns.items():
            column = part[name]
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                if pa.types.is_list(chunk.type):
                    lengths.update(_little(chunk.value_lengths().to_numpy(), "<i8"))
                    chunk = chunk.flatten()
                if pa.types.is_string(chunk.type):
                    lengths.update(_little(pc.binary_length(chunk).to_numpy(), "<i8"))
                    values.update(_text_bytes(chunk))
                else:
                    values.update(_little(chunk.to_numpy(), "<i8"))

    def hexdigest(self) -> str:
        """The sha256 of all rows so far."""
        whole = hashlib.sha256()
        for name, (lengths, values) in self._columns.items():
            kind = self._schema.field(name).type
            whole.update(f"{name}:{kind}:{lengths.hexdigest()}:{values.hexdigest()}\n".encode())
        return whole.hexdigest()


def content_hash(dataset: Dataset) -> str:
    """Hash the values of a dataset, as `ContentHash` does.

    Returns:
        A sha256 in hexadecimal.
    """
    table = dataset.data.table.select(dataset.column_names)
    hashed = ContentHash(table.schema)
    hashed.update(table)
    return hashed.hexdigest()


def _text_bytes(chunk: pa.StringArray) -> memoryview:
    """The UTF-8 of all texts, concatenated."""
    _, offsets, content = chunk.buffers()
    if content is None or not len(chunk):
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return memoryview(content)[ends[0] : ends[-1]]


def _little(values: np.ndarray, dtype: str) -> bytes:
    """Bytes of integers, the same on every machine."""
    return values.astype(dtype).tobytes()
