"""Which interactions are targets of which split, and the examples made from them.

Within one user's sequence the targets of a split are one run of positions, because sequences are ordered in time.
So a split is three numbers per user: first target, one past the last, and the id of the first example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Features, List, Value

from llm2rec.core.errors import DataError
from llm2rec.data.filtering import Sequences
from llm2rec.data.spec import DatasetSpec

__all__ = ["EXAMPLE_FEATURES", "SPLIT_NAMES", "Span", "build_examples", "target_spans"]

SPLIT_NAMES = ("train", "validation", "test")
_BINS = 1 << 16

EXAMPLE_FEATURES = Features(
    {
        "example_id": Value("int64"),
        "user_id": Value("string"),
        "user_index": Value("int32"),
        "position": Value("int32"),
        "history": List(Value("int32")),
        "target": Value("int32"),
        "timestamp": Value("int64"),
    }
)


@dataclass(frozen=True)
class Span:
    """The targets of one split.

    Attributes:
        first: Position of each user's first target, ``(U,)``; at least 1, so that there is a history.
        stop: One past each user's last target, ``(U,)``; equal to `first` where the user has none.
        first_example: Id of each user's first example, ``(U,)``.
    """

    first: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    first_example: npt.NDArray[np.int64]

    @property
    def n_examples(self) -> int:
        """Examples of this split, over all users."""
        return int((self.stop - self.first).sum())


def target_spans(sequences: Sequences, spec: DatasetSpec) -> tuple[dict[str, Span], dict[str, int]]:
    """Assign positions to splits as targets.

    `leave_one_out`: each user's last interaction tests, the one before validates, positions 1 to n-3 train.

    `global_time`: the interactions at or after the (1 - validation - test) quantile of all timestamps validate,
    those at or after the (1 - test) quantile test, everything before trains. Interactions with exactly the
    timestamp of a cut fall on its later side, so no training target is as late as the first validation target.
    Items first seen after the cut stay in the catalogue, and are counted as cold targets in the statistics. An
    interaction that is the first of its user is never a target, since it has no history: users whose first
    interaction lies after the cut are counted as `users_new_after_cut`. Histories of validation and test targets
    may hold interactions from after the cut, as they would in production.

    Example ids count all train rows first, then validation, then test, each in order of user and position.

    Returns:
        The span of each split, and counts for the statistics.

    Raises:
        DataError: If a split would be empty.
    """
    lengths = sequences.lengths
    counts: dict[str, int] = {}
    if spec.split == "leave_one_out":
        bounds = [np.ones_like(lengths), lengths - 2, lengths - 1, lengths]
    else:
        validation_cut, test_cut = _cuts(sequences, spec)
        n_before = [_n_before(cut, sequences) for cut in (validation_cut, test_cut)]
        bounds = [np.ones_like(lengths), *(np.maximum(each, 1) for each in n_before), lengths]
        counts["validation_cut"] = validation_cut
        counts["test_cut"] = test_cut
        counts["users_new_after_cut"] = int((n_before[0] == 0).sum())
    spans = {}
    next_example = 0
    for name, first, stop in zip(SPLIT_NAMES, bounds[:-1], bounds[1:], strict=True):
        sizes = stop - first
        spans[name] = Span(first, stop, next_example + np.cumsum(sizes) - sizes)
        next_example += int(sizes.sum())
    empty = [name for name in SPLIT_NAMES if spans[name].n_examples == 0]
    if empty:
        raise DataError(
            f"dataset `{spec.name}`: no example for {' and '.join(empty)} with split={spec.split} "
            f"({len(lengths)} users, {sequences.n_interactions} interactions). Leave-one-out needs a user with at "
            "least 4 interactions to train on; a global time split needs timestamps that differ "
            "(dataset.validation_fraction, dataset.test_fraction)."
        )
    return spans, counts


def _cuts(sequences: Sequences, spec: DatasetSpec) -> tuple[int, int]:
    """Return the first timestamps of validation and of test."""
    n_rows = sequences.n_interactions
    # From the end: 1 - 0.1 - 0.1 is not 0.8 in binary, and rounding it would move a row.
    n_test = max(1, round(n_rows * spec.test_fraction))
    n_validation = max(1, round(n_rows * spec.validation_fraction))
    places = max(0, n_rows - n_test - n_validation), n_rows - n_test
    return _time_at(places[0], sequences), _time_at(places[1], sequences)


def _n_before(cut: int, sequences: Sequences) -> npt.NDArray[np.int64]:
    """Count each user's interactions before a time, ``(U,)``."""
    return sequences.buckets.counts(lambda rows: rows["time"] < cut)[0]


