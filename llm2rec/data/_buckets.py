"""Interactions on disk, in buckets of users of which one at a time fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm2rec.core.logging import Progress, progress

__all__ = ["ROW", "Buckets", "Rows", "partitioned"]

ROW = np.dtype([("user", "<i4"), ("item", "<i4"), ("time", "<i8")])
"""One interaction: indices of its user and item, and its timestamp."""

Rows = npt.NDArray[np.void]

ROWS_PER_BUCKET = 1 << 18
_ROWS_PER_BLOCK = 1 << 18


@dataclass
class Buckets:
    """Interactions in buckets; all of one user are in the same bucket, and buckets are in the order of their users.

    A bucket holds about `ROWS_PER_BUCKET` interactions, or one user with more.

    Attributes:
        files: One per bucket.
        n_users: Users, numbered from 0.
        n_items: Items, numbered from 0.
    """

    files: list[Path]
    n_users: int
    n_items: int

    def __iter__(self) -> Iterator[Rows]:
        for file in progress(self.files, "count interactions", len(self.files), "bucket"):
            yield np.fromfile(file, ROW)  # read, not mapped: its memory is freed

    def change(self, function: Callable[[Rows], Rows]) -> None:
        """Replace every bucket by a function of it."""
        for file in progress(self.files, "filter interactions", len(self.files), "bucket"):
            function(np.fromfile(file, ROW)).tofile(file)

    def counts(self, kept: Callable[[Rows], npt.NDArray[np.bool_]]) -> tuple[npt.NDArray[np.int64], ...]:
        """Interactions of each user, ``(U,)``, and of each item, ``(N,)``, among those that ``kept`` selects."""
        of_users, of_items = np.zeros(self.n_users, np.int64), np.zeros(self.n_items, np.int64)
        for rows in self:
            rows = rows[kept(rows)]
            if len(rows):
                first = int(rows["user"].min())
                counted = np.bincount(rows["user"] - first)
                of_users[first : first + len(counted)] += counted
                of_items += np.bincount(rows["item"], minlength=self.n_items)
        return of_users, of_items


def partitioned(file: Path, of_users: npt.NDArray[np.int64], n_items: int, folder: Path) -> Buckets:
    """Split interactions into buckets; within a bucket they keep their order.

    Args:
        file: Interactions, as `ROW`.
        of_users: Interactions of each user, ``(U,)``.
        n_items: Number of items.
        folder: Folder of the buckets.
    """
    bucket_of = (np.cumsum(of_users) - of_users) // ROWS_PER_BUCKET  # ascending
    numbers = np.unique(bucket_of)
    files = {number: folder / f"bucket_{number:06d}" for number in numbers.tolist()}
    for each in files.values():
        each.touch()
    n_rows = file.stat().st_size // ROW.itemsize
    with open(file, "rb") as source, Progress("sort interactions into buckets", n_rows, "row") as bar:
        while len(rows := np.fromfile(source, ROW, _ROWS_PER_BLOCK)):
            bucket = bucket_of[rows["user"]]
            order = np.argsort(bucket, kind="stable")
            found, starts = np.unique(bucket[order], return_index=True)
            for number, part in zip(found.tolist(), np.split(rows[order], starts[1:]), strict=True):
                with open(files[number], "ab") as target:
                    part.tofile(target)
            bar.advance(len(rows))
    return Buckets(list(files.values()), len(of_users), n_items)
