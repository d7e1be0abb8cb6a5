"""Bootstrap intervals, paired tests and groups: by hand, against theory and against plain loops."""

import tracemalloc
from itertools import product

import numpy as np
import pytest
import torch

from llm2rec.core import statistics
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.statistics import (
    bootstrap_interval,
    estimate,
    holm,
    paired_difference,
    quantile_groups,
    row_values,
    sign_flip_p,
)


def plain_interval(values, weights, level, n_resamples, seed):
    """Draw row numbers, one resample after the other."""
    generator, ratios = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        drawn = generator.integers(len(values), size=len(values))
        if weights[drawn].sum() > 0:
            ratios.append(values[drawn].sum() / weights[drawn].sum())
    return np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])


def test_interval_of_a_rate_equals_the_binomial_one():
    hits = np.array([1.0] * 300 + [0.0] * 700)
    low, high = bootstrap_interval(hits)
    error = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.003)


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_interval_equals_that_of_resampled_rows(kind, level):
    generator = np.random.default_rng(1)
    valid = (generator.random(200) < 0.7).astype(np.float64) if kind == "ratio" else np.ones(200)
    values = valid * generator.gamma(0.5, size=200)  # skewed, so that a symmetric interval would be wrong
    given = {"weights": valid} if kind == "ratio" else {}
    expected = plain_interval(values, valid, level, 20000, seed=2)
    assert bootstrap_interval(values, level=level, n_resamples=20000, **given) == pytest.approx(expected, rel=0.02)


def test_rows_without_weight_do_not_count():
    """Hits over valid answers have the interval of the valid rows, although their number varies between resamples."""
    hits, valid = np.array([1.0] * 40 + [0.0] * 40 + [0.0] * 20), np.array([1.0] * 80 + [0.0] * 20)
    low, high = bootstrap_interval(hits, weights=valid)
    assert low < 0.5 < high
    assert (low, high) == pytest.approx(bootstrap_interval(hits[:80]), abs=0.02)


def test_equal_values_have_no_width_and_undefined_resamples_are_dropped():
    assert bootstrap_interval(np.ones(9)) == (1.0, 1.0)
    one_valid = np.array([1.0] + [0.0] * 9)  # more than a third of the resamples do not hold it
    assert bootstrap_interval(one_valid, weights=one_valid) == (1.0, 1.0)


def test_interval_depends_on_the_seed_and_not_on_row_order():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values.copy())
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(values[::-1].copy()), abs=1e-12)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_blocks_do_not_change_the_interval(monkeypatch):
    values = np.random.default_rng(0).random(1000)
    whole = bootstrap_interval(values, n_resamples=300)
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 7000)
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
def test_invalid_interval_arguments_raise(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.array(values), **options)


def test_means_of_row_values_equal_the_metrics():
    ranks = np.array([0, 1, 4, 5, 9, 10, 700])
    metrics = ranking_metrics(torch.from_numpy(ranks), (1, 5, 10))
    for name in metrics.keys() - {"mrr"}:
        assert row_values(ranks, name).mean() == pytest.approx(metrics[name], abs=1e-15), name
    assert row_values(ranks, "ndcg@5").tolist() == [1.0, 1 / np.log2(3), 1 / np.log2(6), 0, 0, 0, 0]


def exact_p(differences):
    """All choices of signs."""
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 1.0, 1.0, 1.0], 2 / 16),  # all up or all down, of 16
        ([2.0, -1.0], 1.0),  # 1 is reached by all four sums: 3, 1, 1, 3
        ([3.0, 1.0, 0.0], 2 / 4),  # a row without difference says nothing
    ],
)
def test_signs_enumerated_by_hand(differences, p):
    assert exact_p(np.array(differences)) == p
    assert sign_flip_p(np.array(differences)) == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_random_signs_approximate_all_signs(seed):
    generator = np.random.default_rng(seed)
    # Few different magnitudes, as of NDCG, and some that are all different.
    differences = generator.choice([-0.5, 0.0, 0.25, 0.5, 1.0], 12) + (seed % 2) * generator.normal(0.1, 0.3, 12)
    assert sign_flip_p(differences) == pytest.approx(exact_p(differences), abs=0.02)


def test_level_and_power():
    generator = np.random.default_rng(0)
    null = np.array([sign_flip_p(generator.normal(size=40), n_resamples=500) for _ in range(300)])
    assert 0.02 < (null < 0.05).mean() < 0.09
    assert abs((null < 0.5).mean() - 0.5) < 0.1
    assert sign_flip_p(generator.normal(1, 1, 100)) == 1 / 10001  # none of 10,000 resamples, and the observed one


def test_p_value_of_no_difference_and_invariance():
    assert sign_flip_p(np.zeros(5)) == 1
    differences = np.random.default_rng(1).normal(0.2, 1, 50)
    p = sign_flip_p(differences)
    assert 0 < p < 1
    assert sign_flip_p(-differences) == sign_flip_p(differences * 2**20) == p
    with pytest.raises(ValueError, match="NaN or infinity"):
        sign_flip_p(np.array([0.1, np.nan]))


