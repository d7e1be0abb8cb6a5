"""Segments train the same rows as windows."""

import numpy as np
import pytest
import torch
from engine_helpers import (
    Killed,
    assert_same_weights,
    engine_in,
    examples_of,
    killed_at,
    random_rows,
    sequences_of,
    written,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.engine import Engine
from llm2rec.data import Toy, prepare
from llm2rec.student.datamodule import Rows
from llm2rec.student.losses import cross_entropy
from llm2rec.student.models import build_model
from llm2rec.student.negatives import NegativeSampler
from llm2rec.student.trainer_baseline import train_baseline

N, L = 9, 4
BUILD = {"sasrec": {"n_blocks": 2, "positions": "oldest"}, "gru4rec": {"hidden_width": 7, "n_layers": 2}}
ITEMS = st.integers(0, N - 1)
SEQUENCES = st.lists(st.lists(ITEMS, min_size=2, max_size=14), min_size=1, max_size=6)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def users(n_users, longest, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(N, size=generator.integers(2, longest + 1)).tolist() for _ in range(n_users)]


def windows_of(sequences, max_length=L, held_out=0):
    return Rows.from_tables(examples_of(sequences, max_length, held_out), sequences_of(sequences), N, max_length)


def segments_of(sequences, max_length=L, stride=None, held_out=0):
    return windows_of(sequences, max_length, held_out).in_segments(stride)


def built(name, seed=0, **changes):
    torch.manual_seed(seed)
    model = build_model(name, **{"n_items": N, "width": 8, "max_length": L, "dropout": 0.0, **BUILD[name], **changes})
    with torch.no_grad():  # away from the small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.input_items.weight[N] = 0
    return model


def assert_rows_are_predicted_once(data, split, sequences, stride):
    """Check that each row is predicted once, by a pass over the items before its target only."""
    rows, everything = split.to_list(), data.batch(data.units)
    assert sorted(everything.rows.tolist()) == list(range(len(data))) == list(range(len(rows)))
    longest = everything.history.shape[1]
    assert longest <= data.max_length
    for number, target, place in zip(everything.rows, everything.targets.tolist(), everything.at.tolist(), strict=True):
        row = rows[number]
        segment, last = divmod(place, longest)
        assert last < everything.lengths[segment]
        read = everything.history[segment, : last + 1].tolist()
        assert read == sequences[row["user_index"]][: row["position"]][-len(read) :]
        assert target == row["target"] == data.targets[number]
        assert len(read) >= min(row["position"], data.max_length - stride + 1)
    padded = torch.arange(longest) >= everything.lengths.unsqueeze(1)
    assert torch.equal(everything.history == N, padded)


@quick
@given(SEQUENCES, st.integers(1, 8), st.data())
def test_every_row_is_predicted_once_from_earlier_items(sequences, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    held_out = data.draw(st.integers(0, 1 if min(map(len, sequences)) > 2 else 0))
    split = examples_of(sequences, max_length, held_out)
    made = segments_of(sequences, max_length, stride, held_out)
    assert_rows_are_predicted_once(made, split, sequences, stride)


def test_subsets_of_rows_are_predicted_once():
    """Rows that are not adjacent, and users without their first rows."""
    sequences = users(5, 14)
    split = examples_of(sequences, L)
    chosen = split.select([row for row in range(len(split)) if row % 7 not in (0, 3)])
    assert_rows_are_predicted_once(
        Rows.from_tables(chosen, sequences_of(sequences), N, L).in_segments(2), chosen, sequences, 2
    )


def test_segments_by_hand():
    """Ten items with nine targets: four rows first, then two per segment; each pass reads four items."""
    data = segments_of([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0]], max_length=4, stride=2)
    batch = data.batch(data.units)
    assert batch.history.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [5, 6, 7, 8]]
    assert batch.lengths.tolist() == [4, 4, 4, 4]
    assert data.sizes.tolist() == [4, 2, 2, 1]
    assert batch.rows.tolist() == list(range(9))
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert batch.at.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 15]
    assert segments_of([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0]], max_length=4).sizes.tolist() == [4, 2, 2, 1]  # half of L


