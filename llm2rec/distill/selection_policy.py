"""Which training rows are distilled, and with what weight.

A policy answers once per epoch for all rows; the trainer multiplies each row's distillation losses by its weight. The
row's own task is always trained. A new policy is one class here or anywhere, named by ``_target_`` in ``conf/active``.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError

__all__ = ["SelectionPolicy", "SelectionPolicyAll", "SelectionPolicyRandom"]


class SelectionPolicy(ABC):
    """Chooses and weighs rows for distillation."""

    @abstractmethod
    def weights(self, n_rows: int, epoch: int) -> NDArray[np.float32]:
        """Weigh the training rows for one epoch.

        A pure function of its arguments, so that every process and a resumed run get the same answer.

        Args:
            n_rows: Number of training rows, M.
            epoch: Epoch, from 0.

        Returns:
            Weights of shape ``(M,)``, 0 for rows that are not distilled.
        """


class SelectionPolicyAll(SelectionPolicy):
    """Every row counts fully: DLLM2Rec as published."""

    def weights(self, n_rows: int, epoch: int) -> NDArray[np.float32]:
        """Weigh all rows 1."""
        return np.ones(n_rows, np.float32)


class SelectionPolicyRandom(SelectionPolicy):
    """A fixed random part of the rows: what any cleverer policy has to beat at the same budget.

    Args:
        budget: Part of the rows that is distilled, above 0 up to 1.
        seed: Seed of the choice.
    """

    def __init__(self, budget: float, seed: int) -> None:
        if not 0 < budget <= 1:
            raise ConfigError(f"active.budget is {budget}, expected a part of the rows above 0 and up to 1.")
        self.budget, self.seed = budget, seed

    def weights(self, n_rows: int, epoch: int) -> NDArray[np.float32]:
        """Weigh the chosen rows 1 and the others 0; the choice is the same in every epoch."""
        weights = np.zeros(n_rows, np.float32)
        n_chosen = max(1, round(self.budget * n_rows))
        weights[np.random.default_rng([self.seed, n_rows]).permutation(n_rows)[:n_chosen]] = 1
        return weights
