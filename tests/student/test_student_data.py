import numpy as np
import pytest
import torch
from engine_helpers import engine_in, examples_of, random_rows, sequences_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2rec.core.metrics import target_ranks
from llm2rec.data import Toy, prepare
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import build_model

N = 9
ITEMS = st.integers(0, N - 1)
SEQUENCES = st.lists(st.lists(ITEMS, min_size=2, max_size=8), min_size=1, max_size=6)


def slow_tensors(split, max_length):
    history, lengths, targets = [], [], []
    for row in split.to_list():
        kept = row["history"][-max_length:]
        history.append(kept + [N] * (max_length - len(kept)))
        lengths.append(len(kept))
        targets.append(row["target"])
    return history, lengths, targets


def assert_read(split, sequences, max_length):
    data = Rows.from_tables(split, sequences, N, max_length)
    expected, expected_lengths, targets = slow_tensors(split, max_length)
    history, lengths = data.histories()
    assert history.tolist() == expected
    assert lengths.tolist() == data.lengths.tolist() == expected_lengths
    assert data.targets.tolist() == targets
    assert {history.dtype, lengths.dtype} == {np.dtype("int32")}
    assert data.targets.dtype is torch.int32
    assert len(data) == len(split)


quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(SEQUENCES, st.integers(1, 8))
def test_padded_histories_equal_a_loop(sequences, max_length):
    assert_read(examples_of(sequences, max_length), sequences_of(sequences), max_length)


@pytest.mark.parametrize("max_length", [1, 3, 10])
def test_subsets_of_rows_have_the_same_histories(max_length):
    sequences = [[1, 2, 3, 4, 5], [6, 7], [8, 0, 1], [4, 4, 4, 4]]
    split = examples_of(sequences, max_length)
    for rows in ([5, 1, 6], range(3, 8)):
        assert_read(split.select(rows), sequences_of(sequences), max_length)


@pytest.mark.parametrize("max_length", [3, 6])
def test_histories_equal_those_of_the_prepared_split(tmp_path, max_length):
    """`Rows` cuts histories from the sequences as `llm2rec.data` cut the column ``history``."""
    data = prepare(Toy(n_users=30, n_items=60, n_worlds=5, history_length=6), tmp_path)
    for name, split in data.splits.items():
        rows, examples = Rows.of(data, name, max_length), split.to_list()
        batch = rows.batch(rows.units)
        for row, example in enumerate(examples):
            kept = example["history"][-max_length:]
            padded = kept + [60] * (max_length - len(kept))
            assert batch.history[row].tolist() == padded
            assert rows.histories_and_targets(np.array([row]))[0].tolist() == [*padded, example["target"]]
            assert (int(batch.lengths[row]), int(batch.targets[row])) == (len(kept), example["target"])


def test_batch_contains_the_requested_rows():
    data, rows = random_rows(6, N, 3), np.array([4, 0, 4])
    batch = data.batch(rows)
    expected = dict(zip(("history", "lengths"), data.histories(rows), strict=True)) | {"targets": data.targets[rows]}
    for name in ("history", "lengths", "targets"):
        values = getattr(batch, name)
        assert values.dtype == torch.int64
        assert values.tolist() == expected[name].tolist()


def slow_mask(scores, split, sequences, rows):
    masked = scores.clone()
    examples, lists = split.to_list(), sequences.to_list()
    for number, row in enumerate(rows):
        example = examples[row]
        for item in lists[example["user_index"]]["items"][: example["position"]]:
            if item != example["target"]:
                masked[number, item] = -torch.inf
    return masked


@quick
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_masked_seen_items_equal_a_loop(sequences, random):
    split, lists = examples_of(sequences, 3), sequences_of(sequences)
    rows = np.array([random.randrange(len(split)) for _ in range(5)])
    scores = torch.arange(5 * N, dtype=torch.float32).view(5, N)
    targets = torch.tensor(split["target"])[torch.from_numpy(rows)]
    before = scores.clone()
    masked = SeenItems(Rows.from_tables(split, lists, N, 3)).mask(scores, rows, targets)
    assert torch.equal(masked, slow_mask(scores, split, lists, rows))
    assert torch.equal(scores, before)  # the scores handed in are not changed


def test_items_before_the_history_are_masked_too():
    split, lists = examples_of([[0, 1, 2, 3, 4, 5]], history_length=1), sequences_of([[0, 1, 2, 3, 4, 5]])
    masked = SeenItems(Rows.from_tables(split, lists, N, 1)).mask(torch.zeros(1, N), np.array([4]), torch.tensor([5]))
    assert torch.isinf(masked)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mask_seen", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_evaluation_equals_a_plain_computation(tmp_path, mask_seen, batch_size):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(N, size=generator.integers(2, 7)).tolist() for _ in range(12)]
    split, lists = examples_of(sequences, 4), sequences_of(sequences)
    data = Rows.from_tables(split, lists, N, 4)
    torch.manual_seed(0)
    model = build_model("gru4rec", n_items=N, width=6, max_length=4, hidden_width=5, dropout=0.5)
    seen = SeenItems(data) if mask_seen else None
    ranks = rank_targets(model.train(), data, engine_in(tmp_path), seen=seen, batch_size=batch_size)
    assert model.training  # put back

    model.eval()  # without dropout
    expected = []
    for row in range(len(data)):
        history, lengths = (torch.from_numpy(each).long() for each in data.histories(np.array([row])))
        scores = model.score(model(history[:, : lengths[0]], lengths)).detach()
        if mask_seen:
            scores = slow_mask(scores, split, lists, [row])
        expected.append(target_ranks(scores, data.targets[row : row + 1].long()).item())
    assert ranks.tolist() == expected
    assert ranks.dtype == torch.int64
    assert len(ranks) == len(split)
    assert not rank_targets(model, data, engine_in(tmp_path), seen=seen).is_inference()


def test_seen_items_as_pairs():
    split, lists = examples_of([[0, 1, 0, 2], [4, 5]], 1), sequences_of([[0, 1, 0, 2], [4, 5]])
    seen = SeenItems(Rows.from_tables(split, lists, N, 1))
    place, items = seen.pairs(np.array([2, 3, 0]))
    assert list(zip(place.tolist(), items.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 0), (1, 4), (2, 0)]
    others = seen.pairs_without_targets(np.array([2, 3, 0]), torch.tensor([0, 5, 0]))
    assert [each.tolist() for each in others] == [[0, 1], [1, 4]]
    padded = seen.padded_without_targets(np.array([2, 3, 0]), np.array([0, 5, 0]))
    assert padded.tolist() == [[N, 1, N], [4, N, N], [N, N, N]]


def test_masking_seen_items_never_lowers_a_target(tmp_path):
    sequences = [[0, 1, 2, 0, 3], [4, 5, 6, 7, 8]]
    split, lists = examples_of(sequences, 4), sequences_of(sequences)
    data, engine = Rows.from_tables(split, lists, N, 4), engine_in(tmp_path)
    torch.manual_seed(0)
    model = build_model("sasrec", n_items=N, width=4, max_length=4)
    masked = rank_targets(model, data, engine, seen=SeenItems(data))
    assert (masked <= rank_targets(model, data, engine)).all()
    assert (masked < rank_targets(model, data, engine)).any()
