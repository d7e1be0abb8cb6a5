"""Sampled negatives as functions of seed, epoch and row, or of seed and step, and of nothing else."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import derived_seed

__all__ = ["Negatives", "Proposal"]


class Proposal:
    """A distribution over the catalogue to draw from.

    Args:
        n_items: Number of items, N.
        targets: Targets of all training rows, shape ``(M,)``, to draw item j as often as ``c_j + 1`` says, where c_j
            counts it; None draws uniformly.
    """

    def __init__(self, n_items: int, targets: Tensor | None = None) -> None:
        self.n_items, self._cumulated = n_items, None
        self._log_probability = torch.full((1,), -np.log(n_items), dtype=torch.float32)
        if targets is not None:
            counts = np.bincount(targets.numpy(), minlength=n_items) + 1
            self._cumulated = np.cumsum(counts / counts.sum())
            self._log_probability = torch.from_numpy(np.log(counts / counts.sum())).float()

    def at(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Turn numbers in [0, 1) into items."""
        if self._cumulated is None:
            return (uniform * self.n_items).astype(np.int64)
        found = np.searchsorted(self._cumulated, uniform, side="right")
        return np.minimum(found, self.n_items - 1)  # the last sum may round to less than 1

    def log_probability(self, items: Tensor) -> Tensor:
        """``log q_j`` of items of any shape, on their device."""
        table = self._log_probability.to(items.device)
        return table.expand_as(items) if self._cumulated is None else table[items]


class Negatives:
    """K items per row or per step, drawn with replacement; the target may be among them by accident.

    Any other item may be drawn, those of the row's history too: the same items compete as in the cross-entropy over
    the whole catalogue. How rows are divided among batches, processes and parts of a run changes no row's negatives.

    Args:
        proposal: What to draw from.
        n_negatives: K.
        shared: Whether all rows of an optimizer step have the same; else each has its own.
        seed: Seed of the run.

    Raises:
        ConfigError: If K is not smaller than the catalogue.
    """

    def __init__(self, proposal: Proposal, n_negatives: int, shared: bool, seed: int) -> None:
        if n_negatives >= proposal.n_items:
            raise ConfigError(
                f"student.loss.n_negatives is {n_negatives}, expected fewer than the catalogue's {proposal.n_items} "
                "items; lower it, or use student.loss.name=cross_entropy, which then costs no more."
            )
        self.proposal, self.n_negatives, self.shared, self._seed = proposal, n_negatives, shared, seed

    def draw(self, rows: NDArray[np.int64], epoch: int, step: int) -> Tensor:
        """Draw for ``rows`` (shape ``(B,)``) in an epoch and global step.

        Returns:
            Item ids, int64, of shape ``(K,)`` if they are shared, else ``(B, K)``.
        """
        each = np.arange(self.n_negatives, dtype=np.uint64)
        if self.shared:
            uniform = _uniform(derived_seed(self._seed, "negatives of a step", step), each)
        else:
            counters = rows.astype(np.uint64)[:, None] * np.uint64(self.n_negatives) + each
            uniform = _uniform(derived_seed(self._seed, "negatives of rows", epoch), counters)
        return torch.from_numpy(self.proposal.at(uniform))


def _uniform(key: int, counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), each a function of key and counter: SplitMix64 (Steele, Lea and Flood, 2014) at any place."""
    x = (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
