"""Interface of all teachers."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ITeacherRecommender"]


class ITeacherRecommender(ABC):
    """Ranks the whole catalogue for a history.

    Attributes:
        exclude_history: Whether the items of a history are excluded from its ranking.
    """

    exclude_history: bool

    @property
    @abstractmethod
    def item_vectors(self) -> Tensor:
        """Item vectors, shape ``(N, d_teacher)``; row = item id."""

    @abstractmethod
    def log_probs(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], keep: NDArray[np.int32] | None = None
    ) -> Tensor:
        """Log-probabilities of each item being the next one.

        Args:
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right.
            lengths: Items per history, shape ``(B,)``, at least 1.
            keep: One item per row that is not excluded even if it is in the history, shape ``(B,)``.

        Returns:
            Shape ``(B, N)``, float32, nats. Each row's exponentials sum to 1 for a teacher that scores items, and to
            less for one that writes titles, since other texts have probability too.
        """

    @abstractmethod
    def best_items(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int, gate_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The most probable next items.

        Args:
            history: As in `log_probs`.
            lengths: As in `log_probs`.
            k: Number of items, at most N.
            gate_inputs: Gate inputs, if already known, shape ``(B, d)``.

        Returns:
            Item ids, int64, and their log-probabilities, float32, both of shape ``(B, k)``, best first.
        """
