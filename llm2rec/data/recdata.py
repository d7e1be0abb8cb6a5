"""A prepared dataset on disk: the canonical form every later stage reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, load_from_disk

from llm2rec.core.errors import DataError
from llm2rec.data.splitting import EXAMPLE_FEATURES, SPLIT_NAMES

__all__ = ["FORMAT_VERSION", "ITEM_FEATURES", "SEQUENCE_FEATURES", "RecData", "content_hash", "load"]

FORMAT_VERSION = 1
"""Counts up when the same raw files and settings would give other content or another layout."""

ITEM_FEATURES = Features({"item_id": Value("int32"), "raw_id": Value("string"), "title": Value("string")})
SEQUENCE_FEATURES = Features(
    {
        "user_index": Value("int32"),
        "user_id": Value("string"),
        "items": List(Value("int32")),
        "timestamps": List(Value("int64")),
    }
)
FEATURES = {"items": ITEM_FEATURES, "sequences": SEQUENCE_FEATURES, **dict.fromkeys(SPLIT_NAMES, EXAMPLE_FEATURES)}


@dataclass(frozen=True)
class RecData:
    """A prepared dataset; the tables are memory-mapped.

    Attributes:
        folder: Where it lies.
        items: `item_id` (0 to N-1, equal to the row), `raw_id`, `title`.
        sequences: `user_index`, `user_id`, `items`, `timestamps`; one row a user, oldest first.
        splits: `train`, `validation` and `test`, with the columns of `EXAMPLE_FEATURES`. Row r of `train` has
            `example_id` r; validation and test ids go on from there.
        fingerprint: sha256 over items, examples and settings; what teacher outputs are checked against.
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

    def verify(self) -> None:
        """Read everything again and compare it with the hashes in the manifest.

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
        folder: What `prepare` wrote.

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
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder} is damaged ({error!r}). {remedy}") from error
    for name, features in FEATURES.items():
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


def content_hash(dataset: Dataset) -> str:
    """Hash the values of a dataset: names, types and values count, chunks, versions and files do not.

    Returns:
        A sha256 in hexadecimal.
    """
    whole = hashlib.sha256()
    table = dataset.data.table
    for name in dataset.column_names:
        column = table[name]
        # Lengths and values apart: otherwise ["ab", "c"] and ["a", "bc"] would be equal, or chunk borders would show.
        lengths, values = hashlib.sha256(), hashlib.sha256()
        for chunk in column.chunks:
            if pa.types.is_list(chunk.type):
                lengths.update(_little(chunk.value_lengths().to_numpy(), "<i8"))
                chunk = chunk.flatten()
            if pa.types.is_string(chunk.type):
                encoded = [text.encode() for text in chunk.to_pylist()]
                lengths.update(_little(np.array([len(text) for text in encoded]), "<i8"))
                values.update(b"".join(encoded))
            else:
                values.update(_little(chunk.to_numpy(), "<i8"))
        whole.update(f"{name}:{column.type}:{lengths.hexdigest()}:{values.hexdigest()}\n".encode())
    return whole.hexdigest()


def _little(values: np.ndarray, dtype: str) -> bytes:
    """Bytes of integers, the same on every machine."""
    return values.astype(dtype).tobytes()
