"""Item neighbours: what followed what, counted; the simplest recommender that knows other users, and hard to beat.

The score of item x after a history is a sum over the history, ``Σ_j 0.6^j · near(h_j, x)`` with j = 0 for the most
recent item, and ``near(a, x)`` counts how often x came up to five steps after a (a weight of 0.7 a step, half of that
for x before a), over ``sqrt((c_a + 100)(c_x + 100))`` with the counts c of both: nearness that few observations speak
for is kept small. The numbers are of a first look at validation rows of Amazon games, where this alone ranked better
than a tuned SASRec.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Neighbours"]

STEPS, DECAY, BACKWARDS, FORGETTING, SHRINKAGE = 5, 0.7, 0.5, 0.6, 100.0


class Neighbours:
    """Nearness of all pairs of items.

    Args:
        sequences: Items of each user, oldest first, without what is held out.
        n_items: Number of items, N.
    """

    def __init__(self, sequences: list[NDArray[np.int64]], n_items: int) -> None:
        counts = np.bincount(np.concatenate(sequences), minlength=n_items)
        self._sequences, self._n_items = sequences, n_items
        self._scale = 1 / np.sqrt(counts + SHRINKAGE)  # (N,)
        first, second, weight = (np.concatenate(parts) for parts in zip(*map(_pairs, sequences), strict=True))
        values = torch.from_numpy(weight * self._scale[first] * self._scale[second]).float()
        places = torch.from_numpy(np.stack([second, first]))
        near = torch.sparse_coo_tensor(places, values, (n_items, n_items), check_invariants=True)
        self._near = near.coalesce()

    def scores(self, histories: list[NDArray[np.int64]], users: NDArray[np.int64] | None = None) -> Tensor:
        """Score the catalogue after some histories.

        Args:
            histories: Items, oldest first, B of them.
            users: Whose they are, shape ``(B,)``: what these users' own sequences added to the counts is taken out of
                their scores, for rows that were counted. None for rows that were not.

        Returns:
            Shape ``(B, N)``, 0 or more.
        """
        weights = torch.zeros(self._n_items, len(histories))
        for row, history in enumerate(histories):
            for age, item in enumerate(history[::-1].tolist()):
                weights[item, row] += FORGETTING**age
        scores = (self._near @ weights).T.contiguous()  # (B, N)
        if users is not None:
            for row, (items, own) in enumerate(self._own(histories, users)):
                scores[row].index_add_(0, torch.from_numpy(items), torch.from_numpy(-own).float())
        return scores.clamp_(min=1e-9).sub_(1e-9)  # what is taken out again leaves rounding errors

    def _own(
        self, histories: list[NDArray[np.int64]], users: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Items of each row's user, and what the user's own sequence added to their scores."""
        for history, user in zip(histories, users.tolist(), strict=True):
            first, second, weight = _pairs(self._sequences[user])
            importance = np.zeros(len(first))
            for age, item in enumerate(history[::-1].tolist()):
                importance[first == item] += FORGETTING**age
            yield second, importance * weight * self._scale[first] * self._scale[second]


def _pairs(sequence: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of items that are near in a sequence: of which, to which, and how much it counts."""
    first, second, weight = [], [], []
    for distance in range(1, min(STEPS, len(sequence) - 1) + 1):
        earlier, later, value = sequence[:-distance], sequence[distance:], DECAY ** (distance - 1)
        first += [earlier, later]
        second += [later, earlier]
        weight += [np.full(len(earlier), value), np.full(len(earlier), value * BACKWARDS)]
    if not first:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    return np.concatenate(first), np.concatenate(second), np.concatenate(weight)
