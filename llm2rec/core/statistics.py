"""How sure a mean over rows is."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_interval"]

_MAX_COUNTS = 2**20  # counts held at once: 8 MiB


def bootstrap_interval(
    values: NDArray[np.float64],
    *,
    weights: NDArray[np.float64] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, or of a ratio of sums, over rows drawn with replacement.

    It tells what other rows of the same kind would have given, not what another training seed would. Values that are
    all alike give an interval without width, which is no certainty: 0 hits of 90 still allow a rate of some percent.

    Args:
        values: One value per row, shape ``(M,)``, M at least 1.
        weights: The ratio's denominator, shape ``(M,)``, at least 0: the statistic is ``sum(values) / sum(weights)``,
            such as hits over valid answers. None for the mean of ``values``.
        level: Part of the resamples that lie inside, between 0 and 1.
        n_resamples: Resamples, at least 1.
        seed: Seed of the resamples.

    Returns:
        Lower and upper end. Resamples whose weights are all 0 have no ratio and are left out.

    Raises:
        ValueError: If there are no rows, shapes differ, a number is not finite, or an argument is out of its range.
    """
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"`level` is {level}, `n_resamples` {n_resamples}; expected between 0 and 1, and at least 1.")
    rows = _pairs(values, weights)
    # How often each row is drawn is multinomial, and alike rows may be drawn together: of hits there are two kinds.
    kinds, sizes = np.unique(rows, return_counts=True)
    generator, ratios = np.random.default_rng(seed), []
    block = max(1, _MAX_COUNTS // len(kinds))
    for start in range(0, n_resamples, block):
        n_drawn = min(block, n_resamples - start)
        counts = generator.multinomial(len(rows), sizes / len(rows), size=n_drawn)  # (block, kinds)
        ratios.append(_ratios(counts, kinds))
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _pairs(values: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.complex128]:
    """Value and weight of each row as one complex number, which NumPy sorts by both parts; shape ``(M,)``."""
    weights = np.ones(values.shape) if weights is None else weights
    if values.ndim != 1 or values.shape != weights.shape or len(values) == 0:
        raise ValueError(
            f"`values` and `weights` have shapes {values.shape} and {weights.shape}, expected (M,) both, M at least 1."
        )
    if not np.isfinite(values).all() or not np.isfinite(weights).all():
        raise ValueError("`values` or `weights` hold NaN or infinity; leave such rows out, or count them as failures.")
    if weights.min() < 0 or weights.max() == 0:
        raise ValueError(f"`weights` lie in [{weights.min()}, {weights.max()}]; expected none below 0, and one above.")
    rows = np.empty(len(values), np.complex128)
    rows.real, rows.imag = values, weights
    return rows


def _ratios(counts: NDArray[np.int64], kinds: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Statistic of each resample; shape ``(resamples,)``, or fewer where a resample drew no weight."""
    numerators, denominators = counts @ kinds.real, counts @ kinds.imag
    defined = denominators > 0
    return np.asarray(numerators[defined] / denominators[defined], np.float64)
