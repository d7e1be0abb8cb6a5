import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from llm2rec.core.errors import ConfigError
from llm2rec.distill.kd_losses import (
    alignment_loss,
    confidence_weights,
    consistency_weights,
    importance_weights,
    position_weights,
    ranking_loss,
)
from llm2rec.distill.settings import EmbeddingSettings, RankingSettings

GOLDEN = Path(__file__).parents[1] / "golden"
# The losses compute in float32, which resolves differences of a thousandth and not of a millionth.
LOOSE = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-2}


def test_position_weights_by_hand():
    e = math.e
    torch.testing.assert_close(position_weights(2, 1.0), torch.tensor([e / (1 + e), 1 / (1 + e)]))
    weights = position_weights(5, 2.0)
    torch.testing.assert_close(weights[1:] / weights[:-1], torch.full((4,), math.exp(-0.5)))
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(position_weights(4, 1e9), torch.full((4,), 0.25))
    assert position_weights(3, 1e-6).tolist() == [1, 0, 0]
    assert position_weights(1, 1.0).tolist() == [1]


def test_confidence_weights_by_hand():
    distance = -torch.tensor([[0.5, 0.25], [0.1, 0.1]]).log()
    # Negative log-probabilities give the teacher's distribution over its own candidates.
    torch.testing.assert_close(confidence_weights(distance), torch.tensor([[2 / 3, 1 / 3], [0.5, 0.5]]))


@pytest.mark.parametrize("values", [[0.0, 1e4], [-1e4, 1e4], [1e30, 2e30], [3e38, 3e38]])
def test_confidence_weights_of_extreme_distances(values):
    weights = confidence_weights(torch.tensor([values]))
    assert torch.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1)
    assert weights[0, 0] >= weights[0, 1]


def test_consistency_weights_by_hand():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    ranking = torch.tensor([[0, 4, 2], [0, 4, 2]])
    assert consistency_weights(logits, ranking, 2).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert consistency_weights(logits, ranking, 3).tolist() == [[1, 0, 1], [0, 1, 1]]
    assert consistency_weights(logits, ranking, 9).tolist() == [
        [1, 1, 1],
        [1, 1, 1],
    ]  # a list longer than the catalogue


def test_consistency_lets_no_gradient_through():
    logits = torch.randn(2, 6, requires_grad=True)
    assert not consistency_weights(logits, torch.tensor([[0], [1]]), 2).requires_grad


def test_importance_weights_by_hand():
    weights = importance_weights(
        torch.tensor([0.8, 0.2]),
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        gamma_position=1.0,
        gamma_confidence=2.0,
        gamma_consistency=0.5,
    )
    torch.testing.assert_close(weights, torch.tensor([[2.3 / 3.5, 1.2 / 3.5], [2.6 / 3, 0.4 / 3]]))


def test_a_share_alone_is_its_own_weight():
    position, confidence = position_weights(3, 1.0), torch.tensor([[0.2, 0.3, 0.5]])
    consistency = torch.tensor([[0.0, 1.0, 1.0]])
    shares = {"gamma_position": 0.0, "gamma_confidence": 0.0, "gamma_consistency": 0.0}
    for name, expected in [
        ("gamma_position", position[None]),
        ("gamma_confidence", confidence),
        ("gamma_consistency", torch.tensor([[0.0, 0.5, 0.5]])),
    ]:
        mixed = importance_weights(position, confidence, consistency, **(shares | {name: 0.7}))
        torch.testing.assert_close(mixed, expected)


def test_ranking_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0), -7.0]])
    loss = ranking_loss(logits, torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]))
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2
    torch.testing.assert_close(loss, torch.tensor([-(0.75 * math.log(0.75) + 0.25 * math.log(0.5))]))


def test_ranking_loss_agrees_with_a_loop():
    torch.manual_seed(0)
    logits, ranking, weights = torch.randn(4, 9), torch.randint(0, 9, (4, 3)), torch.rand(4, 3)
    expected = [
        sum(-weights[row, k] * math.log(1 / (1 + math.exp(-logits[row, ranking[row, k]]))) for k in range(3))
        for row in range(4)
    ]
    torch.testing.assert_close(ranking_loss(logits, ranking, weights), torch.tensor(expected))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(scale):
    logits = torch.tensor([[scale, -scale, 0.0]], requires_grad=True)
    loss = ranking_loss(logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(scale / 2)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5, 0.0]]))


