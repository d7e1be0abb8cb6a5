"""What the report says of numbers: values of rows, paired differences and their tests, groups of rows. All in float64.

Rows are test rows, and everything here is paired: two runs rank the same targets. It tells what other rows of the same
kind would have changed, not what another training seed would; the report shows the spread over seeds beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.statistics import bootstrap_interval

__all__ = [
    "Difference",
    "Estimate",
    "estimate",
    "holm",
    "paired_difference",
    "quantile_groups",
    "row_values",
    "sign_flip_p",
]

_MAX_DRAWS = 2**20  # numbers drawn at once: 8 MiB


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, and over runs where there are several.

    Attributes:
        mean: The mean.
        low: Lower end of its 95 % bootstrap interval over rows.
        high: Upper end.
        runs: The mean of each run.
        spread: Standard deviation of ``runs`` (n - 1 in the denominator); None for a single one.
    """

    mean: float
    low: float
    high: float
    runs: tuple[float, ...] = ()
    spread: float | None = None


@dataclass(frozen=True)
class Difference:
    """How much one mean lies above another of the same rows.

    Attributes:
        mean: The difference.
        low: Lower end of its 95 % bootstrap interval over rows.
        high: Upper end.
        p: Two-sided p-value of `sign_flip_p`.
        better: Rows with a positive difference.
        worse: Rows with a negative one.
    """

    mean: float
    low: float
    high: float
    p: float
    better: int
    worse: int


def row_values(ranks: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """What each row adds to a metric of `llm2rec.core.metrics.ranking_metrics`, which is the mean of these.

    Args:
        ranks: 0-based ranks of the targets, shape ``(M,)``; at or beyond the cut-off their size does not matter.
        metric: ``hr@K``, ``ndcg@K`` or ``mrr@K``.

    Returns:
        Shape ``(M,)``, between 0 and 1.
    """
    name, _, k = metric.partition("@")
    place = ranks.astype(np.float64)
    gains = {"hr": np.ones(len(place)), "ndcg": 1 / np.log2(place + 2), "mrr": 1 / (place + 1)}[name]
    return np.where(ranks < int(k), gains, 0.0)


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Describe the mean of one or more runs.

    Args:
        values: One value per run and row, shape ``(runs, M)``.

    Returns:
        The mean of all, its interval over rows (of the rows' means over runs), and the spread over runs.
    """
    runs = values.mean(axis=1)
    low, high = bootstrap_interval(values.mean(axis=0))
    spread = float(runs.std(ddof=1)) if len(runs) > 1 else None
    return Estimate(float(values.mean()), low, high, tuple(runs.tolist()), spread)


def paired_difference(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> Difference:
    """Compare two runs row by row.

    Args:
        values: Values of the one, shape ``(M,)``.
        baseline: Values of the other for the same rows, shape ``(M,)``.

    Returns:
        The mean of ``values - baseline``, its interval and its p-value.
    """
    apart = values - baseline
    low, high = bootstrap_interval(apart)
    # What differs in the last bits alone, as means over runs may, is no difference.
    better, worse = int((apart > 1e-12).sum()), int((apart < -1e-12).sum())
    return Difference(float(apart.mean()), low, high, sign_flip_p(apart), better, worse)


def sign_flip_p(differences: NDArray[np.float64], *, n_resamples: int = 10_000, seed: int = 0) -> float:
    """P-value of a paired permutation test: were the two runs alike, each row's difference could have either sign.

    The statistic is the absolute sum of differences under random signs (Good, Permutation Tests, section 3.2). The
    observed signs count as one of the resamples, so that no p-value is 0 and the test holds its level.

    Args:
        differences: One per row, shape ``(M,)``, finite.
        n_resamples: Random choices of signs, at least 1; the smallest p-value is 1 over one more.
        seed: Seed of the choices.

    Returns:
        Two-sided p-value, in (0, 1].

    Raises:
        ValueError: If a difference is not finite.
    """
    if not np.isfinite(differences).all():
        raise ValueError("`differences` hold NaN or infinity; leave such rows out, or count them as failures.")
    # Of n rows with the same magnitude only the number of positive ones matters, which is binomial.
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    observed = abs(float(differences.sum()))
    tolerance = 1e-12 * float(sizes @ counts)  # sums in another order may differ in their last bits
    generator, reached = np.random.default_rng(seed), 0
    block = max(1, _MAX_DRAWS // len(sizes))
    for start in range(0, n_resamples, block):
        shape = min(block, n_resamples - start), len(sizes)
        positive = generator.binomial(counts, 0.5, size=shape)
        reached += int((np.abs((2 * positive - counts) @ sizes) >= observed - tolerance).sum())
    return (1 + reached) / (1 + n_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for being several (Holm 1979): all who stay below 0.05 are right with a chance of 95 %.

    Args:
        p_values: One per comparison.

    Returns:
        Adjusted p-values in the same order: the i-th smallest of m (from 0) times m - i, no less than those before it,
        and at most 1.
    """
    adjusted, highest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        highest = max(highest, min(1.0, p_values[number] * (len(p_values) - place)))
        adjusted[number] = highest
    return adjusted


def quantile_groups(values: NDArray[np.int64], n_groups: int) -> list[NDArray[np.int64]]:
    """Divide rows into groups of about the same size by a number of theirs; equal numbers stay together.

    Args:
        values: One number per row, shape ``(M,)``, M at least 1.
        n_groups: Groups wanted.

    Returns:
        Row numbers of each group, groups by ascending values: ``n_groups``, or fewer where many values are alike.
    """
    order = np.sort(values)
    # Each group ends with the value at its share of the rows.
    ends = np.unique(order[[-(-len(order) * (group + 1) // n_groups) - 1 for group in range(n_groups)]])
    group = np.searchsorted(ends, values, side="left")
    return [np.flatnonzero(group == number) for number in range(len(ends))]
