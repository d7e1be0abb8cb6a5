"""What a teacher has to offer, whatever it is made of."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ITeacherRecommender"]


class ITeacherRecommender(ABC):
    """Ranks the whole catalogue for a history."""

    @property
    @abstractmethod
    def item_vectors(self) -> Tensor:
        """Item vectors, shape ``(N, d_teacher)``; row = item id."""

    @abstractmethod
    def log_probs(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Log-probabilities of each item coming next.

        Args:
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right.
            lengths: Items per history, shape ``(B,)``, at least 1.

        Returns:
            Shape ``(B, N)``, float32, nats; each row's exponentials sum to 1.
        """
