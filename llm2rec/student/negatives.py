"""Random items for training rows: sampled negatives, and the candidates that a target is ranked among.

Draws are functions of seed, epoch and row (or seed and step): neither batches, processes nor a resumed run change them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import derived_seed, random_words
from llm2rec.student.datamodule import Rows

__all__ = ["CandidateSampler", "NegativeSampler", "Negatives", "Proposal", "UnshownItems"]


class Proposal:
    """A distribution over the catalogue to draw from.

    Args:
        n_items: Number of items, N.
        targets: Targets of all training rows, shape ``(M,)``, to draw item j with probability proportional to
            ``c_j + 1``, where c_j counts it; None draws uniformly.
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
    """K items per row or per step, drawn with replacement from the whole catalogue.

    The target and items of the row's history may be drawn too: the same items compete as in the cross-entropy over the
    whole catalogue.

    Args:
        proposal: What to draw from.
        n_negatives: K.
        shared: Whether all rows of an optimizer step share the same items; else each row has its own.
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
        counters = np.arange(self.n_negatives, dtype=np.uint64)
        if self.shared:
            key = derived_seed(self._seed, "negatives of a step", step)
        else:
            key = derived_seed(self._seed, "negatives of rows", epoch)
            counters = rows.astype(np.uint64)[:, None] * np.uint64(self.n_negatives) + counters
        uniform = (random_words(np.uint64(key), counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return torch.from_numpy(self.proposal.at(uniform))


class UnshownItems:
    """The items that a row shows neither in its history nor as its target; memory does not grow with the catalogue.

    Args:
        history: Items shown, shape ``(B, L)``, in any order and number, padded with N.
        targets: One more item that each row shows, shape ``(B,)``.
        n_items: Items of the catalogue, N.

    Attributes:
        counts: Items that each row does not show, shape ``(B,)``, int64.
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
        """Items by their number among the unshown ones in the order of ids, from 0; ``(B, K)``, below `counts`.

        The n-th comes after every shown item with at most n unshown ones before it.
        """
        row = np.arange(len(numbers))[:, None]
        # One search for all rows: each row's counts, at most N, lie in a stretch of their own.
        ends = (self._before + row * (self._n_items + 1)).ravel()
        found: NDArray[np.int64] = np.searchsorted(ends, numbers + row * (self._n_items + 1), side="right")
        return numbers + found - row * self._before.shape[1]


class NegativeSampler:
    """One item per row and epoch, uniform over the items that the row does not show (as in the released DLLM2Rec).

    Args:
        data: Training rows.
        seed: Seed of the run.

    Raises:
        ConfigError: If a row could show the whole catalogue.
    """

    def __init__(self, data: Rows, seed: int) -> None:
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


class CandidateSampler:
    """Each row's target among items that the row does not show, in a random order.

    The others are drawn without replacement, uniformly over the catalogue less the row's history and target; the target
    is among the candidates even if the history holds it too. The order is uniform, so the target's place reveals
    nothing. The iLoRA paper (arXiv 2408.10159) ranks the answer among 20 others, its released program among 19.

    Args:
        data: The split's rows. Samplers that should draw the same candidates need the same history length.
        seed: Seed of the candidates.
        n_candidates: Items per row, C, the target included; at least 2.
        split: Name of the split, so that row r of one does not draw what row r of another draws.

    Raises:
        ConfigError: If there are fewer than 2 candidates, or a row may leave too few items to draw from.
    """

    def __init__(self, data: Rows, seed: int, n_candidates: int = 20, *, split: str) -> None:
        if n_candidates < 2:
            raise ConfigError(f"`n_candidates` is {n_candidates}, expected at least 2: the target and one other item.")
        shown = int(data.lengths.max(initial=0)) + 1
        left = data.n_items - shown
        if left < n_candidates - 1:
            raise ConfigError(
                f"`n_candidates` is {n_candidates}, but a row may show {shown} of the catalogue's {data.n_items} "
                f"items, which leaves {left} for the {n_candidates - 1} beside the target; ask for at most {left + 1} "
                "candidates, or shorten histories with `dataset.history_length`."
            )
        self._data, self._seed, self._split, self.n_candidates = data, seed, split, n_candidates

    def draw(self, rows: NDArray[np.int64], epoch: int | None = None) -> NDArray[np.int64]:
        """Draw the candidates of some rows; memory grows with their number, not with the catalogue.

        Args:
            rows: Row numbers in the split, shape ``(B,)``.
            epoch: Draws anew for each epoch; None for evaluation, whose candidates never change.

        Returns:
            Item ids of shape ``(B, C)``; each row holds its target once, at a random place.
        """
        n_others = self.n_candidates - 1
        key = derived_seed(self._seed, "candidates", self._split, "stable" if epoch is None else epoch)
        streams = random_words(np.uint64(key), rows.astype(np.uint64))[:, None]
        words = random_words(streams, np.arange(n_others + self.n_candidates, dtype=np.uint64))
        shown = self._data.shown(rows)  # (B, L + 1), the target last
        unshown = UnshownItems(shown[:, :-1], shown[:, -1], self._data.n_items)
        others = unshown.nth(_subsets(words[:, :n_others], unshown.counts))
        candidates = np.column_stack([shown[:, -1], others])
        order = np.argsort(words[:, n_others:], axis=1, kind="stable")
        return np.take_along_axis(candidates, order, axis=1)


def _subsets(words: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """A uniform subset of ``range(size)`` for each row, by Floyd's algorithm (Bentley, CACM 30(9), 1987).

    It takes exactly one word for each member, whatever the size; a modulus favours small numbers by 2**-64 * size only.

    Args:
        words: Uniform words, shape ``(B, K)``.
        sizes: Shape ``(B,)``, each at least K.

    Returns:
        Distinct numbers of shape ``(B, K)``, in an order that is not uniform.
    """
    n_members = words.shape[1]
    members = np.empty(words.shape, np.int64)
    for column in range(n_members):
        last = sizes - n_members + column  # (B,)
        drawn = (words[:, column] % (last + 1).astype(np.uint64)).astype(np.int64)
        taken = (members[:, :column] == drawn[:, None]).any(axis=1)
        members[:, column] = np.where(taken, last, drawn)
    return members
