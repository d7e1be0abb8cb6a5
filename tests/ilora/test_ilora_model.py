import pytest
import torch
from ilora_helpers import (
    EXPERTS,
    KINDS,
    LoopOverExperts,
    adapt,
    batch,
    gate_inputs,
    layers,
    outputs,
    tiny,
    train,
)
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from llm2rec.ilora import GateError, ILoraConfig, ILoraLinear, MergeError, frozen_base

every_kind = pytest.mark.parametrize("kind", list(KINDS))


def loss_of(model, **inputs):
    result = outputs(model, **inputs)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return (result * weights).sum()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what it computes ------------------------------------------------------------------------------------------------


@every_kind
def test_fresh_adapter_changes_nothing_and_swaps_the_layers(kind):
    base = tiny(kind)
    expected = outputs(base, **batch())
    model = adapt(base, trained=False)
    with model.base_model.use_gates(gate_inputs()):
        assert torch.equal(outputs(model, **batch()), expected)
    assert len(layers(model)) == KINDS[kind]
    assert {type(layer.base_layer) for layer in layers(model)} == {Conv1D if kind == "gpt2" else nn.Linear}


@every_kind
@pytest.mark.parametrize("scaling", ["total", "per_expert"])
def test_whole_model_equals_the_loop_over_experts(kind, scaling):
    model = adapt(tiny(kind).double(), scaling=scaling)
    model.base_model.ilora_gate.double()
    gate_input = gate_inputs().double()
    with model.base_model.use_gates(gate_input):
        result = outputs(model, **batch())
        loss_of(model, **batch()).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in parameters]
    assert len(parameters) == 2 * KINDS[kind] + 1

    gate = model.base_model.ilora_gate["default"]
    gates = torch.softmax(gate_input @ gate.weight.T, dim=-1)
    for name, module in list(model.named_modules()):
        if isinstance(module, ILoraLinear):
            weights = module.ilora_A["default"].weight, module.ilora_B["default"].weight
            loop = LoopOverExperts(module.base_layer, *weights, gates, module.layouts["default"].scale)
            model.set_submodule(name, loop)
    expected = outputs(model, **batch())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, list(torch.autograd.grad(loss_of(model, **batch()), parameters)))


@every_kind
def test_a_row_does_not_depend_on_the_other_rows(kind):
    model = adapt(tiny(kind).double())
    inputs, gate_input = batch(), gate_inputs()
    with model.base_model.use_gates(gate_input):
        together = outputs(model, **inputs)
    with model.base_model.use_gates(gate_input[1:2]):
        alone = outputs(model, **{name: value[1:2] for name, value in inputs.items()})
    # transformers takes norms and softmax in float32 whatever the dtype
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    with model.base_model.use_gates(gate_input.flip(0)):
        other = outputs(model, **inputs)
    assert torch.equal(other[1], together[1])  # the middle row keeps its gate
    assert not torch.allclose(other[0], together[0], rtol=1e-2)


@every_kind
def test_inputs_embeds(kind):
    model = adapt(tiny(kind))
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with model.base_model.use_gates(gate_inputs()):
        expected = outputs(model, **inputs)
        result = outputs(model, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(result, expected)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16(autocast_adapter_dtype):
    reference = adapt(tiny("llama"))
    model = get_peft_model(
        tiny("llama").to(torch.bfloat16),
        ILoraConfig(r=8, num_experts=EXPERTS),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    train(model)
    dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for layer in layers(model) for p in layer.ilora_A.parameters()} == {dtype}
    assert model.base_model.ilora_gate["default"].weight.dtype == torch.float32
    with reference.base_model.use_gates(gate_inputs()):
        expected = outputs(reference, **batch())
    with model.base_model.use_gates(gate_inputs()):
        result = outputs(model, **batch())
        loss_of(model, **batch()).backward()
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).norm() < 0.1 * expected.norm()
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_autocast():
    model = adapt(tiny("llama"))
    with model.base_model.use_gates(gate_inputs()):
        expected = outputs(model, **batch())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = outputs(model, **batch())
            loss = loss_of(model, **batch())
        loss.backward()
    assert (result.float() - expected).norm() < 0.1 * expected.norm()
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


