"""Prepared examples as tensors: padded histories, lengths and targets."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.ranking import Pairs
from llm2rec.core.seed import derived_seed
from llm2rec.data.columns import Numbers
from llm2rec.student.rows import RowPlaces
from llm2rec.student.unshown import UnshownItems

__all__ = ["NegativeSampler", "SeenItems", "SequenceBatch", "SequenceData", "TrainingData"]


@dataclass(frozen=True)
class SequenceBatch:
    """Some rows of a split: B' of them, in B sequences; each row is a sequence of its own unless ``at`` is there.

    Attributes:
        history: Item ids, shape ``(B, L)``, int64, oldest first, padded on the right with ``n_items``.
        lengths: Real items per sequence, shape ``(B,)``, int64.
        targets: Target items, shape ``(B',)``, int64.
        rows: Row numbers in the split, shape ``(B',)``, int64.
        at: Where each row's history ends in the flattened ``history``, shape ``(B',)``, int64; None where row b is
            sequence b and ends where it ends.
    """

    history: Tensor
    lengths: Tensor
    targets: Tensor
    rows: NDArray[np.int64]
    at: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a student's ``forward`` takes to give one user vector per row."""
        return (self.history, self.lengths) if self.at is None else (self.history, self.lengths, self.at)


@dataclass(frozen=True)
class SequenceData:
    """One split in memory: 4 bytes per history slot and no Python object per row.

    Attributes:
        history: Shape ``(M, L)``, int32, padded on the right with ``n_items``.
        lengths: Shape ``(M,)``, int32.
        targets: Shape ``(M,)``, int32.
        n_items: Number of items, N; also the padding id.
    """

    history: Tensor
    lengths: Tensor
    targets: Tensor
    n_items: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def max_length(self) -> int:
        """Longest history, L."""
        return self.history.shape[1]

    @property
    def units(self) -> NDArray[np.int64]:
        """Row numbers, shape ``(M,)``: what an epoch shuffles."""
        return np.arange(len(self))

    @property
    def sizes(self) -> None:
        """Each unit is one row."""

    @classmethod
    def of(cls, split: Dataset, n_items: int, max_length: int) -> "SequenceData":
        """Read a split of `llm2rec.data`; histories longer than ``max_length`` keep their most recent items."""
        table = split.with_format("arrow")[:]
        histories = table.column("history").combine_chunks()
        offsets = histories.offsets.to_numpy().astype(np.int64)
        values = histories.values.to_numpy()
        lengths = np.minimum(np.diff(offsets), max_length)
        slots = np.arange(max_length)
        real = slots < lengths[:, None]  # (M, L)
        source = np.where(real, (offsets[1:] - lengths)[:, None] + slots, 0)
        history = np.where(real, values[source], n_items).astype(np.int32)
        targets = table.column("target").combine_chunks().to_numpy().astype(np.int32)
        return cls(
            torch.from_numpy(history), torch.from_numpy(lengths.astype(np.int32)), torch.from_numpy(targets), n_items
        )

    def batch(self, rows: NDArray[np.int64], device: torch.device | str = "cpu") -> SequenceBatch:
        """Gather ``rows`` of shape ``(B,)``."""
        index = torch.from_numpy(rows)
        return SequenceBatch(
            history=self.history[index].to(device, torch.int64, non_blocking=True),
            lengths=self.lengths[index].to(device, torch.int64, non_blocking=True),
            targets=self.targets[index].to(device, torch.int64, non_blocking=True),
            rows=rows,
        )

    def shown(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """What ``rows`` show: their histories, padded, and their targets; shape ``(B, L + 1)``."""
        index = torch.from_numpy(rows)
        return torch.cat([self.history[index], self.targets[index].unsqueeze(1)], dim=1).numpy()


class TrainingData(Protocol):
    """What a student trains on, however its rows are divided into units that one forward pass takes whole.

    Row numbers are those of the training split, so what others say of rows, such as a teacher, is found by the
    ``rows`` of a batch.
    """

    def __len__(self) -> int:
        """Rows, M; not units."""

    @property
    def n_items(self) -> int:
        """Number of items, N; also the padding id."""

    @property
    def targets(self) -> Tensor:
        """Target items, shape ``(M,)``, int32."""

    @property
    def max_length(self) -> int:
        """Longest history, L."""

    @property
    def units(self) -> NDArray[np.int64]:
        """Numbers of the units, which an epoch shuffles."""

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Rows of each unit; None means 1 each."""

    def batch(self, units: NDArray[np.int64], device: torch.device | str = "cpu") -> SequenceBatch:
        """Gather the rows of ``units``, in their order."""

    def shown(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """What ``rows`` show: their histories, padded, and their targets; shape ``(B, L + 1)``."""


@dataclass(frozen=True)
class SeenItems:
    """What each row's user had interacted with before the row's target, to take out of a ranking.

    Attributes:
        items: All users' sequences, one after the other, shape ``(interactions,)``.
        starts: Where each row's user begins in ``items``, shape ``(M,)``.
        counts: Interactions of the user before the row's target, shape ``(M,)``.
    """

    items: Numbers
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, split: Dataset, sequences: Dataset) -> "SeenItems":
        """Read a split and the sequences of `llm2rec.data`."""
        places = RowPlaces.of(split, sequences)
        rows = np.arange(len(places))
        return cls(places.items, places.starts(rows), places.positions[rows].astype(np.int64))

    def pairs(self, rows: NDArray[np.int64], device: torch.device | str = "cpu") -> Pairs:
        """What each of some rows had seen: places in ``rows`` and item ids, a pair for every interaction."""
        counts = self.counts[rows]
        place = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        seen = self.items[np.repeat(self.starts[rows], counts) + within].astype(np.int64)
        return torch.from_numpy(place).to(device), torch.from_numpy(seen).to(device)

    def besides(self, rows: NDArray[np.int64], targets: Tensor) -> Pairs:
        """`pairs` without the rows' targets, shape ``(B,)``, on whose device they are."""
        place, seen = self.pairs(rows, targets.device)
        others = seen != targets[place]
        return place[others], seen[others]

    def mask(self, scores: Tensor, rows: NDArray[np.int64], targets: Tensor) -> Tensor:
        """Set the scores ``(B, N)`` of items seen before to ``-inf``, except the target's own."""
        own = scores.gather(1, targets.unsqueeze(1))
        masked = scores.index_put(self.pairs(rows, scores.device), scores.new_tensor(-torch.inf))
        return masked.scatter(1, targets.unsqueeze(1), own)


class NegativeSampler:
    """One item per row and epoch that the row shows nowhere: neither in its history nor as its target.

    Uniform over those items, as in the released DLLM2Rec program. A negative is a function of seed, epoch and example,
    so neither batches, processes nor a resumed run change it.

    Args:
        data: Training rows.
        seed: Seed of the run.

    Raises:
        ConfigError: If a row could show the whole catalogue.
    """

    def __init__(self, data: TrainingData, seed: int) -> None:
        shown = data.max_length + 1
        if data.n_items <= shown:
            raise ConfigError(
                f"the catalogue has {data.n_items} items and a row may show {shown} of them, so that no negative may "
                "be left; shorten histories with `dataset.history_length`, or use a loss without negatives."
            )
        self._data, self._seed = data, seed
        self._epoch, self._uniform = -1, np.empty(0)

    def draw(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Draw the negatives of ``rows`` (shape ``(B,)``) for ``epoch``; returns item ids of shape ``(B,)``, int64."""
        if epoch != self._epoch:
            generator = np.random.default_rng(derived_seed(self._seed, "negatives", epoch))
            self._epoch, self._uniform = epoch, generator.random(len(self._data))
        shown = self._data.shown(rows)  # (B, L + 1), the target last
        unshown = UnshownItems(shown[:, :-1], shown[:, -1], self._data.n_items)
        nth = np.minimum((self._uniform[rows] * unshown.counts).astype(np.int64), unshown.counts - 1)
        return torch.from_numpy(unshown.nth(nth[:, None])[:, 0])
