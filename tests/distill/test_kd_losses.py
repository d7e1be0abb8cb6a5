import json
import math
from pathlib import Path

import pytest
import torch
from distill_helpers import listwise, pairwise
from safetensors.torch import load_file
from torch.autograd import gradcheck

from llm2rec.distill.kd_losses import (
    alignment_loss,
    confidence_weights,
    consistency_weights,
    contrastive_alignment,
    importance_weights,
    negative_term,
    pairwise_loss,
    position_weights,
    ranking_loss,
    robust_term,
    row_confidence_weights,
    sampled_catalogue,
)

GOLDEN = Path(__file__).parents[1] / "golden"


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


def test_floor_makes_weights_of_far_candidates_uniform():
    distance = torch.tensor([[0.5, 2.0], [40.0, 60.0]])
    floored = torch.exp(-distance.double()) + 1e-8
    expected = (floored / floored.sum(dim=1, keepdim=True)).float()
    torch.testing.assert_close(confidence_weights(distance, 1e-8), expected)
    torch.testing.assert_close(expected[1], torch.tensor([0.5, 0.5]))
    assert confidence_weights(distance)[1, 0] > 0.999


def test_row_confidence_by_hand():
    weights = row_confidence_weights(torch.tensor([0.0, math.log(4.0), 1e4, -3.0]), 3)
    assert weights.shape == (4, 3)
    torch.testing.assert_close(weights, torch.tensor([[1.0], [0.25], [0.0], [1.0]]).expand(-1, 3))


@pytest.mark.parametrize("floor", [0.0, 1e-8])
@pytest.mark.parametrize("values", [[0.0, 1e4], [-1e4, 1e4], [1e30, 2e30], [3e38, 3e38]])
def test_confidence_weights_of_extreme_distances(values, floor):
    weights = confidence_weights(torch.tensor([values]), floor)
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


def test_consistency_weights_with_a_floor_or_normalised():
    logits, ranking = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 4]])
    torch.testing.assert_close(
        consistency_weights(logits, ranking, 2, floor=1e-8), torch.tensor([[1.0, 1.0, 1e-8]]), rtol=1e-6, atol=0
    )
    assert consistency_weights(logits, ranking, 2, normalise=True).tolist() == [[0.5, 0.5, 0]]
    assert consistency_weights(logits, ranking[:, 2:], 2, normalise=True).tolist() == [[0]]


def test_consistency_weights_have_no_gradient():
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


def test_importance_weights_without_renormalisation():
    given = torch.tensor([0.8, 0.2]), torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    shares = {"gamma_position": 1.0, "gamma_confidence": 2.0, "gamma_consistency": 0.5}
    torch.testing.assert_close(importance_weights(*given, **shares, renormalise=False), torch.tensor([[2.3, 1.2]]))
    nothing = importance_weights(*(0 * each for each in given), **shares)
    assert nothing.tolist() == [[0, 0]]  # and not 0 / 0


def test_single_gamma_gives_its_own_weight():
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
    loss = ranking_loss(logits[:, [1, 0]], torch.tensor([[0.75, 0.25]]))
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2
    torch.testing.assert_close(loss, torch.tensor([-(0.75 * math.log(0.75) + 0.25 * math.log(0.5))]))


@pytest.mark.parametrize(
    ("kind", "each"),
    [
        ("one_minus_score", -math.log(1 / (1 + math.exp(-(1 - 0.3))))),
        ("one_minus_probability", math.log1p(math.exp(0.3))),
    ],
)
def test_negative_term_by_hand(kind, each):
    logits = torch.tensor([[0.3, 9.0], [9.0, 0.3]])
    weights = torch.tensor([[0.5, 0.5], [1.5, 0.5]])  # the sum over candidates of weight times the same term
    term = negative_term(logits[[0, 1], [0, 1]], weights, kind)
    torch.testing.assert_close(term, torch.tensor([each, 2 * each]))


def test_robust_term_by_hand():
    robust, weights = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert robust_term(robust, weights, "per_row").tolist() == [1.5, 4.5]
    # Mean weights .375 and .625.
    assert robust_term(robust, weights, "broadcast").tolist() == [1.625, 4.25]
    assert robust_term(robust, weights, "broadcast", torch.tensor([0.0, 2.0])).tolist() == [1.75, 4.5]
    assert robust_term(robust, weights, "broadcast", torch.zeros(2)).tolist() == [0, 0]


