"""The mixture against plain NumPy, its ranks, and a folder that holds it."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from ensemble_helpers import members_of, rows_of, toy_in, weights_of

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, write_json
from llm2rec.ensemble.members import ItemNeighbours, TitleNeighbours
from llm2rec.ensemble.model import Ensemble, GroupWeights, rank_targets
from llm2rec.ensemble.neighbours import Neighbours, training_sequences
from llm2rec.ensemble.store import counted, load_ensemble, save_ensemble
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.models import load_student


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_in(tmp_path_factory.mktemp("toy"))


def whole(rows):
    return rows.batch(np.arange(len(rows)))


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def histories(toy, rows):
    """All items before each target."""
    units = rows.rows.units
    for user, position in zip(rows.rows.users[units], rows.rows.positions[units], strict=True):
        yield int(user), toy.data.sequences["items"][int(user)][: int(position)]


@functools.cache
def student_in(place):
    return load_student(place).eval()


def student_probs(place, history, temperature):
    model = student_in(place)
    recent = torch.tensor([history[-model.max_length :]])
    with torch.no_grad():
        scores = model.score(model(recent, torch.tensor([recent.shape[1]])))[0]
    return softmax(scores.double().numpy() / temperature)


def neighbour_probs(toy, history, user, temperature):
    if not hasattr(toy, "counts"):
        toy.counts = Neighbours(training_sequences(toy.data), toy.data.n_items)
    counts = toy.counts
    recent = torch.tensor([history[-10:]])
    users = None if user is None else np.array([user])
    scores = counts.scores(recent, torch.tensor([recent.shape[1]]), users)[0].double().numpy() ** (1 / temperature)
    return scores / scores.sum() if scores.sum() > 0 else None


def title_probs(vectors, history, whitening, decay, length, temperature):
    """With a singular value decomposition, where the program takes eigenvectors."""
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    prepared = left * singular * (singular / np.sqrt(len(vectors))) ** -whitening
    prepared /= np.linalg.norm(prepared, axis=1, keepdims=True)
    user = sum(decay**age * prepared[item] for age, item in enumerate(history[::-1][:length]))
    return softmax(prepared @ (user / np.linalg.norm(user)) / temperature)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_mixture_is_that_of_plain_numpy(toy, split):
    rows, weights = rows_of(toy, split), weights_of()
    found = Ensemble(members_of(toy), weights).probabilities(whole(rows)).double().numpy()
    n_unknown = 0
    for row, (user, history) in enumerate(histories(toy, rows)):
        parts = [(0.15, student_probs(place, history, 1.5)) for place in toy.places.values()]
        parts.append((0.5, title_probs(toy.vectors, history, 0.5, 0.8, 7, 0.2)))
        near = neighbour_probs(toy, history, user if split == "train" else None, 0.8)
        n_unknown += near is None
        parts += [] if near is None else [(0.2, near)]
        expected = sum(share * probs for share, probs in parts) / sum(share for share, _ in parts)
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=1e-7)
    assert n_unknown < row


@pytest.mark.parametrize("whitening", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("decay", [0.6, 1.0])
def test_title_neighbours_agree_with_plain_numpy(toy, whitening, decay):
    rows = rows_of(toy, "validation")
    member = TitleNeighbours(toy.vectors, {}, whitening=whitening, decay=decay, history=3)
    scores = member.scores(whole(rows)).double().numpy()
    for row, (_, history) in enumerate(histories(toy, rows)):
        expected = title_probs(toy.vectors, history, whitening, decay, 3, 0.1)
        np.testing.assert_allclose(softmax(scores[row] / 0.1), expected, rtol=1e-3, atol=1e-7)
    changed = TitleNeighbours(toy.vectors, {}, history=3).changed({"whitening": whitening, "decay": decay})
    assert torch.equal(changed.scores(whole(rows)), member.scores(whole(rows)))
    assert torch.equal(changed.item_vectors, toy.vectors), "raw"


@pytest.mark.parametrize("neighbours", [0.4, 1.0])
def test_the_share_of_who_does_not_know_a_history_goes_to_the_others(toy, neighbours):
    students, unknowing = members_of(toy)[:2], ItemNeighbours(Neighbours([], toy.data.n_items), 10)
    weights, batch = weights_of(1 - neighbours, neighbours), whole(rows_of(toy, "validation"))
    torch.testing.assert_close(
        Ensemble([*students, unknowing], weights).probabilities(batch),
        Ensemble(students, weights).probabilities(batch),
    )
    uniform = Ensemble([unknowing], weights).probabilities(batch)
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / toy.data.n_items))


def test_members_without_a_share_say_nothing_about_other_histories(toy):
    members, batch = members_of(toy)[:3], whole(rows_of(toy, "validation"))
    found = Ensemble(members, weights_of(0.0, 1.0)).probabilities(batch)
    scores = members[2].scores(batch)
    known = (scores > -torch.inf).any(dim=1)
    assert known.any()
    assert (found[known][scores[known] == -torch.inf] == 0).all()
    assert (found > 0).any(dim=1).all()


@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_ranked_as_one_by_one(toy, tmp_path, progress_lines, masked):
    rows, ensemble = rows_of(toy, "validation"), Ensemble(members_of(toy), weights_of())
    seen = SeenItems(rows.rows) if masked else None
    ranks = rank_targets(ensemble, rows, engine_in(tmp_path), seen=seen, batch_rows=7)
    assert "count neighbours" in progress_lines()
    assert progress_lines()["rank"].startswith(f"{len(rows)} of {len(rows)} rows, ")
    scores = ensemble.probabilities(whole(rows))
    for row, (user, target) in enumerate(zip(rows.rows.users[rows.rows.units], rows.rows.targets, strict=True)):
        had = toy.data.sequences["items"][int(user)][:-2] if masked else []
        others = set(range(toy.data.n_items)) - set(had) - {int(target)}
        assert ranks[row] == sum(scores[row, item].item() >= scores[row, target].item() for item in others)


def test_any_number_of_processes_ranks_the_same_batches(toy, tmp_path):
    """Sizes of batches show in the last bits, so that a process takes whole batches and keeps what is its own."""
    rows, ensemble, scored = rows_of(toy, "validation"), Ensemble(members_of(toy), weights_of()), []
    probabilities = ensemble.probabilities
    ensemble.probabilities = lambda batch: scored.append(len(batch.targets)) or probabilities(batch)
    every = rank_targets(ensemble, rows, engine_in(tmp_path), batch_rows=7)
    sizes = [7] * (len(rows) // 7) + ([len(rows) % 7] if len(rows) % 7 else [])
    assert scored == sizes
    for part in np.array_split(np.arange(len(rows)), 3):
        share = SimpleNamespace(device="cpu", my_rows=lambda n, part=part: part, gather_rows=lambda mine, n: mine)
        scored.clear()
        assert torch.equal(rank_targets(ensemble, rows, share, batch_rows=7), every[part])
        assert scored == sizes[part[0] // 7 : part[-1] // 7 + 1]
    nothing = SimpleNamespace(device="cpu", my_rows=lambda n: np.arange(0), gather_rows=lambda mine, n: mine)
    assert len(rank_targets(ensemble, rows, nothing)) == 0


def test_histories_are_cut_to_what_a_member_reads(toy):
    batch = whole(rows_of(toy, "validation", 9))
    for length in (1, 4, 9, 20):
        history, lengths = batch.recent(length)
        assert history.shape == (len(batch.rows), length)
        for row in range(len(history)):
            items = batch.history[row, : batch.lengths[row]].tolist()[-length:]
            assert history[row].tolist() == items + [toy.data.n_items] * (length - len(items))
            assert lengths[row] == len(items)


def test_a_saved_ensemble_is_the_same(toy, tmp_path):
    members, batch = members_of(toy), whole(rows_of(toy, "validation"))
    ensemble = Ensemble(members, weights_of())
    save_ensemble(tmp_path / "ensemble", members, weights_of(), toy.places)
    loaded = load_ensemble(tmp_path / "ensemble", toy.data)
    assert torch.equal(loaded.probabilities(batch), ensemble.probabilities(batch))
    assert loaded.n_parameters == ensemble.n_parameters > toy.vectors.numel()
    assert [member.about for member in loaded.members] == [member.about for member in members]
    with pytest.raises(CheckpointError, match="holds no ensemble"):
        load_ensemble(tmp_path, toy.data)
    config = read_json(tmp_path / "ensemble" / "config.json")
    for key, value in (("kind", "unknown"), ("about", 3), ("folder", None), ("max_length", "x")):
        damaged = [dict(each) for each in config["members"]]
        damaged[0][key] = value
        write_json(tmp_path / "ensemble" / "config.json", config | {"members": damaged})
        with pytest.raises(CheckpointError, match="holds a damaged ensemble"):
            load_ensemble(tmp_path / "ensemble", toy.data)
    (tmp_path / "ensemble" / "member_1" / "model.safetensors").write_bytes(b"?")
    write_json(tmp_path / "ensemble" / "config.json", config)
    with pytest.raises(CheckpointError, match="member_1"):
        load_ensemble(tmp_path / "ensemble", toy.data)
    for damaged in ("{", "[]", "{}", '{"members": ["member_0"], "neighbours": "x"}', '{"members": 3, "neighbours": 0}'):
        (tmp_path / "ensemble" / "config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="holds a damaged ensemble"):
            load_ensemble(tmp_path / "ensemble", toy.data)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_ensembles_of_earlier_versions_are_loaded(toy, tmp_path, share):
    """Students with equal weights, and a power of 1.5 of the neighbours' scores."""
    folder = tmp_path / "ensemble"
    save_ensemble(folder, members_of(toy)[:2], weights_of(), toy.places)
    write_json(folder / "config.json", {"members": ["member_0", "member_1"], "neighbours": share})
    rows = rows_of(toy, "validation", 6)
    found = load_ensemble(folder, toy.data).probabilities(whole(rows)).double().numpy()
    for row, (_, history) in enumerate(histories(toy, rows)):
        expected = sum(student_probs(place, history, 1) for place in toy.places.values()) / 2
        near = neighbour_probs(toy, history[-6:], None, 2 / 3)
        if near is not None:
            expected = (1 - share) * expected + share * near
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=1e-7)


def test_an_ensemble_has_members(toy):
    with pytest.raises(ConfigError, match="no members"):
        Ensemble([], {"neighbours": GroupWeights(1.0, 1.0)})
    assert Ensemble([counted(toy.data)], weights_of()).max_length == toy.data.history_length