def _time_at(place: int, sequences: Sequences) -> int:
    """Return the timestamp at a rank, from 0, of all sorted timestamps.

    They are never all in memory: each pass counts them in bins, and the next one looks into one bin only.
    """
    ends = [(int(rows["time"].min()), int(rows["time"].max())) for rows in sequences.buckets if len(rows)]
    low, high = min(first for first, _ in ends), max(last for _, last in ends)
    while low < high:
        width = (high - low) // _BINS + 1
        counts = np.zeros(_BINS, np.int64)
        for rows in sequences.buckets:
            inside = rows["time"][(rows["time"] >= low) & (rows["time"] <= high)]
            # Differences of int64 timestamps may exceed int64; unsigned arithmetic wraps around to the right value.
            bins = (inside.astype(np.uint64) - np.array(low).astype(np.uint64)) // np.uint64(width)
            counts += np.bincount(bins.astype(np.int64), minlength=_BINS)
        before = np.cumsum(counts) - counts
        chosen = int(np.searchsorted(before + counts, place, side="right"))
        place -= int(before[chosen])
        low, high = low + chosen * width, min(high, low + (chosen + 1) * width - 1)
    return low


def build_examples(batch: pa.Table, history_length: int) -> pa.Table:
    """Build the examples of a batch of users.

    Args:
        batch: Columns `user_index`, `user_id`, `items`, `timestamps`, and the span's `first`, `stop` and
            `first_example`; one row per user.
        history_length: Most items a history holds, L.

    Returns:
        One row per example, with the columns of `EXAMPLE_FEATURES`; histories oldest first.
    """
    columns = {name: batch[name].combine_chunks() for name in batch.column_names}
    lists = columns["items"]
    items = lists.flatten().to_numpy()  # [M]: all users' items, concatenated
    timestamps = columns["timestamps"].flatten().to_numpy()
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    first, stop = (columns[name].to_numpy().astype(np.int64) for name in ("first", "stop"))
    sizes = stop - first

    user = np.repeat(np.arange(len(sizes)), sizes)  # [rows]: the batch's user of each example
    nth = _counting(sizes)  # [rows]: 0, 1, ... within each user
    position = first[user] + nth
    at = (np.cumsum(lengths) - lengths)[user] + position  # [rows]: where each target lies in `items`
    kept = np.minimum(position, history_length)  # [rows]: items in each history, at least 1
    taken = np.repeat(at - kept, kept) + _counting(kept)
    offsets = np.concatenate(([0], np.cumsum(kept))).astype(np.int32)
    row = {
        "example_id": pa.array(columns["first_example"].to_numpy()[user] + nth, pa.int64()),
        "user_id": columns["user_id"].take(pa.array(user)),
        "user_index": columns["user_index"].take(pa.array(user)),
        "position": pa.array(position.astype(np.int32)),
        "history": pa.ListArray.from_arrays(pa.array(offsets), pa.array(items[taken])),
        "target": pa.array(items[at]),
        "timestamp": pa.array(timestamps[at]),
    }
    return pa.table(row)


def _counting(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count 0, 1, ..., size-1 for each size, in one flat array: (2, 3) gives 0 1 0 1 2."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
