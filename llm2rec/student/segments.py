"""Training rows cut from the users' sequences, one by one or so that one causal pass answers many of them.

A row alone costs a pass over its whole history. But a causal model has, at every item it reads, the user vector of the
row whose history ends there; reading a piece of L items once answers up to L rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.data import RecData
from llm2rec.student.datamodule import SequenceBatch, TrainingData
from llm2rec.student.rows import RowPlaces

__all__ = ["SegmentData", "WindowData", "training_data"]


@dataclass(frozen=True)
class SegmentData:
    """The rows of a split in segments: pieces of a user's sequence of at most L items that are read in one pass.

    The first segment of a user reads up to L items and answers a row at each. Every later one begins with the last
    ``L - stride`` items of the one before, which it reads for context alone, and answers the next ``stride`` rows; so
    each row is answered exactly once, by a pass that has seen at least ``L - stride + 1`` items before its target, or
    all there are. Segments are offsets into the sequences; nothing is copied or padded before a batch is made.

    Attributes:
        places: Where the rows lie in the sequences.
        targets: Target items, shape ``(M,)``, int32.
        starts: Where each segment begins in the sequences, shape ``(S,)``, int64.
        first_rows: First row that each segment answers, shape ``(S,)``, int64.
        sizes: Rows that each segment answers, shape ``(S,)``, int64; they follow on the first.
        n_items: Number of items, N; also the padding id.
        max_length: Most items a segment holds, L.
    """

    places: RowPlaces
    targets: Tensor
    starts: NDArray[np.int64]
    first_rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    n_items: int
    max_length: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def units(self) -> NDArray[np.int64]:
        """Numbers of the segments, shape ``(S,)``: what an epoch shuffles."""
        return np.arange(len(self.sizes))

    @classmethod
    def of(
        cls, split: Dataset, sequences: Dataset, n_items: int, max_length: int, stride: int | None = None
    ) -> "SegmentData":
        """Cut the rows of a split of `llm2rec.data` into segments.

        Args:
            split: Training rows; those of a user follow each other in the order of time.
            sequences: Each user's whole sequence.
            n_items: Number of items, N.
            max_length: Most items a segment holds, L.
            stride: Rows that each segment of a user but the first answers, 1 to L; half of L if None.
        """
        stride = stride or -(-max_length // 2)
        places = RowPlaces.of(split, sequences)
        every = np.arange(len(places))
        users, positions = places.users[every].astype(np.int64), places.positions[every].astype(np.int64)

        follows = (np.diff(users) == 0) & (np.diff(positions) == 1)
        run_rows = np.concatenate([[0], np.flatnonzero(~follows) + 1])  # (R,): first row of each unbroken run
        run_sizes = np.diff(run_rows, append=len(users))
        # A run's first segment may reach further: it reads from the user's first item on as long as that fits.
        first_sizes = np.minimum(run_sizes, np.maximum(stride, max_length + 1 - positions[run_rows]))
        n_later = -(-(run_sizes - first_sizes) // stride)  # (R,)
        run = np.repeat(np.arange(len(run_rows)), n_later + 1)  # (S,): each segment's run
        nth = _counting(n_later + 1)  # (S,): 0, 1, ... within each run
        stops = np.minimum(first_sizes[run] + nth * stride, run_sizes[run])  # (S,): one past the last row, in its run
        begins = np.where(nth == 0, 0, first_sizes[run] + (nth - 1) * stride)
        # The last target is not read.
        starts, _ = places.before(run_rows[run] + stops - 1, max_length)
        targets = torch.from_numpy(places.items[places.targets(every)])
        return cls(places, targets, starts, run_rows[run] + begins, stops - begins, n_items, max_length)

    def batch(self, units: NDArray[np.int64], device: torch.device | str = "cpu") -> SequenceBatch:
        """Gather the segments ``units`` of shape ``(B,)``, as long as the longest of them, and the rows they answer."""
        sizes, starts = self.sizes[units], self.starts[units]
        rows = np.repeat(self.first_rows[units], sizes) + _counting(sizes)  # (B',)
        lengths = self.places.targets(self.first_rows[units] + sizes - 1) - starts  # (B,)
        longest = int(lengths.max())
        history = self.places.read(starts, lengths, longest, self.n_items)  # (B, longest)
        segment = np.repeat(np.arange(len(units)), sizes)  # (B',)
        at = segment * longest + self.places.targets(rows) - 1 - starts[segment]
        return SequenceBatch(
            history=torch.from_numpy(history.astype(np.int64)).to(device, non_blocking=True),
            lengths=torch.from_numpy(lengths).to(device, non_blocking=True),
            targets=self.targets[torch.from_numpy(rows)].to(device, torch.int64, non_blocking=True),
            rows=rows,
            at=torch.from_numpy(at).to(device, non_blocking=True),
        )

    def shown(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """What ``rows`` show: their last L items, padded, and their targets; shape ``(B, L + 1)``."""
        return _shown(self, rows)


@dataclass(frozen=True)
class WindowData:
    """The rows of a split, each with the items before its target, which are read when a batch is made.

    What `SequenceData` holds in memory is cut from the sequences here, 4 bytes a row being held.

    Attributes:
        places: Where the rows lie in the sequences.
        targets: Target items, shape ``(M,)``, int32.
        n_items: Number of items, N; also the padding id.
        max_length: Most items that are read, L.
    """

    places: RowPlaces
    targets: Tensor
    n_items: int
    max_length: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def units(self) -> NDArray[np.int64]:
        """Row numbers, shape ``(M,)``: what an epoch shuffles."""
        return np.arange(len(self))

    @property
    def sizes(self) -> None:
        """Each unit is one row."""

    @classmethod
    def of(cls, split: Dataset, sequences: Dataset, n_items: int, max_length: int) -> "WindowData":
        """Read the rows of a split of `llm2rec.data`; arguments as the attributes."""
        places = RowPlaces.of(split, sequences)
        targets = torch.from_numpy(places.items[places.targets(np.arange(len(places)))])
        return cls(places, targets, n_items, max_length)

    def batch(self, rows: NDArray[np.int64], device: torch.device | str = "cpu") -> SequenceBatch:
        """Gather ``rows`` of shape ``(B,)``."""
        starts, lengths = self.places.before(rows, self.max_length)
        history = self.places.read(starts, lengths, self.max_length, self.n_items)
        return SequenceBatch(
            history=torch.from_numpy(history.astype(np.int64)).to(device, non_blocking=True),
            lengths=torch.from_numpy(lengths).to(device, non_blocking=True),
            targets=self.targets[torch.from_numpy(rows)].to(device, torch.int64, non_blocking=True),
            rows=rows,
        )

    def shown(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """What ``rows`` show: their histories, padded, and their targets; shape ``(B, L + 1)``."""
        return _shown(self, rows)


def training_data(data: RecData, examples: str, max_length: int) -> TrainingData:
    """Read the training rows of a dataset for a student.

    Args:
        data: The dataset.
        examples: ``windows`` or ``sequences``; see `StudentSettings`.
        max_length: Longest history that the student reads.

    Raises:
        ConfigError: If that is longer than what it is trained and evaluated on.
    """
    if max_length > data.history_length:
        raise ConfigError(
            f"student.model.max_length is {max_length}, but histories of {data.name} end after {data.history_length} "
            "items, and what was served with longer ones would be what nothing was trained for; set "
            f"`dataset.history_length={max_length}`, which `student.model.max_length` follows by itself."
        )
    kind = WindowData if examples == "windows" else SegmentData
    return kind.of(data.splits["train"], data.sequences, data.n_items, max_length)


def _shown(data: SegmentData | WindowData, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    histories = data.places.read(*data.places.before(rows, data.max_length), data.max_length, data.n_items)
    return np.column_stack([histories, data.targets[torch.from_numpy(rows)].numpy()]).astype(np.int32)


def _counting(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count 0, 1, ..., size-1 for each size, in one flat array: (2, 3) gives 0 1 0 1 2."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