def test_broadcast_term_equals_the_mean_of_the_released_programs_table():
    torch.manual_seed(0)
    robust, weights = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    table = sum((weights[:, k : k + 1] * robust[:, k]).mean() for k in range(3))  # (5, 1) times (5,) is (5, 5)
    torch.testing.assert_close(robust_term(robust, weights, "broadcast").mean(), table)


@pytest.mark.parametrize("term", [negative_term, robust_term])
def test_unknown_kind_raises(term):
    with pytest.raises(ValueError, match="`kind` is 'other', expected"):
        term(torch.zeros(1), torch.ones(1, 1), "other")


def test_ranking_loss_agrees_with_a_loop():
    torch.manual_seed(0)
    logits, ranking, weights = torch.randn(4, 9), torch.randint(0, 9, (4, 3)), torch.rand(4, 3)
    expected = [
        sum(-weights[row, k] * math.log(1 / (1 + math.exp(-logits[row, ranking[row, k]]))) for k in range(3))
        for row in range(4)
    ]
    torch.testing.assert_close(ranking_loss(logits.gather(1, ranking), weights), torch.tensor(expected))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(scale):
    logits = torch.tensor([[scale, -scale, 0.0]], requires_grad=True)
    loss = ranking_loss(logits[:, :2], torch.tensor([[0.5, 0.5]]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(scale / 2)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5, 0.0]]))


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("kind", ["one_minus_score", "one_minus_probability"])
def test_extreme_negatives_give_finite_terms_and_gradients(scale, kind):
    logits = torch.tensor([[scale, -scale], [-scale, scale]], requires_grad=True)
    term = negative_term(logits[:, 0], torch.ones(2, 1), kind)
    term.sum().backward()
    assert term[0].item() == pytest.approx(scale, rel=0.02)
    assert term[1].item() == pytest.approx(0)
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["one_minus_score", "one_minus_probability"])
def test_negative_term_gradcheck(kind):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    rows, negatives = torch.arange(3), torch.tensor([0, 6, 3])
    assert gradcheck(lambda x, w: negative_term(x[rows, negatives], w, kind), (logits, weights))


@pytest.mark.parametrize("kind", ["per_row", "broadcast"])
def test_robust_term_gradcheck(kind):
    torch.manual_seed(0)
    robust, weights = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = torch.tensor([1.0, 0.0, 0.5])
    assert gradcheck(lambda r, w: robust_term(r, w, kind, rows), (robust, weights))


def test_ranking_loss_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    ranking = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    assert gradcheck(lambda x, w: ranking_loss(x.gather(1, ranking), w), (logits, weights))


def test_confidence_gradcheck():
    torch.manual_seed(0)
    distance = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(confidence_weights, (distance,))
    assert gradcheck(lambda d: confidence_weights(d, 1e-8), (distance,))
    assert gradcheck(lambda d: row_confidence_weights(d, 3), (distance[:, 0],))


def test_listwise_by_hand():
    distance = -torch.tensor([[0.6, 0.3]]).log()  # 2/3 and 1/3 among the two
    logits = torch.tensor([[math.log(3.0), 0.0, math.log(4.0)]])  # 3/4, 1/4 among the two; 3/8, 1/8 among all
    ranking = torch.tensor([[0, 1]])
    own = 2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)
    for over, mass in (("candidates", 1.0), ("catalogue", 0.5)):
        crossed = 2 / 3 * math.log(0.75 * mass) + 1 / 3 * math.log(0.25 * mass)
        loss = listwise(logits, ranking, distance, over=over)
        assert loss.tolist() == pytest.approx([own - crossed], rel=1e-5)
    # At T = 2, roots: teacher sqrt 2 to 1, student sqrt 3 to 1.
    teacher, student = (math.sqrt(odds) / (1 + math.sqrt(odds)) for odds in (2, 3))
    expected = teacher * math.log(teacher / student) + (1 - teacher) * math.log((1 - teacher) / (1 - student))
    loss = listwise(logits, ranking, distance, temperature=2.0, over="candidates")
    assert loss.tolist() == pytest.approx([4 * expected], rel=1e-4)


