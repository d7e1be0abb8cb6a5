"""The search: what it measures, what it finds, what it leaves as given; and the record of members."""

import math

import numpy as np
import pytest
import torch
from ensemble_helpers import Planted, members_of, rows_of, toy_in, weights_of

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics, target_ranks
from llm2rec.ensemble.choice import Choice, chosen_weights, given_weights, member_table
from llm2rec.ensemble.members import TitleNeighbours
from llm2rec.ensemble.model import Ensemble, GroupWeights
from llm2rec.ensemble.search import Free, Sample, normalised, sample_rows
from llm2rec.ensemble.settings import EnsembleSettings, NeighboursSettings, StudentsSettings, TitlesSettings
from llm2rec.student.datamodule import SeenItems


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_in(tmp_path_factory.mktemp("toy"))


def sample_of(toy, members, weights, numbers, seen=None, n_items_at_once=9):
    return Sample(
        members,
        rows_of(toy, "validation"),
        numbers,
        "ndcg@10",
        temperatures={group: (each.temperature,) for group, each in weights.items()},
        variants={group: [each.options] for group, each in weights.items()},
        seen=seen,
        batch_rows=n_items_at_once,
    )


def measured(toy, ensemble, numbers, masked=False):
    rows = rows_of(toy, "validation")
    batch = rows.batch(numbers)
    probs = ensemble.probabilities(batch)
    if masked:
        probs = SeenItems(rows.rows).mask(probs, numbers, batch.targets)
    return ranking_metrics(target_ranks(probs, batch.targets))["ndcg@10"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_try_measures_the_mixture(toy, masked):
    members, weights, numbers = members_of(toy), weights_of(), np.arange(1, 35, 2)
    seen = SeenItems(rows_of(toy, "validation").rows) if masked else None
    sample = sample_of(toy, members, weights, numbers, seen)
    assert sample.value(weights) == pytest.approx(measured(toy, Ensemble(members, weights), numbers, masked))
    for number in range(len(members)):
        others = members[:number] + members[number + 1 :]
        left = dict(weights)
        if number < 2:  # the other student keeps what it had
            left["students"] = GroupWeights(0.15, 1.5)
        expected = measured(toy, Ensemble(others, left), numbers, masked)
        assert sample.value(weights, without=number) == pytest.approx(expected)
        if members[number].kind != "neighbours":  # which do not know every history
            alone = measured(toy, Ensemble([members[number]], weights), numbers, masked)
            assert sample.value(weights, only=number) == pytest.approx(alone)


def test_best_items_are_enough_for_the_ranks_that_count(toy, monkeypatch):
    from llm2rec.ensemble import search

    weights, numbers = weights_of(), np.arange(40)
    every = sample_of(toy, members_of(toy), weights, numbers)
    monkeypatch.setattr(search, "_N_BEST", 12)
    few = sample_of(toy, members_of(toy), weights, numbers)
    assert few.value(weights) == pytest.approx(every.value(weights), abs=0.01)


def chosen(toy, members, settings=None, numbers=None, seen=None, **more):
    rows = rows_of(toy, "validation")
    numbers = np.arange(len(rows)) if numbers is None else numbers
    return chosen_weights(members, settings or EnsembleSettings(**more), rows, numbers, "ndcg@10", 7, seen=seen)


def test_the_search_finds_a_planted_member(toy):
    members = [*members_of(toy), Planted("oracle", 1.1, toy.data.n_items)]
    choice = chosen(toy, members)
    assert choice.search["value"] == 1.0
    oracle = choice.members[-1]
    assert oracle["alone"] == 1.0
    assert oracle["without"] < 0.9
    assert oracle["share"] > 0
    assert choice.search["rows"] == 40
    assert choice.search["trials"] > 20


def test_the_search_uses_members_that_know_different_rows(toy):
    halves = [Planted("first", 0.5, toy.data.n_items, 1), Planted("second", 0.5, toy.data.n_items, 2)]
    choice = chosen(toy, halves)
    alone = [each["alone"] for each in choice.members]
    assert choice.search["value"] > max(alone) + 0.1
    assert all(each["without"] == pytest.approx(other) for each, other in zip(choice.members, alone[::-1], strict=True))


def test_the_search_whitens_vectors_that_are_worth_nothing_before(toy):
    """One direction outweighs all others, as in vectors of a decoder."""
    rows = rows_of(toy, "validation")
    batch = rows.batch(np.arange(len(rows)))
    torch.manual_seed(0)
    vectors, numbers, used = torch.randn(toy.data.n_items, 16), [], set()
    for number, (history, length) in enumerate(zip(batch.history, batch.lengths, strict=True)):
        last, target = int(history[length - 1]), int(batch.targets[number])
        if not used & {last, target} and last != target:
            used |= {last, target}
            numbers.append(number)
            vectors[target] = vectors[last] + 0.1 * torch.randn(16)
    vectors[:, 0] = 300 * torch.randn(len(vectors))
    titles = TitleNeighbours(vectors, {"llm": "some"}, history=1)
    choice = chosen(toy, [*members_of(toy)[:3], titles], numbers=np.array(numbers))
    assert choice.members[-1]["whitening"] >= 0.5
    assert choice.members[-1]["without"] < choice.search["value"] - 0.05


def test_given_values_are_kept(toy):
    settings = EnsembleSettings(
        titles=TitlesSettings(share=0.5, decay=0.9, temperature=0.123), students=StudentsSettings(temperature=2.5)
    )
    weights = chosen(toy, members_of(toy), settings).weights
    assert weights["titles"].share == pytest.approx(0.5)
    assert (weights["titles"].temperature, weights["titles"].options["decay"]) == (0.123, 0.9)
    assert weights["students"].temperature == 2.5
    assert weights["students"].share + weights["neighbours"].share == pytest.approx(0.5)

    everything = EnsembleSettings(
        titles=TitlesSettings(share=0.6, decay=0.9, temperature=0.1, whitening=0.3),
        students=StudentsSettings(share=0.2, temperature=1.0),
        neighbours=NeighboursSettings(share=0.1, temperature=0.5),
    )
    choice = chosen(toy, members_of(toy), everything)
    assert choice.search["trials"] == 1
    assert [weights.share for weights in choice.weights.values()] == pytest.approx([2 / 9, 1 / 9, 6 / 9])


def test_a_given_zero_stays(toy):
    settings = EnsembleSettings(neighbours=NeighboursSettings(share=1.0))
    weights = chosen(toy, members_of(toy)[:3], settings).weights
    assert (weights["students"].share, weights["neighbours"].share) == (0.0, 1.0)
    with pytest.raises(ConfigError, match="no member of the ensemble has a share"):
        given_weights(members_of(toy)[:2], EnsembleSettings(students=StudentsSettings(share=0.0)))


def test_a_choice_is_the_same_again_and_survives_its_file(toy):
    members = members_of(toy)
    first, again = (chosen(toy, members, numbers=np.arange(0, 40, 3)) for _ in range(2))
    assert first == again
    assert Choice.of(first.to_dict()) == first
    assert sum(each["share"] for each in first.members) == pytest.approx(1)
    table = member_table(first)
    assert len(table) == len(members) + 2
    assert "student run_1" in table[1]
    assert "titles some (whitening" in table[4]


def test_a_member_alone_is_measured_too(toy):
    (member,) = chosen(toy, members_of(toy)[2:3]).members
    assert member["share"] == 1
    assert member["without"] is None
    assert math.isfinite(member["alone"])


def test_shares_are_normalised():
    weights = {name: GroupWeights(share, 1.0) for name, share in (("a", 0.3), ("b", 0.3), ("c", 0.4))}

    def shares(free):
        return [round(each.share, 6) for each in normalised(weights, free).values()]

    free, fixed = Free(), Free(share=False)
    assert shares({"a": free, "b": free, "c": fixed}) == [0.3, 0.3, 0.4]
    assert shares({"a": fixed, "b": fixed, "c": free}) == [0.3, 0.3, 0.4]
    weights["c"] = GroupWeights(1.4, 1.0)
    assert shares({"a": free, "b": free, "c": free}) == [0.15, 0.15, 0.7]
    weights["a"] = weights["b"] = GroupWeights(0.0, 1.0)
    weights["c"] = GroupWeights(0.5, 1.0)
    assert shares({"a": free, "b": free, "c": fixed}) == [0.25, 0.25, 0.5]
    assert shares({"a": fixed, "b": fixed, "c": fixed}) == [0, 0, 1]


def test_rows_of_a_sample_are_a_seeded_choice():
    rows = sample_rows(100, 30, 1)
    assert len(set(rows.tolist())) == 30
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(100, 30, 1))
    assert not np.array_equal(rows, sample_rows(100, 30, 2))
    assert np.array_equal(sample_rows(5, 30, 1), np.arange(5))
