"""The candidates a row's target is picked from: the iLoRA paper's protocol, and the choices shown to title teachers."""

import numpy as np
import torch
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError
from llm2rec.core.hashing import mixed_words
from llm2rec.core.seed import derived_seed
from llm2rec.student.datamodule import SequenceData
from llm2rec.student.unshown import UnshownItems

__all__ = ["CandidateSampler"]


class CandidateSampler:
    """Each row's target among items that the row shows nowhere, in a random order.

    The others are drawn without replacement, uniformly over the catalogue less the row's history and target; a target
    stands among them even where the history holds it too. The order is uniform, so that the target's place says
    nothing. The iLoRA paper (arXiv 2408.10159) picks among 20 others and the answer, its released program among 19.

    Candidates are a function of seed, split, row and epoch: neither batches, processes nor a resumed run change them.

    Args:
        data: The split's rows. Those who are to have the same candidates must cut histories at the same length.
        seed: Seed of the candidates.
        n_candidates: Items per row, C, the target among them; at least 2.
        split: Name of the split, so that row r of one does not draw what row r of another draws.

    Raises:
        ConfigError: If there are fewer than 2 candidates, or a row may leave too few items to draw from.
    """

    def __init__(self, data: SequenceData, seed: int, n_candidates: int = 20, *, split: str) -> None:
        if n_candidates < 2:
            raise ConfigError(
                f"`n_candidates` is {n_candidates}, expected at least 2: the target and what it is picked from."
            )
        shown = int(data.lengths.numpy().max(initial=0)) + 1
        left = data.n_items - shown
        if left < n_candidates - 1:
            raise ConfigError(
                f"`n_candidates` is {n_candidates}, but a row may show {shown} of the catalogue's {data.n_items} "
                f"items, which leaves {left} for the {n_candidates - 1} beside the target; ask for at most {left + 1} "
                "candidates, or shorten histories with `dataset.history_length`."
            )
        self._data, self._seed, self._split, self.n_candidates = data, seed, split, n_candidates

    def draw(self, rows: NDArray[np.int64], epoch: int | None = None) -> NDArray[np.int64]:
        """Draw the candidates of some rows.

        Memory grows with their number, not with the catalogue.

        Args:
            rows: Row numbers in the split, shape ``(B,)``.
            epoch: Draws anew for each epoch; None for what evaluation uses, which never changes.

        Returns:
            Item ids of shape ``(B, C)``; each row holds its target once, at a random place.
        """
        n_others, index = self.n_candidates - 1, torch.from_numpy(rows)
        words = _words(self._key(epoch), rows, n_others + self.n_candidates)
        targets = self._data.targets[index].numpy()
        unshown = UnshownItems(self._data.history[index].numpy(), targets, self._data.n_items)
        others = unshown.nth(_subsets(words[:, :n_others], unshown.counts))
        candidates = np.column_stack([targets, others])
        order = np.argsort(words[:, n_others:], axis=1, kind="stable")
        return np.take_along_axis(candidates, order, axis=1)

    def _key(self, epoch: int | None) -> np.uint64:
        when = "stable" if epoch is None else epoch
        return np.uint64(derived_seed(self._seed, "candidates", self._split, when))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio, odd


def _words(key: np.uint64, rows: NDArray[np.int64], n_words: int) -> NDArray[np.uint64]:
    """Uniform 64-bit words of each row, shape ``(B, n_words)``."""
    counters = np.arange(1, n_words + 1, dtype=np.uint64) * _GOLDEN
    streams = mixed_words(key + (rows.astype(np.uint64) + np.uint64(1)) * _GOLDEN)  # (B,)
    return mixed_words(streams[:, None] + counters)


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