@pytest.mark.parametrize("over", ["candidates", "catalogue"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_listwise_agrees_with_torchs_divergence(over, temperature):
    torch.manual_seed(0)
    logits, ranking = torch.randn(4, 9), torch.stack([torch.randperm(9)[:3] for _ in range(4)])
    distance = torch.rand(4, 3)
    teacher = torch.softmax(-distance / temperature, dim=1)
    if over == "candidates":
        student = torch.log_softmax(logits.gather(1, ranking) / temperature, dim=1)
    else:
        student = torch.log_softmax(logits / temperature, dim=1).gather(1, ranking)
    expected = torch.nn.functional.kl_div(student, teacher, reduction="none").sum(dim=1) * temperature**2
    torch.testing.assert_close(
        listwise(logits, ranking, distance, temperature=temperature, over=over), expected, rtol=1e-4, atol=1e-6
    )


def test_listwise_is_zero_and_still_where_student_and_teacher_agree():
    distance = torch.tensor([[0.1, 0.7, 2.0]], dtype=torch.float64)
    logits = torch.zeros(1, 5, dtype=torch.float64)
    logits[:, :3] = 5 - distance  # a constant changes no distribution
    for over, rest in (("candidates", 0.0), ("catalogue", -1e3)):
        logits[:, 3:] = rest
        given = logits.clone().requires_grad_()
        loss = listwise(given, torch.tensor([[0, 1, 2]]), distance, over=over)
        loss.sum().backward()
        torch.testing.assert_close(loss, torch.zeros(1, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(given.grad, torch.zeros_like(given), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_sample_of_all_items_stands_for_the_catalogue_exactly(shared, temperature):
    torch.manual_seed(0)
    logits, ranking = 2 * torch.randn(4, 9, dtype=torch.float64), torch.stack([torch.randperm(9)[:3] for _ in range(4)])
    logits.requires_grad_()
    distance = torch.rand(4, 3, dtype=torch.float64)
    whole = listwise(logits, ranking, distance, temperature=temperature)
    # Each item is drawn as often as expected: item j j + 1 times of 45, n q_j = j + 1. Candidates must not count again.
    items = torch.arange(9).repeat_interleave(torch.arange(1, 10))
    items = items if shared else torch.stack([items[torch.randperm(45)] for _ in range(4)])
    drawn = logits.gather(1, items.expand(4, 45))
    scores = sampled_catalogue(logits.gather(1, ranking), ranking, drawn, items, (items + 1.0).log(), temperature)
    first = torch.arange(3).expand(4, 3)
    sampled = listwise(scores, first, distance, temperature=temperature)
    torch.testing.assert_close(sampled, whole)
    ours, theirs = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (sampled, whole))
    torch.testing.assert_close(ours, theirs)


def test_sampled_catalogue_gradcheck():
    torch.manual_seed(0)
    candidates = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    negatives = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    ranking, items = torch.tensor([[0, 5, 2], [1, 4, 3]]), torch.tensor([5, 6, 7, 8])  # one is a candidate of a row
    distance, first = torch.rand(2, 3, dtype=torch.float64), torch.arange(3).expand(2, 3)

    def loss(candidates, negatives):
        scores = sampled_catalogue(candidates, ranking, negatives, items, torch.full((4,), 0.3), 2.0)
        return listwise(scores, first, distance, temperature=2.0)

    assert gradcheck(loss, (candidates, negatives))


def test_a_sample_has_the_catalogues_sum_on_average():
    torch.manual_seed(0)
    logits, ranking = torch.randn(1, 9, dtype=torch.float64), torch.tensor([[4, 7]])
    probabilities = torch.softmax(torch.randn(9, dtype=torch.float64), dim=0)
    items = torch.multinomial(probabilities, 20_000 * 5, replacement=True).view(20_000, 5)
    expected = (5 * probabilities).log()[items]
    drawn, own = logits.expand(20_000, 9).gather(1, items), logits[:, [4, 7]].expand(20_000, 2)
    scores = sampled_catalogue(own, ranking.expand(20_000, 2), drawn, items, expected)
    sums = scores.exp().sum(dim=1)
    assert abs(sums.mean() - logits.exp().sum()) < 4 * sums.std() / math.sqrt(20_000)
    assert sums.std() > 0


@pytest.mark.parametrize("kind", ["ranknet", "margin"])
@pytest.mark.parametrize("sampled", [False, True])
def test_pairwise_agrees_with_a_loop(kind, sampled):
    torch.manual_seed(0)
    logits, ranking = 2 * torch.randn(4, 9), torch.stack([torch.randperm(8)[:3] for _ in range(4)])
    # A negative that is a candidate, of the rows 0 and 1, is not below the others.
    negatives = torch.tensor([ranking[0, 0], ranking[1, 2], 8, 8]) if sampled else None
    expected = []
    for row in range(4):
        items = ranking[row].tolist()
        if negatives is not None and negatives[row] not in ranking[row]:
            items.append(negatives[row].item())
        pairs = [(a, b) for place, a in enumerate(items) for b in items[place + 1 :]]
        gaps = [(logits[row, a] - logits[row, b]).item() for a, b in pairs]
        each = [math.log1p(math.exp(-gap)) if kind == "ranknet" else max(0.0, 0.5 - gap) for gap in gaps]
        expected.append(sum(each) / len(each))
    loss = pairwise(logits, ranking, kind, margin=0.5, negatives=negatives)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_pairwise_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0, 7.0]])
    ranking = torch.tensor([[0, 1]])
    assert pairwise(logits, ranking, "ranknet").tolist() == pytest.approx([-math.log(0.75)])
    assert pairwise(logits, ranking[:, :1], "ranknet", negatives=torch.tensor([0])).tolist() == [0]  # no pair
    assert pairwise(logits, ranking.flip(1), "ranknet").tolist() == pytest.approx([-math.log(0.25)])
    assert pairwise(logits, ranking, "margin", margin=1.0).tolist() == [0]  # log 3 is more than 1
    assert pairwise(logits, ranking.flip(1), "margin", margin=1.0).tolist() == pytest.approx([1 + math.log(3)])


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_extreme_logits_and_distances_leave_the_other_ranking_losses_finite(scale):
    logits = torch.tensor([[scale, -scale, 0.0, scale]], requires_grad=True)
    ranking = torch.tensor([[1, 0, 2]])
    losses = [
        *(
            listwise(logits, ranking, d, over=over)
            for over in ("candidates", "catalogue")
            for d in (torch.tensor([[0.0, scale, 2 * scale]]), torch.full((1, 3), 3e38))
        ),
        *(pairwise(logits, ranking, kind) for kind in ("ranknet", "margin")),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


LOSSES = {
    "listwise over candidates": lambda x, r, d: listwise(x, r, d, temperature=1.5, over="candidates"),
    "listwise over the catalogue": lambda x, r, d: listwise(x, r, d, temperature=0.5),
    "ranknet": lambda x, r, d: pairwise(x, r, "ranknet"),
    "margin": lambda x, r, d: pairwise(x, r, "margin", negatives=torch.tensor([0, 3, 6])),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_other_ranking_losses_gradcheck(loss):
    torch.manual_seed(0)
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    ranking = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    distance = torch.rand(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x: LOSSES[loss](x, ranking, distance), (logits,))


def test_ranking_losses_of_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="`kind` is 'bpr', expected 'ranknet' or 'margin'"):
        pairwise_loss(torch.zeros(1, 2), "bpr")


def test_contrastive_alignment_by_hand():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    ours = torch.tensor([[5.0, 0.0], [0.0, -0.5]])  # cosines 1, 0, -1 and 0, -1, 0
    loss = contrastive_alignment(ours, teacher, torch.tensor([0, 1]), 0.5)
    expected = [math.log(math.e**2 + 1 + math.e**-2) - 2, math.log(2 + math.e**-2) + 2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_contrastive_alignment_gradcheck_and_zero_vectors():
    torch.manual_seed(0)
    ours, teacher = (torch.randn(n, 4, dtype=torch.float64, requires_grad=n == 3) for n in (3, 6))
    items = torch.tensor([0, 5, 2])
    assert gradcheck(lambda x: contrastive_alignment(x, teacher, items, 0.3), (ours,))
    zero = torch.zeros(1, 4, requires_grad=True)
    contrastive_alignment(zero, torch.zeros(6, 4), torch.tensor([1]), 0.1).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_alignment_gradcheck(kind):
    torch.manual_seed(0)
    ours, theirs = (torch.randn(3, 4, dtype=torch.float64, requires_grad=r) for r in (True, False))
    assert gradcheck(lambda x: alignment_loss(x, theirs, kind), (ours,))


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

    position, confidence = position_weights(top_k, 1.0), confidence_weights(distance)  # its beta is of DROS
    torch.testing.assert_close(position.expand(8, -1), case["weight_position"], **exact)
    torch.testing.assert_close(confidence, case["weight_confidence"], **exact)
    consistency = consistency_weights(case["logits"], ranking, top_k)
    floored = consistency_weights(case["logits"], ranking, top_k, floor=1e-8)  # theirs is never quite 0
    torch.testing.assert_close(floored, case["weight_consistency"], **exact)
    gammas = {name: value for name, value in settings.items() if name.startswith("gamma_")}
    mixed = importance_weights(position, confidence, floored, **gammas)
    torch.testing.assert_close(mixed, case["weight"], **exact)
    torch.testing.assert_close(importance_weights(position, confidence, consistency, **gammas), case["weight"], **exact)
