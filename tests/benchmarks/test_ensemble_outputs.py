"""A teacher of baselines and item neighbours: its counts against plain loops, and what it writes."""

import json

import numpy as np
import pytest
import torch
from ensemble_outputs import Mixture, mean_of, sharpened, write, write_ranks
from item_neighbours import BACKWARDS, DECAY, FORGETTING, SHRINKAGE, STEPS, Neighbours

from llm2rec.data import Toy, prepare
from llm2rec.distill.data_bridge import read_outputs
from llm2rec.student.datamodule import SequenceData
from llm2rec.student.models import build_model
from llm2rec.student.store import load_student, save_student

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


def test_neighbours_agree_with_loops():
    histories = [np.array([0, 1]), np.array([3]), np.array([8, 8]), np.array([5, 2, 2])]
    scores = Neighbours(SEQUENCES, N).scores(histories)
    expected = torch.tensor([by_loops(SEQUENCES, history) for history in histories]).float()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-9)
    assert scores[2].tolist() == [0] * N, "nobody has had item 8"


@pytest.mark.parametrize("user", [0, 1, 4])
def test_a_users_own_sequence_tells_nothing_of_the_users_rows(user):
    others = [sequence if number != user else np.empty(0, int) for number, sequence in enumerate(SEQUENCES)]
    histories = [SEQUENCES[user][: place + 1] for place in range(len(SEQUENCES[user]))]
    scores = Neighbours(SEQUENCES, N).scores(histories, np.full(len(histories), user))
    expected = torch.tensor([by_loops(others, history) for history in histories]).float()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-9)
    assert not torch.allclose(scores, Neighbours(SEQUENCES, N).scores(histories), rtol=1e-4, atol=2e-9)


def test_sharpening_makes_a_distribution():
    told = sharpened(torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(told, torch.tensor([[1 / 9, 8 / 9, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_student_can_read_what_is_written(tmp_path, share):
    data = prepare(Toy(n_users=40, n_items=30, n_volumes=3, n_worlds=2), tmp_path / "processed")
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        arguments = {"n_items": data.n_items, "width": 8, "max_length": 5}
        runs.append(tmp_path / f"run_{seed}")
        items = data.items.with_format("arrow")[:]
        save_student(runs[-1] / "student", build_model("sasrec", **arguments), "sasrec", arguments, items, "")
    mixture = Mixture(data, runs, share)
    write(mixture, tmp_path / "out", 4)
    train = SequenceData.of(data.splits["train"], data.n_items, 5)
    told = read_outputs(
        tmp_path / "out", n_rows=len(train), n_items=data.n_items, fingerprint=data.fingerprint, top_k=4
    )
    rows = np.arange(len(train))
    with torch.inference_mode():
        members = mean_of([load_student(run / "student") for run in runs], train.batch(rows).inputs)
    held_out = [np.asarray(items)[:-2] for items in data.sequences["items"]]
    histories = [np.asarray(history) for history in data.splits["train"]["history"]]
    known = Neighbours(held_out, data.n_items).scores(histories, np.asarray(data.splits["train"]["user_index"]))
    expected = (1 - share) * members + share * sharpened(known)
    best = expected.topk(4, dim=1).values.clamp(min=1e-12)
    torch.testing.assert_close(torch.tensor(told.distance).exp(), 1 / best, rtol=1e-3, atol=1e-6)
    assert told.manifest["neighbours"] == share
    assert told.embeddings.shape == (data.n_items, 16)
    write_ranks(mixture, "validation", tmp_path / "mixture")
    ranks = np.load(tmp_path / "mixture" / "metrics" / "validation_ranks.npy")
    rows = data.splits["validation"]
    known = Neighbours(held_out, data.n_items).scores([np.asarray(history) for history in rows["history"]])
    batch = SequenceData.of(rows, data.n_items, 5).batch(np.arange(len(rows)))
    scores = (1 - share) * mean_of(mixture.members, batch.inputs) + share * sharpened(known)
    for row, (user, target) in enumerate(zip(rows["user_index"], rows["target"], strict=True)):
        others = set(range(data.n_items)) - set(data.sequences["items"][user][:-2]) - {target}
        assert ranks[row] == sum(scores[row, item].item() >= scores[row, target].item() for item in others)
    told = json.loads((tmp_path / "mixture" / "metrics" / "validation.json").read_text())
    assert told["hr@10"] == pytest.approx((ranks < 10).mean())
