import math

import numpy as np
import pytest
import torch
from engine_helpers import random_rows, sequence_data
from torch.autograd import gradcheck

from llm2rec.core.errors import ConfigError
from llm2rec.student.losses import dros, popularity_propensity, sampled_bce
from llm2rec.student.negatives import NegativeSampler

N = 9


def random_logits(rows=3, items=7, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, items, dtype=torch.float64, requires_grad=True)


def test_sampled_bce_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0, 7.0], [5.0, 0.0, -math.log(4.0)]])
    # sigmoid: 3/4 for the target and 1/2 for the negative; 1/2 and 1/5.
    losses = sampled_bce(logits, torch.tensor([0, 1]), torch.tensor([1, 2]))
    expected = [-(math.log(0.75) + math.log(0.5)) / 2, -(math.log(0.5) + math.log(0.8)) / 2]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_sampled_bce_is_the_mean_over_all_scores():
    logits, targets, negatives = random_logits().float(), torch.tensor([0, 1, 2]), torch.tensor([3, 3, 4])
    scores = torch.cat([logits[range(3), targets], logits[range(3), negatives]])
    labels = torch.tensor([1.0] * 3 + [0.0] * 3)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
    torch.testing.assert_close(sampled_bce(logits, targets, negatives).mean(), expected)


def test_sampled_bce_gradcheck():
    targets, negatives = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 4])
    assert gradcheck(lambda x: sampled_bce(x, targets, negatives), (random_logits(),))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_sampled_bce_of_extreme_logits_is_finite(scale):
    logits = torch.tensor([[scale, -scale], [-scale, scale]], requires_grad=True)
    losses = sampled_bce(logits, torch.tensor([0, 0]), torch.tensor([1, 1]))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, scale])
    assert logits.grad.tolist() == [[0, 0], [-0.5, 0.5]]
    assert sampled_bce(logits.bfloat16(), torch.tensor([0, 0]), torch.tensor([1, 1])).dtype == torch.float32


def test_propensity_by_hand():
    propensity = popularity_propensity(torch.tensor([2, 0, 2, 2], dtype=torch.int32), 4, 0.05)
    torch.testing.assert_close(propensity, torch.tensor([2 / 8, 1 / 8, 4 / 8, 1 / 8], dtype=torch.float64) ** 0.05)
    assert popularity_propensity(torch.tensor([0]), 3, 0.0).tolist() == [1, 1, 1]


def dros_directly(logits, items, propensity, beta):
    """The released program's expression, in float64."""
    whole = torch.exp(propensity * logits**2 / beta).sum(dim=1, keepdim=True)
    own = torch.exp(propensity[items] * logits.gather(1, items) ** 2 / beta)
    wanted = torch.exp(propensity[items] * (logits.gather(1, items) - 1) ** 2 / beta)
    return torch.log(whole - own + wanted + 1e-24)


def test_dros_by_hand():
    logits, propensity = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1.0, 0.5, 0.25])
    losses = dros(logits, torch.tensor([[0, 1]]), propensity, beta=2.0)
    e = math.exp
    # As target: item 0 is right (exponent 0), item 1 is 1 away. As others: exponents 1/2, 1 and 0.
    torch.testing.assert_close(losses, torch.tensor([[math.log(e(1) + 1 + 1), math.log(e(0.5) + 1 + e(0.25))]]))


@pytest.mark.parametrize(
    "items",
    [
        [[0], [3], [6]],
        [[0, 1, 2, 3], [6, 5, 4, 3], [1, 6, 0, 2]],
        [[0, 0, 2, 0], [6, 5, 6, 5], [1, 1, 1, 1]],  # an item twice, as a target among the teacher's candidates
        [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4, 6]],  # the whole catalogue
    ],
)
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_dros_equals_the_released_programs_expression(items, beta):
    logits, items, propensity = random_logits(), torch.tensor(items), torch.linspace(0.5, 1, 7, dtype=torch.float64)
    losses = dros(logits, items, propensity, beta)
    torch.testing.assert_close(losses, dros_directly(logits, items, propensity, beta))
    (ours,) = torch.autograd.grad(losses.sum(), logits)
    (direct,) = torch.autograd.grad(dros_directly(logits, items, propensity, beta).sum(), logits)
    torch.testing.assert_close(ours, direct)
    assert gradcheck(lambda x: dros(x, items, propensity, beta), (logits,))