# ---- training --------------------------------------------------------------------------------------------------------


@every_kind
def test_only_adapter_and_gate_are_trained(kind):
    model = adapt(tiny(kind)).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "ilora_" in name}
    assert "base_model.ilora_gate.default.weight" in trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.base_model.use_gates(gate_inputs()):
        loss_of(model, **batch()).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


def test_a_fresh_adapter_learns():
    """From B = 0 on, loss falls and the gate moves: nothing is born dead."""
    model = adapt(tiny("llama"), trained=False).train()
    gate = model.base_model.ilora_gate["default"].weight
    fresh = gate.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with model.base_model.use_gates(gate_inputs()):
            loss = model(**batch(), labels=batch()["input_ids"]).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not torch.equal(gate, fresh)


@every_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = adapt(tiny(kind))
    for module in model.modules():  # checkpointing needs training mode; dropout would differ between the two runs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()

    def run():
        model.zero_grad()
        with model.base_model.use_gates(gate_inputs()):
            loss_of(model, **batch()).backward()
        return gradients(model)

    plain = run()
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs, layer = [], layers(model)[0]
    hook = layer.register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    hook.remove()
    assert len(runs) == 2, "the block did not run again in backward: the test shows nothing"


def test_checkpointed_backward_outside_hold_says_so():
    model = adapt(tiny("llama")).train()
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with model.base_model.use_gates(gate_inputs()):
        loss = loss_of(model, **batch())
    with pytest.raises(GateError, match="With gradient checkpointing the backward pass needs gates too"):
        loss.backward()


# ---- the base alone --------------------------------------------------------------------------------------------------


@every_kind
def test_disabling_restores_the_base_exactly(kind):
    base = tiny(kind)
    expected = outputs(base, **batch())
    model = adapt(base)
    with model.base_model.use_gates(gate_inputs()):
        adapted = outputs(model, **batch())
        with model.disable_adapter():
            assert torch.equal(outputs(model, **batch()), expected)
        assert torch.equal(outputs(model, **batch()), adapted)
    with model.disable_adapter():  # no gates needed
        assert torch.equal(outputs(model, **batch()), expected)
    assert not torch.allclose(adapted, expected)


def test_frozen_base_is_deterministic_without_gradients_and_leaves_no_trace():
    base = tiny("bert")  # has dropout of its own
    expected = outputs(base, **batch())
    model = adapt(base, dropout=0.5).train()
    model.get_base_model().embeddings.eval()
    model.get_base_model().enable_input_require_grads()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for held in (False, True):
        if held:
            gates = model.base_model.gate(gate_inputs(2))  # another batch is in flight
            with model.base_model.hold(gates), frozen_base(model):
                result = outputs(model, **batch())
        else:
            with frozen_base(model):
                result = outputs(model, **batch())
                assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        assert torch.equal(result, expected)
        assert not result.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(GateError, match="without gates"):
        outputs(model, **batch())  # adapters are on again
    with model.disable_adapter():
        with frozen_base(model), frozen_base(model):
            assert torch.equal(outputs(model, **batch()), expected)
        outputs(model, **batch())  # and still off where they were off
    with pytest.raises(TypeError, match="got BertModel; unwrap the model first"), frozen_base(tiny("bert")):
        pass


def test_disabling_does_not_thaw_an_adapter_loaded_for_inference(tmp_path):
    adapt(tiny("llama")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_merging_is_refused_and_unloading_gives_the_base_back():
    base = tiny("llama")
    expected = outputs(base, **batch())
    model = adapt(base)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="no single weight equals it"):
            merge()
    assert len(layers(model)) == KINDS["llama"]  # still whole
    unloaded = model.unload()
    assert not layers(unloaded)
    assert torch.equal(outputs(unloaded, **batch()), expected)