def test_batch_is_padded_to_its_longest_segment_in_order():
    data = segments_of([[1, 2], [3, 4, 5, 6, 7], [8, 0, 1]])
    batch = data.batch(np.array([2, 0]))
    assert batch.history.tolist() == [[8, 0], [1, N]]
    assert (batch.rows.tolist(), batch.targets.tolist(), batch.at.tolist()) == ([5, 6, 0], [0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize("name", BUILD)
def test_user_vectors_of_segments_equal_those_of_histories(name):
    """Sequences of several segments, compared row by row with a pass over the items up to the row."""
    data, model = segments_of(users(6, 14)), built(name).double().eval()
    batch = data.batch(data.units)
    found = model(*batch.inputs)
    longest = batch.history.shape[1]
    for vector, place in zip(found, batch.at.tolist(), strict=True):
        segment, last = divmod(place, longest)
        read = batch.history[segment : segment + 1, : last + 1]
        torch.testing.assert_close(vector, model(read, torch.tensor([last + 1]))[0], rtol=1e-10, atol=1e-12)


def losses_and_gradients(model, data):
    """Loss of every row in row order, and the gradient of a sum with different weights per row."""
    batch = data.batch(data.units)
    losses = torch.nn.functional.cross_entropy(model.score(model(*batch.inputs)), batch.targets, reduction="none")
    in_order = torch.empty_like(losses).index_put((torch.from_numpy(batch.rows),), losses)
    gradients = torch.autograd.grad((in_order * torch.linspace(1, 2, len(data))).sum(), list(model.parameters()))
    return in_order, gradients


@pytest.mark.parametrize("name", BUILD)
def test_losses_and_gradients_equal_those_of_windows(name):
    sequences = users(12, L + 1)  # at most L items and a target, which one segment holds
    windows = windows_of(sequences)
    model = built(name).double().train()
    ours, theirs = (losses_and_gradients(model, data) for data in (segments_of(sequences), windows))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    for found, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_negatives_equal_those_of_windows():
    sequences, rows = users(8, 12), np.array([5, 0, 11, 3])
    windows, data = windows_of(sequences), segments_of(sequences)
    assert np.array_equal(np.sort(data.histories_and_targets(rows)), np.sort(windows.histories_and_targets(rows)))
    assert torch.equal(NegativeSampler(data, 3).draw(rows, 2), NegativeSampler(windows, 3).draw(rows, 2))


@pytest.mark.parametrize("examples", ["windows", "sequences"])
def test_max_length_above_the_history_length_raises(tmp_path, examples):
    data = prepare(Toy(n_users=20, n_items=60, n_worlds=5, history_length=3), tmp_path)
    assert Rows.of(data, "train", 3, examples).max_length == 3
    with pytest.raises(ConfigError, match=r"max_length is 4, but histories of toy have at most 3.*history_length=4"):
        Rows.of(data, "train", 4, examples)


# ---- training --------------------------------------------------------------------------------------------------------

SETTINGS = {"epochs": 3, "batch_size": 12, "micro_batch_size": 5, "learning_rate": 0.01, "max_grad_norm": 0.5}
SEQUENCES_TO_TRAIN = users(15, 12, seed=4)
TRAIN, VALIDATION = segments_of(SEQUENCES_TO_TRAIN), random_rows(20, N, L, seed=1)
PER_EPOCH = -(-len(TRAIN) // SETTINGS["batch_size"])


def train_in(folder, *, kind=Engine, name="sasrec", model_seed=0, train=TRAIN, dropout=0.2, **changes):
    engine = engine_in(folder, kind=kind, **{**SETTINGS, **changes})
    return train_baseline(built(name, model_seed, dropout=dropout), train, VALIDATION, engine)


@pytest.mark.parametrize("name", BUILD)
def test_training_equals_that_of_windows_for_equal_batches(tmp_path, name):
    """One step per epoch, so both use the same rows."""
    sequences = users(12, L + 1)
    windows = windows_of(sequences)
    changes = {"name": name, "dropout": 0.0, "batch_size": 1000, "micro_batch_size": 1000, "epochs": 5}
    for folder, train in (("windows", windows), ("segments", segments_of(sequences))):
        train_in(tmp_path / folder, train=train, **changes)
    ours, theirs = (written(tmp_path / folder, "validation")["history"] for folder in ("segments", "windows"))
    assert [entry["train/loss"] for entry in ours] == pytest.approx([entry["train/loss"] for entry in theirs], rel=1e-5)
    assert ours[-1]["train/loss"] < ours[0]["train/loss"]


def test_micro_batches_do_not_change_training(tmp_path):
    """Including micro-batches with fewer rows than a segment, or none."""
    trained = []
    for micro in (1000, 5, 2):
        folder = tmp_path / str(micro)
        model = train_in(folder, name="gru4rec", dropout=0.0, micro_batch_size=micro, epochs=2)
        trained.append((model.state_dict(), [e["train/loss"] for e in written(folder, "validation")["history"]]))
    for weights, losses in trained[1:]:
        torch.testing.assert_close(weights, trained[0][0], rtol=1e-3, atol=1e-4)
        assert losses == pytest.approx(trained[0][1], rel=1e-5)


def test_loss_is_a_mean_over_rows(tmp_path):
    """Not over segments, which predict different numbers of rows."""
    model = built("sasrec").eval()
    batch = TRAIN.batch(TRAIN.units)
    with torch.no_grad():
        expected = cross_entropy(model.score(model(*batch.inputs)), batch.targets).mean().item()
    train_in(tmp_path, dropout=0.0, epochs=1, learning_rate=1e-9)
    assert written(tmp_path, "validation")["history"][0]["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("killed_before", "checkpoint_every_steps"), [(1, 0), (PER_EPOCH + 1, 0), (8, 3)])
@pytest.mark.parametrize("name", BUILD)
def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path, name, killed_before, checkpoint_every_steps):
    changes = {"name": name, "checkpoint_every_steps": checkpoint_every_steps}
    whole = train_in(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", kind=killed_at(killed_before), **changes)
    resumed = train_in(tmp_path / "broken", model_seed=7 if killed_before > 1 else 0, **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    ours, theirs = (written(tmp_path / folder, "validation") for folder in ("broken", "whole"))
    assert ours == theirs
    assert [entry["step"] for entry in ours["history"]] == [PER_EPOCH, 2 * PER_EPOCH, 3 * PER_EPOCH]


def test_at_requires_positions_from_the_oldest():
    batch = TRAIN.batch(TRAIN.units)
    with pytest.raises(ConfigError, match="requires `positions='oldest'`"):
        built("sasrec", positions="recent")(*batch.inputs)
    with pytest.raises(ConfigError, match="`positions` is 'first', expected 'recent' or 'oldest'"):
        built("sasrec", positions="first")


def test_batch_smaller_than_a_segment_raises(tmp_path):
    with pytest.raises(ConfigError, match="`batch_size` is 3, but one sequence has up to 4 training rows"):
        train_in(tmp_path, batch_size=3)
