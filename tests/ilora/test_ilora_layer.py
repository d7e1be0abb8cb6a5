import pytest
import torch
from ilora_helpers import LoopOverExperts
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm2rec.ilora import GateError, ILoraConfig, ILoraLinear, MergeError
from llm2rec.ilora.slot import GateSlot

IN, OUT, ROWS = 6, 10, 3


def make_layer(base: nn.Module, dtype=torch.float64, **options) -> tuple[ILoraLinear, GateSlot]:
    torch.manual_seed(0)
    slot = GateSlot()
    base = base.to(dtype).requires_grad_(False)
    layer = ILoraLinear(base, "layer", "default", ILoraConfig(**{"r": 8, "num_experts": 4, **options}), slot)
    slot.register("default", layer.layouts["default"])  # what the tuner does
    nn.init.normal_(layer.ilora_B["default"].weight)
    return layer, slot


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def conv1d() -> nn.Module:
    return Conv1D(OUT, IN)


def gates_of(rows: int, experts: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.softmax(torch.randn(rows, experts, dtype=torch.float64), dim=1).requires_grad_()


@pytest.mark.parametrize("base", [linear, conv1d])
@pytest.mark.parametrize("scaling", ["total", "per_expert"])
@pytest.mark.parametrize(("rank", "experts"), [(8, 4), (8, 1), (6, 6)])
@pytest.mark.parametrize("middle", [(), (5,), (2, 3)])
def test_values_and_gradients_equal_the_loop_over_experts(base, scaling, rank, experts, middle):
    layer, slot = make_layer(base(), r=rank, num_experts=experts, scaling=scaling, alpha=5)
    down, up, gates = layer.ilora_A["default"].weight, layer.ilora_B["default"].weight, gates_of(ROWS, experts)
    x = torch.randn(ROWS, *middle, IN, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(ROWS, *middle, OUT, dtype=torch.float64)
    scale = 5 / rank if scaling == "total" else 5 * experts / rank
    oracle = LoopOverExperts(layer.base_layer, down, up, gates, scale)

    expected = oracle(x)
    expected_grads = torch.autograd.grad(expected, (x, down, up, gates), cotangent)
    with slot.hold({"default": gates}):
        result = layer(x)
        grads = torch.autograd.grad(result, (x, down, up, gates), cotangent)

    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_no_expert_output_is_kept_for_backward():
    """What autograd keeps does not grow with the number of experts."""

    def kept(experts: int) -> int:
        layer, slot = make_layer(linear(), r=16, num_experts=experts)
        x, elements = torch.randn(ROWS, 7, IN, dtype=torch.float64), []
        with (
            slot.hold({"default": gates_of(ROWS, experts)}),
            torch.autograd.graph.saved_tensors_hooks(lambda t: elements.append(t.numel()) or t, lambda t: t),
        ):
            layer(x)
        return sum(elements)

    assert kept(2) == kept(16)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    layer, slot = make_layer(linear(), dropout=0.5)
    x = torch.randn(ROWS, 5, IN, dtype=torch.float64)
    with slot.hold({"default": gates_of(ROWS)}):
        assert not torch.equal(layer.train()(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (6, r"gates cover 3 rows but the layer received 6; repeat them once per beam .*repeat_interleave\(2"),
        (4, "gates cover 3 rows but the layer received 4; compute the gates from the same batch"),
        (1, "gates cover 3 rows but the layer received 1"),
    ],
)
def test_gates_of_another_batch_are_refused(rows, message):
    layer, slot = make_layer(linear())
    with slot.hold({"default": gates_of(3)}), pytest.raises(GateError, match=message):
        layer(torch.randn(rows, 5, IN, dtype=torch.float64))


def test_one_row_of_gates_is_not_broadcast():
    layer, slot = make_layer(linear())
    with slot.hold({"default": gates_of(1)}), pytest.raises(GateError, match="gates cover 1 rows"):
        layer(torch.randn(3, 5, IN, dtype=torch.float64))


def test_missing_gates_are_an_error_that_says_what_to_do():
    layer, _ = make_layer(linear())
    with pytest.raises(GateError, match=r"without gates; run forward and backward inside .*use_gates.*frozen_base"):
        layer(torch.randn(ROWS, IN, dtype=torch.float64))


def test_nested_hold_is_refused_and_an_error_inside_releases_the_gates():
    _, slot = make_layer(linear())
    with slot.hold({"default": gates_of(3)}):
        with pytest.raises(GateError, match="already held"), slot.hold({"default": gates_of(3)}):
            pass
        assert slot.held
    with pytest.raises(KeyError), slot.hold({"default": gates_of(3)}):
        raise KeyError
    assert not slot.held


def test_layer_refuses_to_merge():
    layer, _ = make_layer(linear())
    for merge in (layer.merge, layer.unmerge):
        with pytest.raises(MergeError, match="differs between instances"):
            merge()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Embedding(4, 5), "adapts linear layers .* got Embedding"),
        (nn.Conv2d(1, 2, 3), "got Conv2d"),
        (nn.MultiheadAttention(4, 2).out_proj, "never calls its forward"),
    ],
)
def test_layers_that_are_not_linear_are_refused(base, message):
    with pytest.raises(TypeError, match=message):
        make_layer(base, dtype=torch.float32)
