"""The items that a row shows neither in its history nor as its target: what negatives and candidates are drawn from."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["UnshownItems"]


class UnshownItems:
    """Counts, for each of some rows, through the items that it does not show; memory does not grow with the catalogue.

    Args:
        history: Items shown, shape ``(B, L)``, in any order and number, padded with N.
        targets: One item more that each row shows, shape ``(B,)``.
        n_items: Items of the catalogue, N.

    Attributes:
        counts: How many items each row does not show, shape ``(B,)``, int64.
    """

    def __init__(self, history: NDArray[np.int32], targets: NDArray[np.int32], n_items: int) -> None:
        shown = np.sort(np.column_stack([history, targets]).astype(np.int64), axis=1)
        shown[:, 1:][shown[:, 1:] == shown[:, :-1]] = n_items  # each item once
        shown.sort(axis=1)
        real = shown < n_items
        self.counts = n_items - real.sum(axis=1)
        # For each shown item, how many before it are not shown: rising, with N for padding and repetitions.
        self._before = np.where(real, shown - np.arange(shown.shape[1]), n_items)
        self._n_items = n_items

    def nth(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items that ``numbers``, shape ``(B, K)``, below `counts`, count from 0 in the order of their ids.

        The n-th comes after every shown item with at most n unshown ones before it.
        """
        row = np.arange(len(numbers))[:, None]
        # One search for all rows: each row's counts, at most N, lie in a stretch of their own.
        ends = (self._before + row * (self._n_items + 1)).ravel()
        found: NDArray[np.int64] = np.searchsorted(ends, numbers + row * (self._n_items + 1), side="right")
        return numbers + found - row * self._before.shape[1]
