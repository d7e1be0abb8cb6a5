import math

import pytest
import torch

from llm2rec.core.errors import NonFiniteError
from llm2rec.core.metrics import CUTOFFS, metric_names, ranking_metrics, target_ranks


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3.0, 2.0, 1.0], 0, 0),
        ([3.0, 2.0, 1.0], 2, 2),
        ([1.0, 1.0, 1.0, 1.0], 0, 3),  # all alike: the worst rank
        ([2.0, 1.0, 2.0, 0.0], 0, 1),  # one tie at the top
        ([2.0, 1.0, 2.0, 1.0], 3, 3),
        ([5.0, -math.inf, -math.inf], 0, 0),  # others out of the running
        ([-1.0, math.inf, -math.inf], 0, 1),
        ([0.0], 0, 0),
    ],
)
def test_ranks_by_hand(scores, target, rank):
    assert target_ranks(torch.tensor([scores]), torch.tensor([target])).tolist() == [rank]


def test_ranks_agree_with_counting():
    torch.manual_seed(0)
    scores, targets = torch.randint(0, 5, (50, 9)).float(), torch.randint(0, 9, (50,))  # many ties
    expected = [
        sum(scores[row, item].item() >= scores[row, t].item() for item in range(9) if item != t)
        for row, t in enumerate(targets.tolist())
    ]
    assert target_ranks(scores, targets).tolist() == expected


@pytest.mark.parametrize("position", [0, 1])
def test_nan_score_raises(position):
    scores = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    scores[1, position] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        target_ranks(scores, torch.tensor([0, 0]))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_target_with_non_finite_score_raises(value):
    with pytest.raises(NonFiniteError, match="target's score is not finite"):
        target_ranks(torch.tensor([[value, 0.0]]), torch.tensor([0]))


def test_metrics_by_hand():
    metrics = ranking_metrics(torch.tensor([0, 1, 4, 30]))
    gains = [1.0, 1 / math.log2(3), 1 / math.log2(6)]
    assert metrics["hr@1"] == 0.25
    assert metrics["hr@5"] == metrics["hr@20"] == 0.75
    assert metrics["ndcg@1"] == pytest.approx(0.25)
    assert metrics["ndcg@5"] == pytest.approx(sum(gains) / 4)
    assert metrics["mrr@5"] == pytest.approx((1 + 1 / 2 + 1 / 5) / 4)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 31) / 4)


def test_the_cut_off_is_exclusive():
    metrics = ranking_metrics(torch.tensor([5]), ks=[5, 6])
    assert (metrics["hr@5"], metrics["hr@6"]) == (0, 1)


def test_a_catalogue_smaller_than_the_cut_off_counts_every_row():
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    metrics = ranking_metrics(target_ranks(scores, torch.tensor([0, 0])))
    assert metrics["hr@20"] == metrics["hr@5"] == 1
    assert metrics["ndcg@20"] == pytest.approx((1 / math.log2(4) + 1) / 2)


def test_metric_names():
    assert list(ranking_metrics(torch.tensor([3]))) == metric_names()
    assert list(ranking_metrics(torch.tensor([3]), [2, 7])) == metric_names([2, 7])
    assert {f"ndcg@{k}" for k in CUTOFFS} < set(metric_names())


def test_empty_ranks_raise():
    with pytest.raises(ValueError, match="`ranks` is empty"):
        ranking_metrics(torch.zeros(0, dtype=torch.int64))
