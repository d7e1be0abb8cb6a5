"""Rows of a split as tensors: padded histories, lengths and targets from the users' sequences."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.ranking import Pairs
from llm2rec.data import RecData
from llm2rec.data.columns import Numbers, column_numbers, list_lengths

__all__ = ["Rows", "SeenItems", "Segments", "SequenceBatch"]


@dataclass(frozen=True)
class SequenceBatch:
    """Batch of B' rows in B sequences; row b is sequence b unless ``at`` is given.

    Attributes:
        history: Item ids, shape ``(B, L)``, int64, oldest first, padded on the right with ``n_items``.
        lengths: Real items per sequence, shape ``(B,)``, int64.
        targets: Target items, shape ``(B',)``, int64.
        rows: Row numbers in the split, shape ``(B',)``, int64.
        at: Index of each row's last history item in the flattened ``history``, shape ``(B',)``, int64; None if there is
            one sequence per row.
    """

    history: Tensor
    lengths: Tensor
    targets: Tensor
    rows: NDArray[np.int64]
    at: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of a student's ``forward``, which returns one user vector per row."""
        return (self.history, self.lengths) if self.at is None else (self.history, self.lengths, self.at)


@dataclass(frozen=True)
class Segments:
    """Partition of the rows into segments: parts of a user's sequence that are read in one causal pass.

    Attributes:
        starts: Start of each segment in ``Rows.items``, shape ``(S,)``, int64.
        first_rows: First row that each segment predicts, shape ``(S,)``, int64.
        sizes: Number of consecutive rows that each segment predicts, shape ``(S,)``, int64.
    """

    starts: NDArray[np.int64]
    first_rows: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of a split, each a user and the position of its target in the user's sequence.

    The tables stay on disk; histories are read per batch. A forward pass reads whole *units*. By default a unit is one
    row with its history (a window). After `in_segments` a unit is a segment, and one pass of a causal model predicts
    many rows. Row numbers refer to the split in both cases.

    Attributes:
        items: Concatenated sequences of all users, shape ``(interactions,)``.
        users: User index of each row, shape ``(M,)``.
        positions: Position of each row's target in its user's sequence, shape ``(M,)``; at least 1.
        user_starts: Start of each user in ``items``, shape ``(users,)``.
        n_items: Number of items, N; also the padding id.
        max_length: Maximum history length, L.
        segments: Segments of the rows; None for windows.
    """

    items: Numbers
    users: Numbers
    positions: Numbers
    user_starts: NDArray[np.int64]
    n_items: int
    max_length: int
    segments: Segments | None = None

    @classmethod
    def of(cls, data: RecData, split: str, max_length: int | None = None, examples: str = "windows") -> "Rows":
        """Open a split of a dataset.

        Args:
            data: The dataset.
            split: ``train``, ``validation`` or ``test``.
            max_length: Maximum history length; that of the dataset if None.
            examples: ``windows`` or ``sequences``; see `StudentSettings`.

        Raises:
            ConfigError: If ``max_length`` is longer than the dataset's histories.
        """
        max_length = data.history_length if max_length is None else max_length
        if max_length > data.history_length:
            raise ConfigError(
                f"student.model.max_length is {max_length}, but histories of {data.name} have at most "
                f"{data.history_length} items; set `dataset.history_length={max_length}`, the default of "
                "`student.model.max_length`."
            )
        rows = cls.from_tables(data.splits[split], data.sequences, data.n_items, max_length)
        return rows if examples == "windows" else rows.in_segments()

    @classmethod
    def from_tables(cls, split: Dataset, sequences: Dataset, n_items: int, max_length: int) -> "Rows":
        """Open the tables of `llm2rec.data`; arguments as the attributes."""
        lengths = list_lengths(sequences, "items")
        return cls(
            column_numbers(sequences, "items"),
            column_numbers(split, "user_index"),
            column_numbers(split, "position"),
            np.cumsum(lengths) - lengths,
            n_items,
            max_length,
        )

    def in_segments(self, stride: int | None = None) -> "Rows":
        """Group the rows into segments of at most L items.

        The first segment of a user reads up to L items and predicts a row at each. Every later segment begins with the
        last ``L - stride`` items of the previous one as context and predicts the next ``stride`` rows. Each row is
        predicted exactly once, by a pass that has read at least ``L - stride + 1`` items before its target, or all of
        them.

        Args:
            stride: Rows that each later segment predicts, 1 to L; half of L if None. The rows of a user must be
                adjacent and in chronological order.
        """
        length, stride = self.max_length, stride or -(-self.max_length // 2)
        every = np.arange(len(self))
        users, positions = self.users[every].astype(np.int64), self.positions[every].astype(np.int64)
        follows = (np.diff(users) == 0) & (np.diff(positions) == 1)
        run_rows = np.concatenate([[0], np.flatnonzero(~follows) + 1])  # (R,): first row of each unbroken run
        run_sizes = np.diff(run_rows, append=len(users))
        # The first segment of a run starts at the user's first item if at most L items precede its last target.
        first_sizes = np.minimum(run_sizes, np.maximum(stride, length + 1 - positions[run_rows]))
        n_later = -(-(run_sizes - first_sizes) // stride)  # (R,)
        run = np.repeat(np.arange(len(run_rows)), n_later + 1)  # (S,): each segment's run
        nth = _counting(n_later + 1)  # (S,): 0, 1, ... within each run
        stops = np.minimum(first_sizes[run] + nth * stride, run_sizes[run])  # (S,): one past the last row, in its run
        begins = np.where(nth == 0, 0, first_sizes[run] + (nth - 1) * stride)
        # A segment does not read its last target.
        starts, _ = self._windows(run_rows[run] + stops - 1)
        return replace(self, segments=Segments(starts, run_rows[run] + begins, stops - begins))

    def __len__(self) -> int:
        """Number of rows, M (not of units)."""
        return len(self.users)

    @property
    def units(self) -> NDArray[np.int64]:
        """Numbers of the units, which an epoch shuffles."""
        return np.arange(len(self) if self.segments is None else len(self.segments.sizes))

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Number of rows of each unit; None means 1 each."""
        return None if self.segments is None else self.segments.sizes

    @cached_property
    def targets(self) -> Tensor:
        """Target items, shape ``(M,)``, int32."""
        return torch.from_numpy(self.items[self._target_places(np.arange(len(self)))].astype(np.int32))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Lengths of all histories, shape ``(M,)``."""
        return np.minimum(self.positions[np.arange(len(self))], self.max_length).astype(np.int32)

    def occurring(self) -> Tensor:
        """Whether each item occurs in a history or as a target of the rows, shape ``(N,)``, bool."""
        starts, lengths = self._windows(np.arange(len(self)))
        bounds = np.zeros(len(self.items) + 1, np.int32)  # the windows with their targets cover what has a positive sum
        np.add.at(bounds, starts, 1)
        np.subtract.at(bounds, starts + lengths + 1, 1)
        covered = np.flatnonzero(np.cumsum(bounds[:-1], dtype=np.int32) > 0)
        found = torch.zeros(self.n_items, dtype=torch.bool)
        found[torch.from_numpy(self.items[covered].astype(np.int64))] = True
        return found

    def histories(self, rows: NDArray[np.int64] | None = None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Read the histories of ``rows`` (all if None).

        Returns:
            Item ids of shape ``(B, L)``, oldest first, padded on the right with ``n_items``; and lengths ``(B,)``.
        """
        starts, lengths = self._windows(np.arange(len(self)) if rows is None else rows)
        return self._read(starts, lengths, self.max_length), lengths.astype(np.int32)

    def histories_and_targets(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Padded histories of ``rows`` with their targets in the last column, shape ``(B, L + 1)``."""
        return np.column_stack([self.histories(rows)[0], self.targets.numpy()[rows]])

    def batch(self, units: NDArray[np.int64], device: torch.device | str = "cpu") -> SequenceBatch:
        """Collate the rows of ``units``, shape ``(B,)``, in their order.

        Windows are padded to L, segments to the longest one in the batch.
        """
        if self.segments is None:
            rows, at = units, None
            starts, lengths = self._windows(rows)
            history = self._read(starts, lengths, self.max_length)
        else:
            first_rows, sizes, starts = (
                each[units] for each in (self.segments.first_rows, self.segments.sizes, self.segments.starts)
            )
            rows = np.repeat(first_rows, sizes) + _counting(sizes)  # (B',)
            lengths = self._target_places(first_rows + sizes - 1) - starts  # (B,)
            longest = int(lengths.max())
            history = self._read(starts, lengths, longest)
            segment = np.repeat(np.arange(len(units)), sizes)  # (B',)
            ends = segment * longest + self._target_places(rows) - 1 - starts[segment]
            at = torch.from_numpy(ends).to(device, non_blocking=True)
        return SequenceBatch(
            history=torch.from_numpy(history.astype(np.int64)).to(device, non_blocking=True),
            lengths=torch.from_numpy(lengths).to(device, non_blocking=True),
            targets=self.targets[torch.from_numpy(rows)].to(device, torch.int64, non_blocking=True),
            rows=rows,
            at=at,
        )

    def _target_places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the targets of ``rows`` in ``items``."""
        return self.user_starts[self.users[rows]] + self.positions[rows]

    def _windows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts of the histories of ``rows`` in ``items``, and their lengths."""
        lengths = np.minimum(self.positions[rows].astype(np.int64), self.max_length)
        return self._target_places(rows) - lengths, lengths

    def _read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """Read slices of ``items``, padded on the right to ``width``; shape ``(B, width)``."""
        slots = np.arange(width)
        real = slots < lengths[:, None]
        padded = np.where(real, self.items[np.where(real, starts[:, None] + slots, 0)], self.n_items)
        return padded.astype(np.int32, copy=False)


class SeenItems:
    """Items that each row's user interacted with before the row's target, to exclude from a ranking.

    Args:
        rows: The rows. All items before a target count, including those before its history.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def pairs(self, rows: NDArray[np.int64], device: torch.device | str = "cpu") -> Pairs:
        """Seen items of ``rows`` as index pairs: indices into ``rows`` and item ids, one pair per interaction."""
        starts, counts = self._spans(rows)
        place = np.repeat(np.arange(len(rows)), counts)
        seen = self._rows.items[np.repeat(starts, counts) + _counting(counts)].astype(np.int64)
        return torch.from_numpy(place).to(device), torch.from_numpy(seen).to(device)

    def pairs_without_targets(self, rows: NDArray[np.int64], targets: Tensor) -> Pairs:
        """`pairs` without the rows' targets, shape ``(B,)``, on the device of ``targets``."""
        place, seen = self.pairs(rows, targets.device)
        others = seen != targets[place]
        return place[others], seen[others]

    def padded_without_targets(self, rows: NDArray[np.int64], targets: NDArray[np.int32]) -> NDArray[np.int64]:
        """Seen items of ``rows`` without their targets ``(B,)``; shape ``(B, S)``, with padding N at any position."""
        starts, counts = (each[:, None] for each in self._spans(rows))
        slots, n_items = np.arange(counts.max()), self._rows.n_items
        items = self._rows.items[np.where(slots < counts, starts + slots, 0)].astype(np.int64)
        return np.where((slots < counts) & (items != targets[:, None]), items, n_items)

    def mask(self, scores: Tensor, rows: NDArray[np.int64], targets: Tensor) -> Tensor:
        """Set the scores ``(B, N)`` of seen items to ``-inf``, except the target's own."""
        kept = scores.gather(1, targets.unsqueeze(1))
        masked = scores.index_put(self.pairs(rows, scores.device), scores.new_tensor(-torch.inf))
        return masked.scatter(1, targets.unsqueeze(1), kept)

    def _spans(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts of the user sequences of ``rows`` in ``items``, and the number of items before each target."""
        return self._rows.user_starts[self._rows.users[rows]], self._rows.positions[rows].astype(np.int64)


def _counting(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count 0, 1, ..., size-1 for each size, in one flat array: (2, 3) gives 0 1 0 1 2."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
