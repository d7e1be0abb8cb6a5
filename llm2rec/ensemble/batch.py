"""Rows of a split as members of an ensemble read them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.data import RecData
from llm2rec.student.datamodule import Rows

__all__ = ["EnsembleBatch", "SplitRows"]


@dataclass(frozen=True)
class EnsembleBatch:
    """B rows of a split.

    Attributes:
        history: Item ids, shape ``(B, L)``, int64, oldest first, padded on the right with N.
        lengths: Items per history, shape ``(B,)``, int64.
        targets: Target items, shape ``(B,)``, int64.
        rows: Row numbers in the split, shape ``(B,)``.
        split: ``train``, ``validation`` or ``test``.
        n_items: Number of items, N.
        users: Users of training rows, shape ``(B,)``, whose own sequences members must not use; None for other splits.
    """

    history: Tensor
    lengths: Tensor
    targets: Tensor
    rows: NDArray[np.int64]
    split: str
    n_items: int
    users: NDArray[np.int64] | None = None

    def recent(self, length: int) -> tuple[Tensor, Tensor]:
        """The last ``length`` items of each history.

        Returns:
            Item ids, shape ``(B, length)``, padded on the right with N, and lengths, shape ``(B,)``.
        """
        kept = self.lengths.clamp(max=length)
        slots = torch.arange(length, device=self.history.device)
        places = ((self.lengths - kept).unsqueeze(1) + slots).clamp(max=self.history.shape[1] - 1)  # (B, length)
        return torch.where(slots < kept.unsqueeze(1), self.history.gather(1, places), self.n_items), kept


class SplitRows:
    """Rows of a split with histories of any length, even longer than the dataset's.

    Args:
        data: The dataset.
        split: ``train``, ``validation`` or ``test``.
        max_length: Maximum history length, L.

    Attributes:
        rows: The rows.
        split: Name of the split.
    """

    def __init__(self, data: RecData, split: str, max_length: int) -> None:
        self.rows = Rows.from_tables(data.splits[split], data.sequences, data.n_items, max_length)
        self.split = split

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: NDArray[np.int64], device: torch.device | str = "cpu") -> EnsembleBatch:
        """Collate the rows with these numbers, shape ``(B,)``."""
        batch = self.rows.batch(numbers, device)
        users = self.rows.users[numbers].astype(np.int64) if self.split == "train" else None
        return EnsembleBatch(batch.history, batch.lengths, batch.targets, numbers, self.split, self.rows.n_items, users)
