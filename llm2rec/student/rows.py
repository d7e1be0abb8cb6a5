"""Where the rows of a split lie in the users' sequences."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from llm2rec.data.columns import Numbers, column_numbers, list_lengths

__all__ = ["RowPlaces"]


@dataclass(frozen=True)
class RowPlaces:
    """Targets as places in the users' sequences, so that no history has to be held for a row.

    What is as long as rows or interactions stays on disk; 8 bytes a user are held.

    Attributes:
        items: All users' sequences, one after the other, ``(interactions,)``.
        users: Each row's user, ``(M,)``.
        positions: Each row's target in its user's sequence, ``(M,)``.
        user_starts: Where each user begins in ``items``, ``(users,)``.
    """

    items: Numbers
    users: Numbers
    positions: Numbers
    user_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def of(cls, split: Dataset, sequences: Dataset) -> "RowPlaces":
        """Find the rows of a split of `llm2rec.data` in its sequences."""
        lengths = list_lengths(sequences, "items")
        return cls(
            column_numbers(sequences, "items"),
            column_numbers(split, "user_index"),
            column_numbers(split, "position"),
            np.cumsum(lengths) - lengths,
        )

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the users of some rows begin in ``items``."""
        return self.user_starts[self.users[rows]]

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the targets of some rows lie in ``items``."""
        return self.starts(rows) + self.positions[rows]

    def before(self, rows: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the last ``most`` items before the targets of some rows begin in ``items``, and how many there are."""
        positions = self.positions[rows].astype(np.int64)
        lengths = np.minimum(positions, most)
        return self.starts(rows) + positions - lengths, lengths

    def read(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int, padding: int
    ) -> NDArray[np.integer]:
        """Read stretches of ``items``, padded on the right to ``width``; shape ``(B, width)``."""
        slots = np.arange(width)
        real = slots < lengths[:, None]
        return np.where(real, self.items[np.where(real, starts[:, None] + slots, 0)], padding)
