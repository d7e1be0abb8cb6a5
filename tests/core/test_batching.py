import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.batching import batches_by_cost, epoch_batches, micro_batch_count, optimizer_steps

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
    return rows, epoch_batches(rows, batch_size, seed, epoch, lengths)


def test_micro_batch_count_by_hand():
    assert [micro_batch_count(8, micro, 1) for micro in (8, 5, 4, 1)] == [1, 2, 2, 8]
    assert micro_batch_count(8, 4, 2) == 1
    assert micro_batch_count(9, 4, 2) == 2
    assert micro_batch_count(2, 4, 3) == 1


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_every_row_is_seen_once_and_every_share_fits(n_rows, batch_size, micro, n_processes, epoch, by_length):
    rows, batches = batches_of(n_rows, batch_size, epoch, by_length)
    count = micro_batch_count(batch_size, micro, n_processes)
    seen = []
    shares = [list(optimizer_steps(batches, count, rank, n_processes)) for rank in range(n_processes)]
    for number, batch in enumerate(batches):
        steps = [of_rank[number] for of_rank in shares]
        counted = []
        for step in steps:
            assert step.n_rows == len(batch)
            assert len(step.micro_batches) == len(step.weights) == count  # all ranks join every collective
            for part, weights in zip(step.micro_batches, step.weights, strict=True):
                assert 1 <= len(part) == len(weights) <= micro
                assert set(weights) <= {0, 1}
                assert (weights == 0).sum() in (0, len(part))
                assert set(part) <= set(batch)
                counted.extend(part[weights == 1])
        assert sorted(counted) == sorted(batch)
        seen.extend(counted)
    assert sorted(seen) == rows.tolist()
    assert all(len(of_rank) == len(batches) for of_rank in shares)


@settings(max_examples=80, deadline=None)
@given(**SIZES)
def test_effective_batches_do_not_depend_on_their_division(n_rows, batch_size, micro, n_processes, epoch, by_length):
    def effective(n_processes, micro):
        _, batches = batches_of(n_rows, batch_size, epoch, by_length)
        count = micro_batch_count(batch_size, micro, n_processes)
        shares = [optimizer_steps(batches, count, rank, n_processes) for rank in range(n_processes)]
        for steps in zip(*shares, strict=True):
            parts = [p[w == 1] for s in steps for p, w in zip(s.micro_batches, s.weights, strict=True)]
            yield np.concatenate(parts).tolist()

    assert list(effective(n_processes, micro)) == list(effective(1, batch_size))


def test_ranks_without_rows_get_a_filler_that_counts_nothing():
    batch = np.array([7, 9])
    shares = [next(optimizer_steps([batch], 2, rank, 2)) for rank in range(2)]
    assert [[part.tolist() for part in share.micro_batches] for share in shares] == [[[7], [9]], [[7], [7]]]
    assert [[w.tolist() for w in share.weights] for share in shares] == [[[1], [1]], [[0], [0]]]
    assert [share.n_rows for share in shares] == [2, 2]


def test_only_the_last_batch_is_smaller():
    assert [len(batch) for batch in batches_of(11, 4, 0, False)[1]] == [4, 4, 3]
    assert sorted(len(batch) for batch in batches_of(11, 4, 0, True)[1]) == [3, 4, 4]


@pytest.mark.parametrize("by_length", [False, True])
def test_order_is_a_function_of_seed_and_epoch(by_length):
    def order(epoch, seed):
        return np.concatenate(batches_of(60, 8, epoch, by_length, seed)[1]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 5)


def test_rows_of_similar_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 512)
    sorted_in = epoch_batches(np.arange(512), 8, 0, 0, lengths)
    shuffled = epoch_batches(np.arange(512), 8, 0, 0)
    spread = [sum(np.ptp(lengths[batch]) for batch in batches) for batches in (sorted_in, shuffled)]
    assert spread[0] < spread[1] / 10
    firsts = [lengths[batch].mean() for batch in sorted_in]
    assert firsts != sorted(firsts)  # and yet training does not go from short to long


PIECES = {
    "pieces": st.lists(st.integers(1, 9), min_size=1, max_size=60),
    "extra": st.integers(0, 15),
    "micro": st.integers(1, 20),
    "n_processes": st.integers(1, 4),
    "epoch": st.integers(0, 3),
    "by_length": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(**PIECES)
def test_pieces_of_several_rows_stay_whole_and_make_as_many_steps(pieces, extra, micro, n_processes, epoch, by_length):
    sizes = np.array(pieces)
    batch_size = int(sizes.max()) + extra
    batches = epoch_batches(np.arange(len(sizes)), batch_size, 0, epoch, sizes if by_length else None, sizes)
    assert len(batches) == -(-sizes.sum() // batch_size)
    assert sorted(np.concatenate(batches)) == list(range(len(sizes)))
    assert all(abs(sizes[batch].sum() - batch_size) < sizes.max() for batch in batches[:-1] if not by_length)

    count = micro_batch_count(batch_size, micro, n_processes)
    shares = [list(optimizer_steps(batches, count, rank, n_processes, sizes)) for rank in range(n_processes)]
    for batch, *of_ranks in zip(batches, *shares, strict=True):
        counted = []
        for step in of_ranks:
            assert step.n_rows == sizes[batch].sum()
            assert len(step.micro_batches) == len(step.weights) == count
            for part, weights in zip(step.micro_batches, step.weights, strict=True):
                assert len(weights) == sizes[part].sum() > 0
                assert set(weights) in ({0}, {1})
                counted.extend(part if weights[0] else [])
        assert counted == batch.tolist()  # whatever the division, in this order


def test_pieces_by_hand():
    """Rows 0-2 | 3 4 | 5-8 | 9 in steps of 4: a piece goes where its last row goes."""
    sizes = np.array([3, 2, 4, 1])
    order = np.concatenate(epoch_batches(np.arange(4), 10, 0, 0, None, sizes))
    ends, batches = np.cumsum(sizes[order]) - 1, epoch_batches(np.arange(4), 4, 0, 0, None, sizes)
    assert [batch.tolist() for batch in batches] == [order[ends // 4 == step].tolist() for step in range(3)]


def test_a_piece_larger_than_a_batch_is_refused():
    with pytest.raises(ConfigError, match="`batch_size` is 4, but up to 5 training rows come in one piece; raise it"):
        epoch_batches(np.arange(3), 4, 0, 0, sizes=np.array([1, 5, 2]))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_by_cost_hold_each_row_once_and_keep_the_bound(counts, bound):
    counts = np.array(counts, np.int64)
    batches = batches_by_cost(counts, bound)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(counts)))
    assert all(len(batch) == 1 or len(batch) * counts[batch].max() <= bound for batch in batches)
    longest = [counts[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)
