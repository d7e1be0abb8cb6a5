import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.batching import (
    OptimizerStep,
    TrainingUnits,
    batches_by_cost,
    epoch_batches,
    micro_batch_count,
    micro_batches,
)

SIZES = {
    "n_rows": st.integers(1, 70),
    "batch_size": st.integers(1, 20),
    "micro": st.integers(1, 20),
    "n_processes": st.integers(1, 5),
    "epoch": st.integers(0, 3),
    "by_length": st.booleans(),
}


def batches_of(n_rows, batch_size, epoch, by_length, seed=0):
    rows = np.arange(n_rows) * 3 + 1  # row numbers need not be positions
    lengths = np.random.default_rng(n_rows).integers(1, 9, n_rows) if by_length else None
    return rows, epoch_batches(TrainingUnits(rows, lengths=lengths), batch_size, seed, epoch)


def step_of(units, sizes=None):
    n_rows = len(units) if sizes is None else int(sizes[units].sum())
    return OptimizerStep(5, 2, units, n_rows, sizes)


def split(batch, n_micro, n_processes, sizes=None):
    """The micro-batches of each process."""
    return [micro_batches(step_of(batch, sizes), n_micro, rank, n_processes) for rank in range(n_processes)]


def test_micro_batch_count_by_hand():
    assert [micro_batch_count(8, micro, 1) for micro in (8, 5, 4, 1)] == [1, 2, 2, 8]
    assert micro_batch_count(8, 4, 2) == 1
    assert micro_batch_count(9, 4, 2) == 2
    assert micro_batch_count(2, 4, 3) == 1


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_every_row_is_used_once_in_micro_batches_that_fit(n_rows, batch_size, micro, n_processes, epoch, by_length):
    rows, batches = batches_of(n_rows, batch_size, epoch, by_length)
    count = micro_batch_count(batch_size, micro, n_processes)
    seen = []
    for batch in batches:
        counted = []
        for mine in split(batch, count, n_processes):
            assert len(mine) == count  # all processes join every collective
            for part in mine:
                assert (part.step, part.epoch) == (5, 2)
                assert 1 <= len(part.units) == len(part.weights) <= micro
                assert set(part.weights) in ({0}, {1})
                assert set(part.units) <= set(batch)
                counted.extend(part.units[part.weights == 1])
        assert counted == batch.tolist()  # in this order, however they are split
        seen.extend(counted)
    assert sorted(seen) == rows.tolist()


def test_processes_without_rows_get_a_filler_of_weight_zero():
    shares = split(np.array([7, 9]), 2, 2)
    assert [[part.units.tolist() for part in mine] for mine in shares] == [[[7], [9]], [[7], [7]]]
    assert [[part.weights.tolist() for part in mine] for mine in shares] == [[[1], [1]], [[0], [0]]]


def test_only_the_last_batch_is_smaller():
    assert [len(batch) for batch in batches_of(11, 4, 0, False)[1]] == [4, 4, 3]
    assert sorted(len(batch) for batch in batches_of(11, 4, 0, True)[1]) == [3, 4, 4]


@pytest.mark.parametrize("by_length", [False, True])
def test_order_depends_only_on_seed_and_epoch(by_length):
    def order(epoch, seed):
        return np.concatenate(batches_of(60, 8, epoch, by_length, seed)[1]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 5)


def test_rows_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 512)
    sorted_in = epoch_batches(TrainingUnits(np.arange(512), lengths=lengths), 8, 0, 0)
    shuffled = epoch_batches(TrainingUnits(np.arange(512)), 8, 0, 0)
    spread = [sum(np.ptp(lengths[batch]) for batch in batches) for batches in (sorted_in, shuffled)]
    assert spread[0] < spread[1] / 10
    firsts = [lengths[batch].mean() for batch in sorted_in]
    assert firsts != sorted(firsts)  # and yet training does not go from short to long


UNITS = {
    "unit_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=60),
    "extra": st.integers(0, 15),
    "micro": st.integers(1, 20),
    "n_processes": st.integers(1, 4),
    "epoch": st.integers(0, 3),
    "by_length": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(**UNITS)
def test_units_of_several_rows_are_not_split(unit_sizes, extra, micro, n_processes, epoch, by_length):
    sizes = np.array(unit_sizes)
    batch_size = int(sizes.max()) + extra
    units = TrainingUnits(np.arange(len(sizes)), sizes, sizes if by_length else None)
    batches = epoch_batches(units, batch_size, 0, epoch)
    assert len(batches) == -(-units.n_rows // batch_size)
    assert sorted(np.concatenate(batches)) == list(range(len(sizes)))
    assert all(abs(sizes[batch].sum() - batch_size) < sizes.max() for batch in batches[:-1] if not by_length)

    count = micro_batch_count(batch_size, micro, n_processes)
    for batch in batches:
        counted = []
        for mine in split(batch, count, n_processes, sizes):
            assert len(mine) == count
            for part in mine:
                assert len(part.weights) == sizes[part.units].sum() > 0
                assert set(part.weights) in ({0}, {1})
                counted.extend(part.units if part.weights[0] else [])
        assert counted == batch.tolist()


def test_units_by_hand():
    """Units 0-2 | 3 4 | 5-8 | 9 with batches of 4 rows: a unit belongs to the batch of its last row."""
    units = TrainingUnits(np.arange(4), np.array([3, 2, 4, 1]))
    order = np.concatenate(epoch_batches(units, 10, 0, 0))
    ends, batches = np.cumsum(units.sizes[order]) - 1, epoch_batches(units, 4, 0, 0)
    assert [batch.tolist() for batch in batches] == [order[ends // 4 == step].tolist() for step in range(3)]


def test_unit_larger_than_a_batch_raises():
    with pytest.raises(
        ConfigError, match="`batch_size` is 4, but one sequence has up to 5 training rows; set it to at"
    ):
        epoch_batches(TrainingUnits(np.arange(3), np.array([1, 5, 2])), 4, 0, 0)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_by_cost_contain_each_row_once_within_the_bound(counts, bound):
    counts = np.array(counts, np.int64)
    batches = batches_by_cost(counts, bound)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(counts)))
    assert all(len(batch) == 1 or len(batch) * counts[batch].max() <= bound for batch in batches)
    longest = [counts[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)
