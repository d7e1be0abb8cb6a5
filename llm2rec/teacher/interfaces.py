"""What a teacher has to offer, whatever it is made of."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ITeacherRecommender"]


class ITeacherRecommender(ABC):
    """Ranks the whole catalogue for a history.

    Attributes:
        exclude_history: Whether the items of a history are out of the running.
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
        """Log-probabilities of each item coming next.

        Args:
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right.
            lengths: Items per history, shape ``(B,)``, at least 1.
            keep: One item a row that stays in the running even where the teacher leaves it out, since the history shows
                it; shape ``(B,)``.

        Returns:
            Shape ``(B, N)``, float32, nats. Each row's exponentials sum to 1 where the teacher chooses among items, and
            to less where it writes titles, since it could write anything else.
        """

    @abstractmethod
    def best_items(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int, gate_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The items most likely to come next.

        Args:
            history: As in `log_probs`.
            lengths: As in `log_probs`.
            k: How many, at most N.
            gate_inputs: What the gate reads, shape ``(B, d)``, where it is known already.

        Returns:
            Item ids, int64, and their log-probabilities, float32, both of shape ``(B, k)``, best first.
        """
