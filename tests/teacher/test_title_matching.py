"""Judging generated titles, and grounding them."""

import numpy as np
import pytest
import torch

from llm2rec.core.errors import ConfigError, DataError, NonFiniteError
from llm2rec.teacher.title import matching
from llm2rec.teacher.title.matching import TitleMatches, ground, judge

TITLES = ["Heat", "Heat 2", "Solaris ", "Amélie", "The Heat 2 Story"]


@pytest.mark.parametrize(
    ("text", "released", "longest"),  # which title is named, None where it is none or more than one
    [
        ("heat", "Heat", "Heat"),
        ("Heat 2", None, "Heat 2"),
        ("I say: HEAT 2!", None, "Heat 2"),
        ("Heat or Heat 2", None, None),
        ("the heat 2 story", None, "The Heat 2 Story"),
        ("Heat 2 or The Heat 2 Story", None, None),
        ("Solaris", "Solaris ", "Solaris "),  # the title's own space must not be asked for
        ("AMÉLIE", "Amélie", "Amélie"),
        ("Solaris, Amélie", None, None),
        ("", None, None),
    ],
)
@pytest.mark.parametrize("rule", ["released", "longest"])
def test_what_a_text_names(text, released, longest, rule):
    named = released if rule == "released" else longest
    matches = judge([text] * len(TITLES), [TITLES] * len(TITLES), TITLES, rule=rule)
    assert matches.correct.tolist() == [title == named for title in TITLES]
    assert matches.valid.all() == (named is not None)


def test_a_title_listed_twice_is_one_title_but_for_the_released_rule():
    given = (["Heat"], [["Heat", "heat", "Solaris"]], ["Heat"])
    assert judge(*given).correct.tolist() == [True]
    assert judge(*given, rule="released").valid.tolist() == [False]


def test_an_empty_title_is_never_found_but_for_the_released_rule():
    given = (["Heat"], [["Heat", " "]], ["Heat"])
    assert judge(*given).correct.tolist() == [True]
    assert judge(*given, rule="released").valid.tolist() == [False]


def test_the_metrics_name_their_denominators():
    matches = TitleMatches(np.array([1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 0, 0], bool))
    assert matches.metrics == {"hr@1": 2 / 5, "hr@1_valid": 2 / 3, "valid_ratio": 3 / 5}
    nothing = np.zeros(2, bool)
    assert TitleMatches(nothing, nothing).metrics == {"hr@1": 0, "hr@1_valid": 0, "valid_ratio": 0}


def test_rows_that_cannot_be_judged_are_refused():
    with pytest.raises(DataError, match=r"row 1.*'Dune' is not among its 5"):
        judge(["Heat", "Heat"], [TITLES, TITLES], ["Heat", "Dune"])
    assert not judge(["Dune"], [TITLES], ["Dune"], rule="released").correct.any()
    with pytest.raises(DataError, match="2 generated texts, 1 lists"):
        judge(["a", "b"], [["a"]], ["a"])
    with pytest.raises(DataError, match="at least one"):
        judge([], [], [])
    with pytest.raises(ConfigError, match="'longest' or 'released'"):
        judge(["a"], [["a"]], ["a"], rule="other")


def test_intervals_draw_both_parts_of_a_ratio_from_the_same_rows():
    generator = np.random.default_rng(3)
    valid = generator.random(300) < 0.4
    correct = valid & (generator.random(300) < 0.7)
    drawn = generator.integers(300, size=(4000, 300))
    matches, answered = correct[drawn].sum(1), valid[drawn].sum(1)
    ours = TitleMatches(valid, correct).intervals()
    for name, ratios in (("hr@1", matches / 300), ("valid_ratio", answered / 300), ("hr@1_valid", matches / answered)):
        np.testing.assert_allclose(ours[name], np.quantile(ratios, [0.025, 0.975]), atol=0.015)
    apart = np.quantile(matches / answered[::-1], [0.025, 0.975])
    assert np.abs(apart - ours["hr@1_valid"]).max() > 0.03, "the tolerance above would not see the mistake"


def test_without_valid_rows_their_rate_has_no_interval():
    nothing = np.zeros(4, bool)
    assert TitleMatches(nothing, nothing).intervals() == {"hr@1": (0, 0), "valid_ratio": (0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_items", [1, 7, 64, 1000])
def test_blocks_give_the_first_of_all_with_ties_to_the_lower_id(block_items, dtype):
    torch.manual_seed(0)
    items = torch.randn(30, 5).repeat(3, 1).to(dtype)  # every vector three times
    predictions = torch.cat([torch.randn(4, 5), items[7:8] + 0.0]).to(dtype)
    distances = (predictions.double().unsqueeze(1) - items.double()).norm(dim=2)
    order = distances.float().argsort(dim=1, stable=True)
    found = ground(predictions, items, k=12, block_items=block_items)
    assert found.items.dtype == torch.int64
    assert found.items.tolist() == order[:, :12].tolist()
    torch.testing.assert_close(found.distances, distances.gather(1, order)[:, :12].float())
    assert found.items[-1, :3].tolist() == [7, 37, 67]
    assert found.distances[-1, :3].tolist() == [0, 0, 0]
    everything = ground(predictions, items, k=90, block_items=block_items)
    assert everything.items.tolist() == order.tolist()


def test_blocks_keep_memory_down(monkeypatch):
    widest = 0

    def keys(predictions, block, start, make=matching._keys):
        nonlocal widest
        widest = max(widest, len(block))
        return make(predictions, block, start)

    monkeypatch.setattr(matching, "_keys", keys)
    ground(torch.randn(2, 3), torch.randn(100, 3), k=5, block_items=16)
    assert widest == 16


def test_vectors_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match=r"\(2, 3\) and item vectors of shape \(9, 4\)"):
        ground(torch.zeros(2, 3), torch.zeros(9, 4), k=1)
    for k in (0, 10):
        with pytest.raises(ConfigError, match="1 <= k <= 9"):
            ground(torch.zeros(2, 3), torch.zeros(9, 3), k=k)
    for predictions, items in ((torch.nan, 0.0), (0.0, torch.nan), (0.0, torch.inf)):
        vectors = torch.zeros(9, 3)
        vectors[8, 1] = items
        with pytest.raises(NonFiniteError):
            ground(torch.full((2, 3), predictions), vectors, k=1, block_items=4)
