"""The ensemble: its distribution, its ranks, and a folder that holds it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import engine_in

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.data import Toy, prepare
from llm2rec.ensemble.model import Ensemble, ensemble_of, load_ensemble, rank_targets, save_ensemble
from llm2rec.ensemble.neighbours import Neighbours, sharpened, training_sequences
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import build_model, load_student
from llm2rec.student.store import save_student


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small dataset and two random students."""
    folder = tmp_path_factory.mktemp("toy")
    data = prepare(Toy(n_users=40, n_items=30, n_volumes=3, n_worlds=2), folder / "processed")
    places = []
    for seed, name in ((1, "sasrec"), (2, "gru4rec")):
        torch.manual_seed(seed)
        arguments = {"n_items": data.n_items, "width": 8, "max_length": 5}
        places.append(folder / f"student_{seed}")
        save_student(places[-1], build_model(name, **arguments), name, arguments)
    return SimpleNamespace(data=data, places=places, members=[load_student(place) for place in places])


def rows_of(toy, split):
    return Rows.of(toy.data, split, 5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_members_and_neighbours_have_their_parts(toy, share, split):
    rows = rows_of(toy, split)
    batch = rows.batch(np.arange(len(rows)))
    users = np.asarray(toy.data.splits[split]["user_index"][:]) if split == "train" else None
    told = ensemble_of(toy.members, toy.data, share).probabilities(batch, users)
    known = Neighbours(training_sequences(toy.data), toy.data.n_items).scores(batch.history, batch.lengths, users)
    with torch.inference_mode():
        thought = sum(member.score(member(*batch.inputs)).softmax(dim=1) for member in toy.members) / 2
    shares = share * (known > 0).any(dim=1, keepdim=True)  # of a history without neighbours, members have it all
    torch.testing.assert_close(told, (1 - shares) * thought + shares * sharpened(known))
    torch.testing.assert_close(told.sum(dim=1), torch.ones(len(rows)))
    if share < 1:
        assert (told > 0).all()
    else:
        assert (told[shares.squeeze(1) > 0] == sharpened(known)[shares.squeeze(1) > 0]).all(), "members say nothing"


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_members_answer_for_histories_that_have_no_neighbours(toy, share):
    nobody = Ensemble(toy.members, Neighbours([], toy.data.n_items), share)
    rows = rows_of(toy, "validation")
    batch = rows.batch(np.arange(len(rows)))
    torch.testing.assert_close(
        nobody.probabilities(batch), ensemble_of(toy.members, toy.data, 0.0).probabilities(batch)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_ranked_as_one_by_one(toy, tmp_path, progress_lines, masked):
    rows = rows_of(toy, "validation")
    ensemble = ensemble_of(toy.members, toy.data, 0.5)
    seen = SeenItems(rows) if masked else None
    ranks = rank_targets(ensemble, rows, engine_in(tmp_path), seen=seen, batch_rows=7)
    assert "count neighbours" in progress_lines()
    assert progress_lines()["rank"].startswith(f"{len(rows)} of {len(rows)} rows, ")
    scores = ensemble.probabilities(rows.batch(np.arange(len(rows))))
    for row, (user, target) in enumerate(zip(rows.users[rows.units], rows.targets, strict=True)):
        had = toy.data.sequences["items"][int(user)][:-2] if masked else []
        others = set(range(toy.data.n_items)) - set(had) - {int(target)}
        assert ranks[row] == sum(scores[row, item].item() >= scores[row, target].item() for item in others)


def test_any_division_ranks_the_same_batches(toy, tmp_path):
    """Sizes of batches show in the last bits, so that a process takes whole batches and keeps what is its own."""
    rows, ensemble, asked = rows_of(toy, "validation"), ensemble_of(toy.members, toy.data, 0.5), []
    think = ensemble.probabilities
    ensemble.probabilities = lambda batch: asked.append(len(batch.targets)) or think(batch)
    engine = engine_in(tmp_path)
    whole = rank_targets(ensemble, rows, engine, batch_rows=7)
    sizes = [7] * (len(rows) // 7) + ([len(rows) % 7] if len(rows) % 7 else [])
    assert asked == sizes
    for part in np.array_split(np.arange(len(rows)), 3):
        share = SimpleNamespace(device="cpu", my_rows=lambda n, part=part: part, gather_rows=lambda mine, n: mine)
        asked.clear()
        assert torch.equal(rank_targets(ensemble, rows, share, batch_rows=7), whole[part])
        assert asked == sizes[part[0] // 7 : part[-1] // 7 + 1]
    nothing = SimpleNamespace(device="cpu", my_rows=lambda n: np.arange(0), gather_rows=lambda mine, n: mine)
    assert len(rank_targets(ensemble, rows, nothing)) == 0


def test_a_saved_ensemble_thinks_the_same(toy, tmp_path):
    save_ensemble(tmp_path / "ensemble", toy.places, 0.25)
    rows = rows_of(toy, "validation")
    batch = rows.batch(np.arange(len(rows)))
    ensemble = ensemble_of(toy.members, toy.data, 0.25)
    assert torch.equal(
        load_ensemble(tmp_path / "ensemble", toy.data).probabilities(batch), ensemble.probabilities(batch)
    )
    assert ensemble.item_vectors.shape == (toy.data.n_items, 16)
    assert ensemble.n_parameters > sum(weights.numel() for weights in ensemble.item_vectors)
    with pytest.raises(CheckpointError, match="holds no ensemble"):
        load_ensemble(tmp_path, toy.data)
    (tmp_path / "ensemble" / "member_1" / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match="member_1"):
        load_ensemble(tmp_path / "ensemble", toy.data)
    for damaged in ("{", "[]", "{}", '{"members": ["member_0"], "neighbours": "x"}', '{"members": 3, "neighbours": 0}'):
        (tmp_path / "ensemble" / "config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="holds a damaged ensemble"):
            load_ensemble(tmp_path / "ensemble", toy.data)


def test_members_must_read_the_same(toy):
    longer = build_model("sasrec", n_items=toy.data.n_items, width=8, max_length=6)
    with pytest.raises(ConfigError, match=r"histories of \[5, 6\] items"):
        ensemble_of([*toy.members, longer], toy.data, 0.5)
    with pytest.raises(ConfigError, match="no members"):
        ensemble_of([], toy.data, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"name": name} for name in ("", " ", "a/b", "a\\b", "a\nb", "..", "a" * 101)),
        {"neighbours": 1.5},
        {"neighbours": -0.1},
        {"top_k": 0},
        {"block_rows": 0},
        {"batch_rows": -3},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=re.escape(f"ensemble.{name} is {value!r}")):
        EnsembleSettings(**wrong)