def test_ranking_loss_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    ranking = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    assert gradcheck(lambda x, w: ranking_loss(x, ranking, w), (logits, weights), **LOOSE)


def test_confidence_gradcheck():
    torch.manual_seed(0)
    distance = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(confidence_weights, (distance,), **LOOSE)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_alignment_gradcheck(kind):
    torch.manual_seed(0)
    ours, theirs = (torch.randn(3, 4, dtype=torch.float64, requires_grad=r) for r in (True, False))
    assert gradcheck(lambda x: alignment_loss(x, theirs, kind), (ours,), **LOOSE)


def test_alignment_by_hand():
    ours, theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]])
    torch.testing.assert_close(alignment_loss(ours, theirs, "mse"), torch.tensor([12.5, 2.5]))
    torch.testing.assert_close(alignment_loss(ours, theirs, "cosine"), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_student_equal_to_its_teacher_is_aligned(kind):
    vectors = torch.randn(5, 3, requires_grad=True)
    loss = alignment_loss(vectors, vectors.detach(), kind)
    torch.testing.assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(vectors.grad, torch.zeros(5, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_alignment_of_a_zero_vector_is_finite(kind):
    vectors = torch.zeros(1, 3, requires_grad=True)
    alignment_loss(vectors, torch.zeros(1, 3), kind).sum().backward()
    assert torch.isfinite(vectors.grad).all()


def test_an_unknown_alignment_is_refused():
    with pytest.raises(ValueError, match="`kind` is 'l1', expected 'mse' or 'cosine'"):
        alignment_loss(torch.zeros(1, 1), torch.zeros(1, 1), "l1")


@pytest.mark.parametrize("number", [2, 3, 4])
def test_weights_are_those_of_the_released_program(number):
    """Against numbers from DLLM2Rec's own program; see the README of the reference files."""
    case = {
        name.removeprefix(f"case{number}."): tensor
        for name, tensor in load_file(GOLDEN / "dllm2rec_loss.safetensors").items()
        if name.startswith(f"case{number}.")
    }
    settings = json.loads((GOLDEN / "dllm2rec_loss.json").read_text())[number]
    top_k = settings["candidate_topk"]
    ranking, distance = case["teacher_ranking"][:, :top_k], case["teacher_distance"][:, :top_k]
    assert case["weight"].shape == (8, top_k)
    exact = {"rtol": 1e-5, "atol": 1e-9}

    position, confidence = position_weights(top_k, settings["beta"]), confidence_weights(distance)
    torch.testing.assert_close(position.expand(8, -1), case["weight_position"], **exact)
    torch.testing.assert_close(confidence, case["weight_confidence"], **exact)
    consistency = consistency_weights(case["logits"], ranking, top_k)
    torch.testing.assert_close(consistency + 1e-8, case["weight_consistency"], **exact)  # theirs is never quite 0
    gammas = {name: value for name, value in settings.items() if name.startswith("gamma_")}
    mixed = importance_weights(position, confidence, consistency + 1e-8, **gammas)
    torch.testing.assert_close(mixed, case["weight"], **exact)
    torch.testing.assert_close(importance_weights(position, confidence, consistency, **gammas), case["weight"], **exact)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, r"must not be negative, got weight=-0\.1"),
        ({"gamma_consistency": -1.0}, r"must not be negative.*-1\.0"),
        ({"gamma_position": 0.0, "gamma_confidence": 0.0}, r"both 0.*set one of them, or `weight: 0`"),
        ({"top_k": 0}, r"expected top_k >= 1 and beta > 0, got 0 and 1\.0"),
        ({"beta": 0.0}, r"expected top_k >= 1 and beta > 0, got 10 and 0\.0"),
    ],
)
def test_ranking_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RankingSettings(**settings)


def test_shares_may_be_zero_where_ranking_is_left_out():
    RankingSettings(weight=0.0, gamma_position=0.0, gamma_confidence=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "l1"}, "alignment is 'l1', expected 'mse' or 'cosine'"),
        ({"alignment_weight": -1.0}, r"alignment_weight is -1\.0, expected 0 or more"),
    ],
)
def test_embedding_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EmbeddingSettings(**settings)
