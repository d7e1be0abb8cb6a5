"""Columns of prepared tables, indexed without loading them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

__all__ = ["MappedNumbers", "Numbers", "column_numbers", "list_lengths"]


class Numbers(Protocol):
    """Numbers indexed by position: an array, or a column that stays on disk."""

    def __len__(self) -> int:
        """Number of values."""

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        """Values at some positions, in the shape of ``index``."""


class MappedNumbers:
    """The numbers of a column in Arrow stream files; lists are concatenated.

    Files are memory-mapped. A file holds a column in many blocks, one per part that was written, so that a lookup takes
    two steps.

    Args:
        files: The files of a table, in their order.
        column: Name of a column of numbers without nulls, or of lists of them.
    """

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._files: list[NDArray[Any]] = []
        starts, shifts, owners, n = [0], [0], [0], 0
        for number, file in enumerate(files):
            content = pa.memory_map(file).read_buffer()
            kind: Any = np.int32
            for batch in pa.ipc.open_stream(content):
                block = _flat(batch.column(column)).to_numpy()
                kind = block.dtype
                place = (block.ctypes.data - content.address) // kind.itemsize  # in numbers, from the start of the file
                starts.append(n)
                shifts.append(place - n)
                owners.append(number)
                n += len(block)
            self._files.append(np.frombuffer(content, kind, count=content.size // np.dtype(kind).itemsize))
        self._n, self._starts, self._shifts, self._owners = n, np.array(starts), np.array(shifts), np.array(owners)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]:
        """See `Numbers`."""
        block = np.searchsorted(self._starts, index, side="right") - 1
        places = index + self._shifts[block]
        if len(self._files) == 1:
            return self._files[0][places]
        owners, found = self._owners[block], np.empty(index.shape, self._files[0].dtype)
        for owner in np.unique(owners):
            inside = owners == owner
            found[inside] = self._files[owner][places[inside]]
        return found


def column_numbers(dataset: Dataset, column: str) -> Numbers:
    """A column of numbers, or of lists of numbers, one list after the other.

    Args:
        dataset: A table; a table in files stays there, while the column of others, and of selected rows, is copied.
        column: Its name.
    """
    files = [each["filename"] for each in dataset.cache_files]
    if files and dataset._indices is None:  # no public attribute says whether rows were selected
        mapped = MappedNumbers(files, column)
        chunks = _chunks(dataset, column)
        if len(mapped) == sum(len(_flat(chunk)) for chunk in chunks):
            return mapped
    return _whole(dataset, column)


def list_lengths(dataset: Dataset, column: str) -> NDArray[np.int64]:
    """How long each list of a column is, shape ``(rows,)``."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in _chunks(dataset, column)]
    return np.concatenate([np.zeros(0, np.int64), *lengths]).astype(np.int64)


def _whole(dataset: Dataset, column: str) -> NDArray[Any]:
    chunks = [_flat(chunk) for chunk in _chunks(dataset, column)]
    numbers: NDArray[Any] = pa.chunked_array(chunks).to_numpy() if chunks else np.zeros(0, np.int32)
    return numbers


def _chunks(dataset: Dataset, column: str) -> list[pa.Array]:
    chunks: list[pa.Array] = dataset.with_format("arrow")[:].column(column).chunks
    return chunks


def _flat(values: pa.Array) -> pa.Array:
    return values.flatten() if pa.types.is_list(values.type) else values
