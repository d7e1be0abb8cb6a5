"""8-bit and 4-bit base weights, on the CPU."""

import pytest
import torch
from ilora_helpers import QUANTIZED, LoopOverExperts, adapt, batch, gate_inputs, layers, quantized
from ilora_helpers import QUANTIZED_WIDTH as WIDTH
from peft import PeftModel

from llm2rec.ilora import frozen_base

pytest.importorskip("bitsandbytes")

KINDS = list(QUANTIZED)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_the_loop_over_experts_on_the_same_base(kind):
    model = adapt(quantized(kind))
    layer = layers(model)[0]
    assert type(layer.base_layer).__name__ == {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[kind]
    assert not layer.base_layer.weight.dtype.is_floating_point
    down, up = layer.ilora_A["default"].weight, layer.ilora_B["default"].weight
    assert down.dtype == up.dtype == torch.float32
    gates = torch.rand(3, 4, requires_grad=True)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    loop = LoopOverExperts(layer.base_layer, down, up, gates, layer.layouts["default"].scale)
    expected = loop(x)
    expected_grads = torch.autograd.grad(expected.sin().sum(), (x, down, up, gates))
    with model.base_model.hold(gates):
        result = layer(x)
        grads = torch.autograd.grad(result.sin().sum(), (x, down, up, gates))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_adapter_and_gate_and_nothing_else(kind):
    model = adapt(quantized(kind)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with model.base_model.use_gates(gate_inputs(3, WIDTH)):
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "ilora_" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_frozen_base_and_saving(tmp_path, kind):
    with torch.no_grad():
        expected = quantized(kind)(**batch()).logits
    model = adapt(quantized(kind), target_modules="all-linear")
    assert len(layers(model)) == 14
    with frozen_base(model):
        frozen = model(**batch()).logits
    # 4-bit: a bare model may take a bfloat16 kernel that the adapted one may not (see the next test).
    assert (frozen - expected).norm() <= {"8bit": 0, "4bit": 0.02}[kind] * expected.norm()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    with model.base_model.use_gates(gate_inputs(3, WIDTH)), loaded.base_model.use_gates(gate_inputs(3, WIDTH)):
        assert torch.equal(model(**batch()).logits, loaded(**batch()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before_adapting", [False, True])
def test_evaluating_does_not_cut_the_gradients_of_training(kind, before_adapting):
    """bitsandbytes repacks 4-bit weights when it is evaluated on some CPUs, for a kernel without a backward."""
    fresh, evaluated = adapt(quantized(kind)), quantized(kind)
    if before_adapting:
        with torch.no_grad():
            evaluated(**batch())
    evaluated = adapt(evaluated)
    with torch.no_grad(), evaluated.base_model.use_gates(gate_inputs(3, WIDTH)):
        evaluated(**batch())
    with frozen_base(evaluated):
        evaluated(**batch())
    grads = []
    for model in (fresh, evaluated):
        model.train()
        with model.base_model.use_gates(gate_inputs(3, WIDTH)):
            model(**batch(), labels=batch()["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    # Repacking on the way to the adapter rounds the 4-bit blocks' scales to bfloat16.
    tolerance = {"rtol": 0.1, "atol": 0.05} if before_adapting else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(grads[0], grads[1], **tolerance)
