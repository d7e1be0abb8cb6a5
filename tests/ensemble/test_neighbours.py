"""Item neighbours: their counts against plain loops, and what is kept from them."""

import dataclasses

import numpy as np
import pytest
import torch

from llm2rec.data import Toy, prepare
from llm2rec.ensemble.neighbours import (
    BACKWARDS,
    DECAY,
    FORGETTING,
    SHRINKAGE,
    STEPS,
    Neighbours,
    sharpened,
    training_sequences,
)

N = 9
SEQUENCES = [np.array(items, int) for items in ([0, 1, 2, 3, 0, 4, 5, 6], [3, 3, 1], [7], [], [2, 1, 0, 5])]


def counted(sequences, item, other):
    """How near an item is to another one, pair by pair."""
    near = 0.0
    for sequence in sequences:
        for i, first in enumerate(sequence):
            for j, second in enumerate(sequence):
                if i != j and abs(i - j) <= STEPS and (first, second) == (item, other):
                    near += DECAY ** (abs(i - j) - 1) * (1.0 if j > i else BACKWARDS)
    counts = [sum((each == x).sum() for each in SEQUENCES) for x in (item, other)]
    return near / np.sqrt((counts[0] + SHRINKAGE) * (counts[1] + SHRINKAGE))


def by_loops(sequences, history):
    return [
        sum(FORGETTING**age * counted(sequences, item, x) for age, item in enumerate(history[::-1])) for x in range(N)
    ]


def padded(histories, n_items=N):
    lengths = torch.tensor([len(history) for history in histories])
    table = torch.full((len(histories), int(lengths.max())), n_items)
    for row, history in enumerate(histories):
        table[row, : len(history)] = torch.as_tensor(history)
    return table, lengths


def test_neighbours_agree_with_loops():
    histories = [[0, 1], [3], [8, 8], [5, 2, 2]]
    scores = Neighbours(SEQUENCES, N).scores(*padded(histories))
    expected = torch.tensor([by_loops(SEQUENCES, history) for history in histories]).float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-12)
    assert scores[2].tolist() == [0] * N, "nobody has had item 8"


def test_own_pairs_of_a_user_are_left_out():
    histories, users = [], []
    for user in (4, 0, 1):
        histories += [SEQUENCES[user][: place + 1].tolist() for place in range(len(SEQUENCES[user]))]
        users += [user] * len(SEQUENCES[user])
    order = np.random.default_rng(0).permutation(len(users))  # rows of a user need not lie together
    histories, users = [histories[each] for each in order], np.array(users)[order]
    scores = Neighbours(SEQUENCES, N).scores(*padded(histories), users)
    for score, history, user in zip(scores, histories, users, strict=True):
        others = [sequence if number != user else np.empty(0, int) for number, sequence in enumerate(SEQUENCES)]
        torch.testing.assert_close(score, torch.tensor(by_loops(others, history)).float(), rtol=1e-5, atol=1e-12)
    everything = Neighbours(SEQUENCES, N).scores(*padded(histories))
    assert not torch.allclose(scores, everything, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("times", [1, 2, 7])
def test_nothing_remains_of_pairs_of_one_user_alone(times):
    """Made a distribution, the least rest would be a certainty, and often the row's own target."""
    alone = np.tile(np.random.default_rng(0).permutation(60), times)
    sequences = [np.array([60, 61]), alone]
    histories = [alone[max(0, end - 10) : end].tolist() for end in range(1, len(alone))]
    neighbours = Neighbours(sequences, 62)
    scores = neighbours.scores(*padded(histories, 62), np.ones(len(histories), int))
    assert (sharpened(scores) == 0).all()
    assert (sharpened(neighbours.scores(*padded(histories, 62))).sum(dim=1) > 0.999).all()


def test_nothing_counted_is_no_error():
    assert Neighbours([], N).scores(*padded([[1]])).tolist() == [[0] * N]


def test_sharpening_makes_a_distribution():
    told = sharpened(torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(told, torch.tensor([[1 / 9, 8 / 9, 0.0], [0.0, 0.0, 0.0]]))


class TimedToy(Toy):
    """The toy with a clock for all users."""

    def read(self):
        raw = super().read()
        days = raw.interactions["user_id"].str[1:].astype("int64") % 7
        return dataclasses.replace(raw, interactions=raw.interactions.assign(timestamp=lambda d: d["timestamp"] + days))


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_nothing_that_is_held_out_is_counted(tmp_path, split):
    data = prepare(TimedToy(n_users=40, n_items=30, n_volumes=3, n_worlds=2, split=split), tmp_path)
    found = training_sequences(data)
    rows = data.splits["train"]
    for user, (sequence, known) in enumerate(zip(data.sequences["items"], found, strict=True)):
        asked = [row for row in rows if row["user_index"] == user]
        end = max((row["position"] for row in asked), default=-1) + 1
        assert known.tolist() == sequence[:end]
        assert all(row["target"] in known for row in asked)
    held_out = sum(len(items) for items in data.sequences["items"]) - sum(map(len, found))
    assert held_out >= len(data.splits["validation"]) + len(data.splits["test"])
