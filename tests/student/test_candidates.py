"""Candidates: valid items, uniform arrangements, and draws that depend only on seed, split, epoch and row."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from engine_helpers import random_rows, sequence_data
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.core.errors import ConfigError
from llm2rec.student.negatives import CandidateSampler, UnseenItems

N = 12
ITEMS = st.integers(0, N - 1)
ROWS = st.lists(st.tuples(st.lists(ITEMS, min_size=1, max_size=6), ITEMS), min_size=1, max_size=8)


def alike_rows(n_rows, history=(3, 1, 3), target=5, n_items=8):
    return sequence_data([(list(history), target)] * n_rows, n_items, max_length=4)


def assert_uniform(outcomes, n_cells):
    """Chi-square of counts over equally likely cells, within four standard deviations of what chance gives."""
    counts = np.bincount(outcomes, minlength=n_cells)
    assert len(counts) == n_cells
    expected = len(outcomes) / n_cells
    assert expected > 50
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = n_cells - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def arrangements(candidates):
    """Number each row's arrangement of target 5 and two of the five unseen items of (3, 1, 3) -> 5."""
    numbers = {each: number for number, each in enumerate(a for a in permutations([0, 2, 4, 5, 6, 7], 3) if 5 in a)}
    return np.array([numbers[tuple(row)] for row in candidates.tolist()]), len(numbers)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.integers(2, 6), st.sampled_from([None, 0, 7]), st.integers(0, 2**40))
def test_candidates_are_the_target_once_and_distinct_unseen_items(rows, n_candidates, epoch, seed):
    data = sequence_data(rows, N, max_length=6)
    drawn = CandidateSampler(data, seed, n_candidates, split="test").draw(np.arange(len(rows)), epoch)
    assert drawn.shape == (len(rows), n_candidates)
    assert drawn.dtype == np.int64
    for candidates, (history, target) in zip(drawn.tolist(), rows, strict=True):
        assert candidates.count(target) == 1
        assert len(set(candidates)) == n_candidates
        assert set(candidates) - {target} <= set(range(N)) - set(history)


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_nth_unseen_item_equals_a_loop(rows):
    data = sequence_data(rows, N, max_length=6)
    unshown = UnseenItems(data.histories()[0], data.targets.numpy(), N)
    for row, (history, target) in enumerate(rows):
        left = [item for item in range(N) if item not in {*history, target}]
        assert unshown.counts[row] == len(left)
        # All rows are asked for one number, so that the stretches of a search over all of them must not touch.
        for number, item in enumerate(left):
            assert unshown.nth(np.full((len(rows), 1), number))[row, 0] == item


def test_all_arrangements_are_equally_likely_over_rows():
    n_rows = 60_000
    drawn = CandidateSampler(alike_rows(n_rows), 0, 3, split="test").draw(np.arange(n_rows))
    assert_uniform(*arrangements(drawn))


def test_all_arrangements_are_equally_likely_over_epochs():
    sampler = CandidateSampler(alike_rows(1), 0, 3, split="train")
    drawn = np.concatenate([sampler.draw(np.zeros(1, np.int64), epoch) for epoch in range(6000)])
    assert_uniform(*arrangements(drawn))


@pytest.mark.parametrize("n_items", [31, 1_000_000])
def test_twenty_candidates_are_uniform_in_items_and_place(n_items):
    n_rows, n_bins = 30_000, 20
    data = sequence_data([([0, 7, 9, 4, 2, 11, 1, 3, 5, 6], 8)] * n_rows, n_items, max_length=10)  # shows 0..9 and 11
    drawn = CandidateSampler(data, 3, split="test").draw(np.arange(n_rows))
    assert_uniform((drawn == 8).argmax(axis=1), 20)
    first = drawn[np.arange(n_rows), np.where(drawn[:, 0] == 8, 1, 0)]  # one a row: the rest depends on it
    rank = np.where(first == 10, 0, first - 11)  # among the items not shown: 10, 12, 13, ...
    n_left = n_items - 11
    assert_uniform(rank * n_bins // n_left if n_left > n_bins else rank, min(n_bins, n_left))


def test_neighbouring_rows_and_epochs_draw_independently():
    n_rows = 40_000
    sampler = CandidateSampler(alike_rows(n_rows, n_items=13), 1, 2, split="train")

    def other(epoch):  # numbers 0..9 of the ten items beside 1, 3 and 5
        drawn = sampler.draw(np.arange(n_rows), epoch)
        return np.searchsorted([0, 2, 4, 6, 7, 8, 9, 10, 11, 12], drawn[drawn != 5])

    now, later = other(0), other(1)
    assert_uniform(now[:-1:2] * 10 + now[1::2], 100)
    assert_uniform(now * 10 + later, 100)


@pytest.mark.parametrize("epoch", [None, 4])
def test_candidates_do_not_depend_on_order_batches_or_sampler(epoch):
    data = random_rows(200, 50, 6)
    whole = CandidateSampler(data, 5, 7, split="train").draw(np.arange(200), epoch)
    sampler = CandidateSampler(data, 5, 7, split="train")
    sampler.draw(np.arange(10), 99)  # whatever came before
    shuffled = np.random.default_rng(0).permutation(200)
    assert np.array_equal(sampler.draw(shuffled, epoch), whole[shuffled])
    assert np.array_equal(
        np.concatenate([sampler.draw(part, epoch) for part in np.split(shuffled, 8)]), whole[shuffled]
    )
    assert sampler.draw(np.zeros(0, np.int64), epoch).shape == (0, 7)


def test_candidates_depend_on_seed_split_epoch_and_row():
    data, rows = alike_rows(50, n_items=60), np.arange(50)
    draws = [
        CandidateSampler(data, 0, split="test").draw(rows),
        CandidateSampler(data, 1, split="test").draw(rows),
        CandidateSampler(data, 0, split="validation").draw(rows),
        CandidateSampler(data, 0, split="test").draw(rows, 0),
        CandidateSampler(data, 0, split="test").draw(rows, 1),
    ]
    assert len({tuple(row) for draw in draws for row in draw.tolist()}) == 5 * 50


def test_candidates_are_the_same_on_every_machine():
    drawn = CandidateSampler(alike_rows(3, n_items=1000), 0, 4, split="test").draw(np.arange(3))
    assert drawn.tolist() == [[802, 863, 5, 771], [73, 55, 5, 872], [738, 5, 112, 737]]


def test_memory_does_not_grow_with_the_catalogue():
    sampler = CandidateSampler(random_rows(512, 1_000_000, 10), 0, split="train")
    tracemalloc.start()
    sampler.draw(np.arange(512), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # less than 8 bytes an item, for all rows together


def test_catalogue_with_too_few_unseen_items_raises():
    rows = [(list(range(10)), 10)]  # shows 11 items; 19 others are needed
    drawn = CandidateSampler(sequence_data(rows, 30, 10), 0, split="test").draw(np.zeros(1, np.int64))
    assert sorted(drawn[0]) == list(range(10, 30))
    with pytest.raises(
        ConfigError,
        match=r"is 20, but a row may have only 18 unseen items of the catalogue's 29; use at most 19",
    ):
        CandidateSampler(sequence_data(rows, 29, 10), 0, split="test")
    with pytest.raises(ConfigError, match="`n_candidates` is 1, expected at least 2"):
        CandidateSampler(sequence_data(rows, 30, 10), 0, 1, split="test")
