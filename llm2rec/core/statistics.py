"""Statistics over rows: per-row metric values, bootstrap intervals, paired tests, quantile groups. All in float64.

Rows are test rows, and comparisons are paired: two runs rank the same targets. Intervals and p-values cover the
sampling of test rows; comparisons of models with several seeds each cover the training seeds too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Difference",
    "Estimate",
    "bootstrap_interval",
    "estimate",
    "holm",
    "paired_difference",
    "quantile_groups",
    "row_values",
    "sign_flip_p",
]

_MAX_DRAWS = 2**20  # random numbers per block: 8 MiB
_SIGNS = 10_000  # resamples of the permutation test


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, and over runs if there are several.

    Attributes:
        mean: The mean.
        low: Lower end of its 95 % bootstrap interval over rows.
        high: Upper end.
        runs: The mean of each run.
        spread: Standard deviation of ``runs`` (n - 1 in the denominator); None for a single run.
    """

    mean: float
    low: float
    high: float
    runs: tuple[float, ...] = ()
    spread: float | None = None


@dataclass(frozen=True)
class Difference:
    """The difference of two means over the same rows.

    Attributes:
        mean: The difference.
        low: Lower end of its 95 % bootstrap interval over rows, and over seeds if both models have several.
        high: Upper end.
        p: Two-sided p-value of `sign_flip_p`, or of the bootstrap over rows and seeds.
        p_is_bound: Whether no resample is as far from 0 as the observed one: the p-value is at most ``p``, the smallest
            that the resamples can give.
        better: Rows with a positive difference.
        worse: Rows with a negative difference.
        relative: The difference over the baseline's mean; None if that is not above 0, as are the next two.
        ratio_low: Lower end of its 95 % bootstrap interval, of the ratio of both sums over the same resampled rows.
        ratio_high: Upper end.
    """

    mean: float
    low: float
    high: float
    p: float
    p_is_bound: bool
    better: int
    worse: int
    relative: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


