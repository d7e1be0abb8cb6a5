"""The bootstrap: against theory, against a plain loop, and what it refuses."""

import tracemalloc

import numpy as np
import pytest

from llm2rec.core import statistics
from llm2rec.core.statistics import bootstrap_interval


def plain_interval(values, weights, level, n_resamples, seed):
    """Draw row numbers, one resample after the other."""
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = generator.integers(len(values), size=len(values))
        if weights[drawn].sum() > 0:
            ratios.append(values[drawn].sum() / weights[drawn].sum())
    return np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])


def test_the_interval_of_a_rate_is_the_binomial_one():
    hits = np.array([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap_interval(hits)
    error = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.003)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_it_is_the_interval_of_resampled_rows(kind, level):
    generator = np.random.default_rng(1)
    valid = (generator.random(200) < 0.7).astype(np.float64) if kind == "ratio" else np.ones(200)
    values = valid * generator.gamma(0.5, size=200)  # skewed, so that a symmetric interval would be wrong
    given = {"weights": valid} if kind == "ratio" else {}
    expected = plain_interval(values, valid, level, 20000, seed=2)
    assert bootstrap_interval(values, level=level, n_resamples=20000, **given) == pytest.approx(expected, rel=0.02)


def test_invalid_rows_count_in_the_denominator_by_their_weight_only():
    """Hits over valid answers have the interval of the valid rows, though how many are drawn changes."""
    hits, valid = np.array([1.0] * 40 + [0.0] * 40 + [0.0] * 20), np.array([1.0] * 80 + [0.0] * 20)
    low, high = bootstrap_interval(hits, weights=valid)
    assert low < 0.5 < high
    assert (low, high) == pytest.approx(bootstrap_interval(hits[:80]), abs=0.02)


def test_values_that_are_alike_have_no_width_and_lost_resamples_are_left_out():
    assert bootstrap_interval(np.ones(9)) == (1.0, 1.0)
    one_valid = np.array([1.0] + [0.0] * 9)  # more than a third of the resamples do not hold it
    assert bootstrap_interval(one_valid, weights=one_valid) == (1.0, 1.0)


def test_it_depends_on_the_seed_alone_and_not_on_the_order_of_rows():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values.copy())
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(values[::-1].copy()), abs=1e-12)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_blocks_change_nothing_but_the_memory(monkeypatch):
    values = np.random.default_rng(0).random(1000)
    whole = bootstrap_interval(values, n_resamples=300)
    monkeypatch.setattr(statistics, "_MAX_COUNTS", 7000)
    tracemalloc.start()
    in_blocks = bootstrap_interval(values, n_resamples=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert in_blocks == pytest.approx(whole, rel=1e-12)  # a matrix product rounds by its shape
    assert peak < 300 * 1000 * 8 / 5


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "M at least 1"),
        ([[1.0]], {}, r"shapes \(1, 1\)"),
        ([1.0, 0.0], {"weights": np.ones(3)}, r"shapes \(2,\) and \(3,\)"),
        ([np.nan], {}, "NaN or infinity"),
        ([0.0], {"weights": np.zeros(1)}, "one above"),
        ([0.0, 1.0], {"weights": np.array([-1.0, 1.0])}, "none below 0"),
        ([1.0], {"level": 1.0}, "`level` is 1.0"),
        ([1.0], {"n_resamples": 0}, "`n_resamples` 0"),
    ],
)
def test_what_has_no_interval_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.array(values), **options)
