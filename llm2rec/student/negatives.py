"""Random items for rows: sampled negatives, and candidates for ranking a target.

Draws depend only on seed, epoch and row (or seed and step), not on batches, processes or resuming.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import derived_seed, random_words
from llm2rec.student.datamodule import Rows

__all__ = ["CandidateSampler", "NegativeSampler", "Negatives", "Proposal", "UnseenItems"]


class Proposal:
    """Proposal distribution over the catalogue.

    Args:
        n_items: Number of items, N.
        targets: Targets of all training rows, shape ``(M,)``: item j has probability proportional to ``c_j + 1``, where
            c_j is its count; None is uniform.
    """

    def __init__(self, n_items: int, targets: Tensor | None = None) -> None:
        self.n_items, self._cumulated = n_items, None
        self._log_probability = torch.full((1,), -np.log(n_items), dtype=torch.float32)
        if targets is not None:
            counts = np.bincount(targets.numpy(), minlength=n_items) + 1
            self._cumulated = np.cumsum(counts / counts.sum())
            self._log_probability = torch.from_numpy(np.log(counts / counts.sum())).float()

    def at(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Map uniform numbers in [0, 1) to items."""
        if self._cumulated is None:
            return (uniform * self.n_items).astype(np.int64)
        items = np.searchsorted(self._cumulated, uniform, side="right")
        return np.minimum(items, self.n_items - 1)  # the last sum may round to less than 1

    def log_probability(self, items: Tensor) -> Tensor:
        """``log q_j`` of items of any shape, on their device."""
        table = self._log_probability.to(items.device)
        return table.expand_as(items) if self._cumulated is None else table[items]


