"""Both ways of adding the mixture against the formula as it reads."""

import pytest
import torch
from torch import Tensor

from llm2rec.ilora.layer import add_mixture

IN, OUT, RANK = 6, 5, 4


def plain(result: Tensor, x: Tensor, down: Tensor, up: Tensor, factors: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    return result + (x * kept @ down.T * factors) @ up.T


def tensors(shape=(3, 7), dtype=torch.float64, factors=(3, 1, RANK), seed=0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = [(*shape, OUT), (*shape, IN), (RANK, IN), (OUT, RANK), factors]
    return [torch.randn(each, dtype=dtype, requires_grad=True) for each in shapes]


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ((3,), (3, RANK)),
        ((3, 7), (3, 1, RANK)),
        ((3, 7), (3, 7, RANK)),
        ((3, 2, 4), (3, 1, 1, RANK)),
        ((0, 7), (0, 1, 4)),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # the second by the other way, with nothing dropped
def test_values_and_gradients_equal_the_formula(shape, factors, dropout):
    given = tensors(shape, factors=factors)
    cotangent = torch.randn(*shape, OUT, dtype=torch.float64)
    results = [plain(*given), add_mixture(*given, dropout)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, given, cotangent) for result in results))


def test_dropout_drops_elements_of_the_input_and_the_gradients_follow():
    given, dropout = tensors((3, 200)), 0.25

    def seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(5)
        return add_mixture(*given, dropout)

    torch.manual_seed(5)
    kept = torch.empty_like(given[1], dtype=torch.bool).bernoulli_(1 - dropout)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    result, expected = seeded(*given), plain(*given, kept / 0.75)
    torch.testing.assert_close(result, expected)
    cotangent = torch.randn_like(result)
    torch.testing.assert_close(
        torch.autograd.grad(result, given, cotangent), torch.autograd.grad(expected, given, cotangent)
    )
    assert not torch.equal(add_mixture(*given, dropout), add_mixture(*given, dropout))


def test_with_dropout_only_the_input_the_middle_and_a_mask_are_kept():
    given, kept = tensors((3, 200), torch.float32), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = add_mixture(*given, dropout=0.5)
    factors = given[4].nbytes  # divided by 1/2
    assert sum(kept.values()) == sum(each.nbytes for each in given[1:4]) + factors + 600 * RANK * 4 + 600 * IN
    assert given[1].data_ptr() in kept
    result.sum().backward()


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_each_gradient_can_be_asked_for_alone(wanted, dropout):
    def loss(given: list[Tensor]) -> Tensor:
        torch.manual_seed(5)
        return add_mixture(*given, dropout).sin().sum()

    given = tensors()
    everything = torch.autograd.grad(loss(given), given)
    alone = [tensor.detach().requires_grad_(number == wanted) for number, tensor in enumerate(given)]
    [gradient] = torch.autograd.grad(loss(alone), [alone[wanted]])
    torch.testing.assert_close(gradient, everything[wanted])


@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_strided_input_and_expanded_gradients(dropout):
    given = tensors()
    given[0] = torch.randn(7, 3, OUT, dtype=torch.float64).transpose(0, 1).requires_grad_()
    given[1] = torch.randn(7, 3, IN, dtype=torch.float64).transpose(0, 1).requires_grad_()
    cotangent = torch.ones(1, 1, OUT, dtype=torch.float64).expand(3, 7, OUT)
    results = [plain(*given), add_mixture(*given, dropout)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(result, given, cotangent) for result in results))


@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # the second by the other way, with nothing dropped
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_input_with_float32_weights(autocast, dropout):
    """Products in bfloat16, gradients of the weights in their own dtype."""
    exact = tensors((3, 50))
    given = [tensor.detach().float().requires_grad_() for tensor in exact]
    if not autocast:
        given[:2] = [tensor.detach().bfloat16().requires_grad_() for tensor in given[:2]]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = add_mixture(*given, dropout)
    assert result.dtype == given[0].dtype
    expected = plain(*exact)
    assert (result.double() - expected).norm() < 0.01 * expected.norm()
    cotangent = torch.randn_like(expected)
    grads = torch.autograd.grad(result, given, cotangent.to(result.dtype))
    for tensor, grad, reference in zip(given, grads, torch.autograd.grad(expected, exact, cotangent), strict=True):
        assert grad.dtype == tensor.dtype
        assert (grad.double() - reference).norm() < 0.015 * reference.norm()


def test_a_second_derivative_through_dropout_is_refused():
    given = tensors()
    gradient = torch.autograd.grad(add_mixture(*given, 0.5).sin().sum(), given[2], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient[0].sum().backward()