def test_a_relative_difference_has_the_interval_of_a_ratio_over_the_same_rows():
    generator = np.random.default_rng(4)
    baseline = generator.choice([0.0, 0.5, 1.0], 60)
    values = np.clip(baseline + generator.choice([-0.5, 0.0, 0.5], 60, p=[0.1, 0.5, 0.4]), 0, 1)
    found = paired_difference(values, baseline)
    assert found.relative == pytest.approx(values.mean() / baseline.mean() - 1)
    drawn = generator.integers(60, size=(4000, 60))
    ratios = values[drawn].sum(axis=1) / baseline[drawn].sum(axis=1) - 1
    assert (found.ratio_low, found.ratio_high) == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.02)
    # The baseline's mean is drawn again too: the ends are not those of the difference over one mean.
    assert abs(found.ratio_high - found.high / baseline.mean()) > 0.01
    none = paired_difference(values, np.zeros(60))
    assert none.relative is none.ratio_low is none.ratio_high is None


def test_the_smallest_p_value_is_known_to_be_a_bound():
    sure, unsure = np.ones(100), np.random.default_rng(5).normal(0.1, 1, 50)
    assert paired_difference(sure, np.zeros(100)).p_is_bound
    assert not paired_difference(unsure, np.zeros(50)).p_is_bound
    assert not paired_difference(sure[:4], np.zeros(4)).p_is_bound  # 1/8, which the signs of four rows can reach


def test_sign_flip_blocks_do_not_change_the_p_value(monkeypatch):
    """Blocks draw from the same distribution, in another order."""
    differences = np.random.default_rng(2).normal(0.1, 1, 200)
    whole = sign_flip_p(differences)
    monkeypatch.setattr(statistics, "_MAX_DRAWS", 1000)
    assert sign_flip_p(differences) == pytest.approx(whole, abs=0.02)


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 they are 0.02, 0.03, 0.06, 0.04, and none may fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_paired_difference_by_hand():
    found = paired_difference(np.array([1.0, 0.5, 0.0, 0.3]), np.array([0.0, 0.5, 0.5, 0.1 + 0.2]))
    assert found.mean == pytest.approx(0.125)
    assert (found.better, found.worse) == (1, 1)  # 0.1 + 0.2 is 0.3 but for its last bit
    assert found.low < 0.125 < found.high
    assert found.p == pytest.approx(exact_p(np.array([1.0, 0.0, -0.5, 0.0])), abs=0.02)


def test_estimate_over_runs_by_hand():
    found = estimate(np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    assert found.mean == 0.375
    assert found.runs == (0.5, 0.25)
    assert found.spread == pytest.approx(0.25 / np.sqrt(2))
    assert 0 <= found.low < 0.375 < found.high <= 1
    assert estimate(np.array([[1.0, 0.0]])).spread is None


def plain_gaps(values, baseline, n_resamples, seed):
    """Draw row numbers and seeds, one resample after the other."""
    generator, gaps = np.random.default_rng(seed), []
    for _ in range(n_resamples):
        rows = generator.integers(values.shape[1], size=values.shape[1])
        first, second = (
            each[generator.integers(len(each), size=len(each))][:, rows].mean() for each in (values, baseline)
        )
        gaps.append(first - second)
    return np.quantile(gaps, [0.025, 0.975])


def test_intervals_over_rows_and_seeds_equal_plain_draws_and_are_wider_than_over_rows():
    generator = np.random.default_rng(3)
    rows = 1 + generator.random(400)
    values = rows + 0.05 + generator.normal(0, 0.05, (4, 1)) + generator.normal(0, 0.1, (4, 400))
    baseline = rows + generator.normal(0, 0.05, (3, 1)) + generator.normal(0, 0.1, (3, 400))
    found, of_means = paired_difference(values, baseline), paired_difference(values.mean(axis=0), baseline.mean(axis=0))
    low, high = plain_gaps(values, baseline, 4000, 1)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.004), pytest.approx(high, abs=0.004))
    assert found.mean == pytest.approx(of_means.mean)
    assert found.high - found.low > 2 * (of_means.high - of_means.low)
    assert found.p > of_means.p
    assert found.relative == pytest.approx(found.mean / baseline.mean())
    assert found.ratio_low < found.relative < found.ratio_high


def test_seeds_decide_where_rows_alone_would_be_sure():
    rows = np.random.default_rng(0).random(500)
    lucky = np.stack([rows + 0.3, rows - 0.2, rows - 0.2])
    found = paired_difference(lucky, np.stack([rows, rows, rows + 0.01]))
    assert paired_difference(lucky.mean(axis=0), rows).p < 0.001 < 0.05 < found.p
    assert found.low < 0 < found.high
    sure = paired_difference(np.stack([rows + 1, rows + 1.1]), np.stack([rows, rows]))
    assert sure.p_is_bound
    assert sure.p == pytest.approx(2 / 4001)
    assert paired_difference(np.stack([rows, rows]), np.stack([rows, rows])).p == 1.0


def test_runs_over_different_rows_are_not_compared():
    with pytest.raises(ValueError, match="3 and 4 rows"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_quantile_groups():
    values = np.array([5, 1, 1, 1, 2, 9, 3, 7])
    # In order 1 1 | 1 2 | 3 5 | 7 9: the third 1 joins the first two.
    assert [values[rows].tolist() for rows in quantile_groups(values, 4)] == [[1, 1, 1], [2], [5, 3], [9, 7]]
    assert [rows.tolist() for rows in quantile_groups(np.array([3, 3, 3]), 4)] == [[0, 1, 2]]
    many = np.random.default_rng(0).integers(0, 1000, 4003)
    groups = quantile_groups(many, 4)
    assert sorted(np.concatenate(groups).tolist()) == list(range(4003))
    assert all(abs(len(rows) - 1000) < 20 for rows in groups)