class Negatives:
    """K items per row or per step, drawn with replacement from the whole catalogue.

    The target and items of the row's history may be drawn too, as in the cross-entropy over the whole catalogue.

    Args:
        proposal: Distribution to draw from.
        n_negatives: K.
        shared: Whether all rows of an optimizer step share the same items.
        seed: Seed of the run.

    Raises:
        ConfigError: If K is not smaller than the catalogue.
    """

    def __init__(self, proposal: Proposal, n_negatives: int, shared: bool, seed: int) -> None:
        if n_negatives >= proposal.n_items:
            raise ConfigError(
                f"student.loss.n_negatives is {n_negatives}, expected fewer than the catalogue's {proposal.n_items} "
                "items; lower it, or use student.loss.name=cross_entropy."
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


class UnseenItems:
    """Items outside a row's history and target; memory does not grow with the catalogue.

    Args:
        history: Item ids, shape ``(B, L)``, in any order, with repetitions, padded with N.
        targets: Targets, shape ``(B,)``.
        n_items: Number of items, N.

    Attributes:
        counts: Number of unseen items of each row, shape ``(B,)``, int64.
    """

    def __init__(self, history: NDArray[np.int32], targets: NDArray[np.int32], n_items: int) -> None:
        seen = np.sort(np.column_stack([history, targets]).astype(np.int64), axis=1)
        seen[:, 1:][seen[:, 1:] == seen[:, :-1]] = n_items  # each item once
        seen.sort(axis=1)
        real = seen < n_items
        self.counts = n_items - real.sum(axis=1)
        # Number of unseen items before each seen item: ascending, with N for padding and repetitions.
        self._before = np.where(real, seen - np.arange(seen.shape[1]), n_items)
        self._n_items = n_items

    def nth(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the n-th unseen items in the order of ids, from 0.

        The n-th unseen item follows every seen item with at most n unseen items before it.

        Args:
            numbers: n, shape ``(B, K)``, each below `counts`.

        Returns:
            Item ids of shape ``(B, K)``.
        """
        row = np.arange(len(numbers))[:, None]
        # One search for all rows: offsets of N + 1 keep the counts of different rows apart.
        ends = (self._before + row * (self._n_items + 1)).ravel()
        n_seen: NDArray[np.int64] = np.searchsorted(ends, numbers + row * (self._n_items + 1), side="right")
        return numbers + n_seen - row * self._before.shape[1]


class NegativeSampler:
    """One negative per row and epoch, uniform over the row's unseen items (as in the released DLLM2Rec program).

    Args:
        data: Training rows.
        seed: Seed of the run.

    Raises:
        ConfigError: If history and target may cover the whole catalogue.
    """

    def __init__(self, data: Rows, seed: int) -> None:
        most_seen = data.max_length + 1
        if data.n_items <= most_seen:
            raise ConfigError(
                f"the catalogue has {data.n_items} items, but history and target of a row may contain {most_seen} "
                "items, which leaves no negative; lower `dataset.history_length`, or use a loss without negatives."
            )
        self._data, self._seed = data, seed
        self._epoch, self._uniform = -1, np.empty(0)

    def draw(self, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Draw the negatives of ``rows`` (shape ``(B,)``) for ``epoch``; returns item ids of shape ``(B,)``, int64."""
        if epoch != self._epoch:
            generator = np.random.default_rng(derived_seed(self._seed, "negatives", epoch))
            self._epoch, self._uniform = epoch, generator.random(len(self._data))
        seen = self._data.histories_and_targets(rows)  # (B, L + 1), the target last
        unseen = UnseenItems(seen[:, :-1], seen[:, -1], self._data.n_items)
        nth = np.minimum((self._uniform[rows] * unseen.counts).astype(np.int64), unseen.counts - 1)
        return torch.from_numpy(unseen.nth(nth[:, None])[:, 0])


class CandidateSampler:
    """Candidates of each row: its target and unseen items, in random order.

    The other candidates are drawn without replacement, uniformly over the catalogue without the row's history and
    target; the target is a candidate even if the history contains it. The order is uniform, so the position of the
    target carries no information. The iLoRA paper (arXiv 2408.10159) uses 20 other candidates, its released program 19.

    Args:
        data: The split's rows. Samplers that should draw the same candidates need the same history length.
        seed: Seed of the candidates.
        n_candidates: Candidates per row, C, including the target; at least 2.
        split: Name of the split; the same row number draws different candidates in different splits.

    Raises:
        ConfigError: If there are fewer than 2 candidates, or a row may have too few unseen items.
    """

    def __init__(self, data: Rows, seed: int, n_candidates: int = 20, *, split: str) -> None:
        if n_candidates < 2:
            raise ConfigError(f"`n_candidates` is {n_candidates}, expected at least 2: the target and one other item.")
        most_seen = int(data.lengths.max(initial=0)) + 1
        fewest_unseen = data.n_items - most_seen
        if fewest_unseen < n_candidates - 1:
            raise ConfigError(
                f"`n_candidates` is {n_candidates}, but a row may have only {fewest_unseen} unseen items of the "
                f"catalogue's {data.n_items}; use at most {fewest_unseen + 1} candidates, or lower "
                "`dataset.history_length`."
            )
        self._data, self._seed, self._split, self.n_candidates = data, seed, split, n_candidates

    def draw(self, rows: NDArray[np.int64], epoch: int | None = None) -> NDArray[np.int64]:
        """Draw the candidates of some rows; memory does not grow with the catalogue.

        Args:
            rows: Row numbers in the split, shape ``(B,)``.
            epoch: Epoch, each with new candidates; None for evaluation, where candidates are fixed.

        Returns:
            Item ids of shape ``(B, C)``; each row contains its target once, at a random position.
        """
        n_others = self.n_candidates - 1
        key = derived_seed(self._seed, "candidates", self._split, "stable" if epoch is None else epoch)
        streams = random_words(np.uint64(key), rows.astype(np.uint64))[:, None]
        words = random_words(streams, np.arange(n_others + self.n_candidates, dtype=np.uint64))
        seen = self._data.histories_and_targets(rows)  # (B, L + 1), the target last
        unseen = UnseenItems(seen[:, :-1], seen[:, -1], self._data.n_items)
        others = unseen.nth(_subsets(words[:, :n_others], unseen.counts))
        candidates = np.column_stack([seen[:, -1], others])
        order = np.argsort(words[:, n_others:], axis=1, kind="stable")
        return np.take_along_axis(candidates, order, axis=1)


def _subsets(words: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw a uniform subset of ``range(size)`` per row with Floyd's algorithm (Bentley, CACM 30(9), 1987).

    It uses one word per member, independent of the size; the modulo bias is at most 2**-64 * size.

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