def plain_dros(logits, items, propensity, beta):
    """The definition with autograd: a sum over the catalogue for each item."""
    exponents = propensity * logits.square() / beta
    columns = []
    for item in items.T:
        own = propensity[item] * (logits.gather(1, item[:, None])[:, 0] - 1).square() / beta
        columns.append(exponents.scatter(1, item[:, None], own[:, None]).logsumexp(1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("n_asked", [1, 4, 9])
def test_dros_and_gradients_equal_the_definition(n_asked):
    torch.manual_seed(0)
    propensity, upstream = torch.rand(9, dtype=torch.float64), torch.randn(5, n_asked, dtype=torch.float64)
    items = torch.stack([torch.randperm(9)[:n_asked] for _ in range(5)])  # of nine, so that nothing may be left
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for form in (dros, plain_dros):
        losses = form(logits, items, propensity, 0.8)
        results.append((losses.detach(), *torch.autograd.grad(losses, logits, upstream)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e15])
def test_dros_of_extreme_logits_is_finite_unlike_the_released_programs(scale):
    logits = torch.tensor([[scale, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    items, propensity = torch.tensor([[0, 1], [0, 1]]), torch.full((3,), 0.9)
    losses = dros(logits, items, propensity, 1.0)
    losses.sum().backward()
    expected = torch.tensor([0.9 * (scale - 1) ** 2, 0.9 * scale**2])
    torch.testing.assert_close(losses[0].detach(), expected)
    assert torch.isfinite(logits.grad).all()
    assert not torch.isfinite(dros_directly(logits.detach(), items, propensity, 1.0)[0]).all()


def test_dros_of_bf16_logits_is_computed_in_float32():
    assert dros(torch.ones(1, 3).bfloat16(), torch.tensor([[0]]), torch.ones(3), 1.0).dtype == torch.float32


# ---- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_are_unseen_items():
    data = random_rows(200, N, 4)
    sampler = NegativeSampler(data, seed=0)
    for epoch in range(5):
        drawn = sampler.draw(np.arange(200), epoch)
        assert (drawn.dtype, drawn.shape) == (torch.int64, (200,))
        for row, item in enumerate(drawn.tolist()):
            assert 0 <= item < N
            assert item not in data.histories_and_targets(np.array([row]))[0]


@pytest.mark.parametrize(
    ("history", "target", "left"),
    [
        ([0, 1, 2], 3, [4, 5, 6, 7, 8]),
        ([8, 7, 8], 8, [0, 1, 2, 3, 4, 5, 6]),
        ([4], 4, [0, 1, 2, 3, 5, 6, 7, 8]),
        ([0, 8, 4], 2, [1, 3, 5, 6, 7]),
    ],
)
def test_negatives_are_uniform_over_unseen_items(history, target, left):
    rows = 20000
    sampler = NegativeSampler(sequence_data([(history, target)] * rows, N, 3), seed=1)
    counts = np.bincount(sampler.draw(np.arange(rows), 0).numpy(), minlength=N)
    assert np.flatnonzero(counts).tolist() == left
    expected = rows / len(left)
    assert ((counts[left] - expected) ** 2 / expected).sum() < 25  # chi-square, at most 7 degrees of freedom


def test_negative_depends_only_on_seed_epoch_and_row():
    data = random_rows(50, N, 4)
    rows = np.arange(50)
    whole = NegativeSampler(data, seed=3).draw(rows, 2)
    parts = NegativeSampler(data, seed=3)
    parts.draw(rows, 0)
    order = np.random.default_rng(0).permutation(50)
    drawn = torch.cat([parts.draw(order[:20], 2), parts.draw(order[20:], 2)])
    assert torch.equal(drawn, whole[order])
    assert not torch.equal(parts.draw(rows, 1), whole)
    assert not torch.equal(NegativeSampler(data, seed=4).draw(rows, 2), whole)


def test_catalogue_without_negatives_raises():
    with pytest.raises(
        ConfigError, match=r"has 5 items, but history and target .* may contain 5.*`dataset\.history_length`"
    ):
        NegativeSampler(random_rows(3, 5, 4), seed=0)
    NegativeSampler(random_rows(3, 6, 4), seed=0)