def row_values(ranks: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """Per-row values of a metric, whose mean is that of `llm2rec.core.metrics.ranking_metrics`.

    Args:
        ranks: 0-based ranks of the targets, shape ``(M,)``; ranks from the cut-off on give 0.
        metric: ``hr@K``, ``ndcg@K`` or ``mrr@K``.

    Returns:
        Shape ``(M,)``, between 0 and 1.
    """
    name, _, k = metric.partition("@")
    place = ranks.astype(np.float64)
    gains = {"hr": np.ones(len(place)), "ndcg": 1 / np.log2(place + 2), "mrr": 1 / (place + 1)}[name]
    return np.where(ranks < int(k), gains, 0.0)


def bootstrap_interval(
    values: NDArray[np.float64],
    *,
    weights: NDArray[np.float64] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, or of a ratio of sums, over rows drawn with replacement.

    If all values are equal, the interval has no width, which does not imply certainty: with 0 hits in 90 rows the true
    rate may still be a few percent.

    Args:
        values: One value per row, shape ``(M,)``, M at least 1.
        weights: The ratio's denominator, shape ``(M,)``, at least 0: the statistic is ``sum(values) / sum(weights)``,
            such as hits over valid answers. None for the mean of ``values``.
        level: Share of the resamples inside the interval, between 0 and 1.
        n_resamples: Resamples, at least 1.
        seed: Seed of the resamples.

    Returns:
        Lower and upper end. Resamples whose weights are all 0 have no ratio and are left out.

    Raises:
        ValueError: If there are no rows, shapes differ, a number is not finite, or an argument is out of its range.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"`level` is {level}, `n_resamples` {n_resamples}; expected between 0 and 1, and at least 1.")
    rows = _value_weight_pairs(values, weights)
    # Row counts of a resample are multinomial, so equal rows are drawn together (hits have only two kinds).
    kinds, sizes = np.unique(rows, return_counts=True)
    generator, ratios = np.random.default_rng(seed), []
    block = max(1, _MAX_DRAWS // len(kinds))
    for start in range(0, n_resamples, block):
        n_drawn = min(block, n_resamples - start)
        counts = generator.multinomial(len(rows), sizes / len(rows), size=n_drawn)  # (block, kinds)
        ratios.append(_ratios(counts, kinds))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _value_weight_pairs(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.complex128]:
    """Value and weight of each row as one complex number, which NumPy sorts by both parts; shape ``(M,)``."""
    weights = np.ones(values.shape) if weights is None else weights
    if values.ndim != 1 or values.shape != weights.shape or len(values) == 0:
        raise ValueError(
            f"`values` and `weights` have shapes {values.shape} and {weights.shape}, expected (M,) both, M at least 1."
        )
    if not np.isfinite(values).all() or not np.isfinite(weights).all():
        raise ValueError("`values` or `weights` contain NaN or infinity; drop such rows, or count them as failures.")
    if weights.min() < 0 or weights.max() == 0:
        raise ValueError(f"`weights` lie in [{weights.min()}, {weights.max()}]; expected none below 0, and one above.")
    rows = np.empty(len(values), np.complex128)
    rows.real, rows.imag = values, weights
    return rows


def _ratios(counts: NDArray[np.int64], kinds: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Statistic of each resample, shape ``(resamples,)``; resamples without weight are left out."""
    numerators, denominators = counts @ kinds.real, counts @ kinds.imag
    defined = denominators > 0
    return np.asarray(numerators[defined] / denominators[defined], np.float64)


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Estimate the mean of one or more runs.

    Args:
        values: One value per run and row, shape ``(runs, M)``.

    Returns:
        The mean of all values, its interval over rows (of the rows' means over runs), and the spread over runs.
    """
    runs = values.mean(axis=1)
    low, high = bootstrap_interval(values.mean(axis=0))
    spread = float(runs.std(ddof=1)) if len(runs) > 1 else None
    return Estimate(float(values.mean()), low, high, tuple(runs.tolist()), spread)


def paired_difference(values: NDArray[np.float64], baseline: NDArray[np.float64]) -> Difference:
    """Compare two models row by row, and over training seeds if both were trained with several.

    Args:
        values: Values of one model, shape ``(M,)``, or ``(S, M)`` of S runs that differ in their seed.
        baseline: Values of the other for the same rows, shape ``(M,)`` or ``(T, M)``.

    Returns:
        The mean of ``values - baseline``, absolute and relative, its intervals and its p-value. If S and T are above 1,
        the intervals are over rows and seeds (`_resampled_means`), and the p-value is twice the share of these
        resamples on the other side of 0. Otherwise they are over rows, of means over runs.

    Raises:
        ValueError: If the rows differ in number.
    """
    several, others = np.atleast_2d(values), np.atleast_2d(baseline)
    if several.shape[1] != others.shape[1]:
        raise ValueError(f"`values` and `baseline` have {several.shape[1]} and {others.shape[1]} rows; expected equal.")
    first, second = several.mean(axis=0), others.mean(axis=0)
    differences, of_baseline = first - second, float(second.mean())
    # Differences in the last bits of means over runs are rounding.
    better, worse = int((differences > 1e-12).sum()), int((differences < -1e-12).sum())
    mean = float(differences.mean())
    ratios: tuple[float | None, float | None] = (None, None)
    if min(len(several), len(others)) == 1:
        low, high = bootstrap_interval(differences)
        p = sign_flip_p(differences)
        p_is_bound = p * (1 + _SIGNS) < 1.5
        if of_baseline > 0:
            ratios = bootstrap_interval(differences, weights=second)
    else:
        drawn, drawn_baseline = _resampled_means(several, others)
        gaps = drawn - drawn_baseline
        low, high = map(float, np.quantile(gaps, [0.025, 0.975]))
        beyond = min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
        p, p_is_bound = min(1.0, 2 * (1 + beyond) / (1 + len(gaps))), beyond == 0
        if of_baseline > 0:
            defined = drawn_baseline > 0
            below, above = np.quantile(gaps[defined] / drawn_baseline[defined], [0.025, 0.975])
            ratios = (float(below), float(above))
    relative = mean / of_baseline if of_baseline > 0 else None
    return Difference(mean, low, high, p, p_is_bound, better, worse, relative, *ratios)


def _resampled_means(
    values: NDArray[np.float64], baseline: NDArray[np.float64], n_resamples: int = 4000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of two models in a two-way bootstrap (Owen, "The pigeonhole bootstrap", 2007), ``(n_resamples,)`` each.

    Each resample draws rows with replacement, the same for both models, and seeds with replacement for each model. With
    S seeds, what they vary by is too small by a factor of ``(S - 1) / S``.
    """
    both, generator = np.concatenate([values, baseline]).T, np.random.default_rng(seed)
    sizes, means = (len(values), len(baseline)), []
    block = max(1, _MAX_DRAWS // len(both))
    for start in range(0, n_resamples, block):
        n_drawn = min(block, n_resamples - start)
        counts = generator.multinomial(len(both), np.full(len(both), 1 / len(both)), size=n_drawn)
        by_run = np.split(counts @ both / len(both), [sizes[0]], axis=1)  # (n_drawn, S) and (n_drawn, T)
        seeds = (generator.multinomial(size, np.full(size, 1 / size), size=n_drawn) / size for size in sizes)
        means.append([(each * drawn).sum(axis=1) for each, drawn in zip(by_run, seeds, strict=True)])
    first, second = (np.concatenate(parts) for parts in zip(*means, strict=True))
    return first, second


def sign_flip_p(differences: NDArray[np.float64], *, n_resamples: int = _SIGNS, seed: int = 0) -> float:
    """P-value of a paired permutation test: under the null hypothesis each row's difference has a random sign.

    The statistic is the absolute sum of differences under random signs (Good, Permutation Tests, section 3.2). The
    observed signs are one of the resamples, so no p-value is 0 and the test keeps its level.

    Args:
        differences: One per row, shape ``(M,)``, finite.
        n_resamples: Random choices of signs, at least 1; the smallest p-value is ``1 / (n_resamples + 1)``.
        seed: Seed of the choices.

    Returns:
        Two-sided p-value, in (0, 1].

    Raises:
        ValueError: If a difference is not finite.
    """
    if not np.isfinite(differences).all():
        raise ValueError("`differences` contain NaN or infinity; drop such rows, or count them as failures.")
    # For n rows of equal magnitude only the number of positive signs matters, which is binomial.
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
    """Holm's correction for multiple comparisons (1979), which bounds the family-wise error rate.

    Args:
        p_values: One per comparison.

    Returns:
        Adjusted p-values in the same order: the i-th smallest of m (from 0) times m - i, made monotonic and at most 1.
    """
    adjusted, highest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        highest = max(highest, min(1.0, p_values[number] * (len(p_values) - place)))
        adjusted[number] = highest
    return adjusted


def quantile_groups(values: NDArray[np.int64], n_groups: int) -> list[NDArray[np.int64]]:
    """Split rows into groups of about equal size by a value; equal values stay together.

    Args:
        values: One value per row, shape ``(M,)``, M at least 1.
        n_groups: Number of groups.

    Returns:
        Row numbers of each group, by ascending values; fewer than ``n_groups`` if many values are equal.
    """
    order = np.sort(values)
    # Each group ends with the value at its quantile.
    ends = np.unique(order[[-(-len(order) * (group + 1) // n_groups) - 1 for group in range(n_groups)]])
    group = np.searchsorted(ends, values, side="left")
    return [np.flatnonzero(group == number) for number in range(len(ends))]
