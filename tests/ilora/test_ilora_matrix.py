"""Every gate on every kind of layer, shared and per layer: what every PEFT method must do."""

import pytest
import torch
from ilora_helpers import (
    EXPERTS,
    KINDS,
    QUANTIZED,
    QUANTIZED_WIDTH,
    WIDTH,
    adapt,
    batch,
    gate_inputs,
    layers,
    outputs,
    quantized,
    tiny,
)
from peft import PeftModel
from torch import nn

from llm2rec.ilora import MergeError, frozen_base
from llm2rec.ilora.gate import GATES

BASES = ("llama", "gpt2", *QUANTIZED)  # nn.Linear, Conv1D, Linear8bitLt, Linear4bit
pytestmark = [
    pytest.mark.parametrize("base", BASES),
    pytest.mark.parametrize("gate", tuple(GATES)),
    pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per_layer"]),
]


def base_model(base: str) -> nn.Module:
    if base not in QUANTIZED:
        return tiny(base)
    pytest.importorskip("bitsandbytes")
    return quantized(base)


def inputs_of(base: str) -> torch.Tensor:
    return gate_inputs(3, QUANTIZED_WIDTH if base in QUANTIZED else WIDTH)


def adapted(base: str, gate: str, per_layer: bool, **options) -> PeftModel:
    return adapt(base_model(base), gate=gate, gate_per_layer=per_layer, **options)


def run(model: PeftModel, gate_input: torch.Tensor) -> torch.Tensor:
    with model.base_model.use_gates(gate_input):
        return outputs(model, **batch())


def test_fresh_adapter_changes_nothing_and_disabling_brings_the_base_back(base, gate, per_layer):
    bare = base_model(base)
    expected = outputs(bare, **batch())
    model, gate_input = adapted(base, gate, per_layer, trained=False), inputs_of(base)
    # bitsandbytes may take another kernel for a bare 4-bit model on some CPUs
    tolerance = {"rtol": 0, "atol": 0.05 if base == "4bit" else 0}
    torch.testing.assert_close(run(model, gate_input), expected, **tolerance)
    n_layers = KINDS.get(base, KINDS["llama"])
    assert len(layers(model)) == n_layers
    assert model.base_model.last_gates.shape == ((3, n_layers, EXPERTS) if per_layer else (3, EXPERTS))
    model = adapted(base, gate, per_layer)
    assert not torch.allclose(run(model, gate_input), expected, atol=0.1)
    for off in (model.disable_adapter, lambda: frozen_base(model)):
        with off():
            torch.testing.assert_close(outputs(model, **batch()), expected, **tolerance)


def test_adapter_and_gates_are_trained_and_nothing_else(base, gate, per_layer):
    model = adapted(base, gate, per_layer, **({"gate_top_k": 2} if gate == "topk_released" else {})).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "ilora_" in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with model.base_model.use_gates(inputs_of(base)):
        outputs(model, **batch()).square().mean().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained


def test_saving_and_loading_is_bit_equal(base, gate, per_layer, tmp_path):
    model, gate_input = adapted(base, gate, per_layer, gate_temperature=0.5), inputs_of(base)
    for module in model.modules():  # running averages travel too
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(base), tmp_path)
    assert torch.equal(loaded.eval().base_model.gate(gate_input), model.base_model.gate(gate_input))
    torch.testing.assert_close(run(loaded, gate_input), run(model, gate_input), rtol=0, atol=0)


def test_gradients_are_the_same_with_checkpointing(base, gate, per_layer):
    # Noise and dropout are drawn when the gates are computed, once, outside the blocks that run again.
    model, gate_input = adapted(base, gate, per_layer), inputs_of(base)
    for module in model.modules():  # the base's own dropout would differ between the two runs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        model.zero_grad()
        torch.manual_seed(5)
        with model.base_model.use_gates(gate_input):
            outputs(model, **batch()).square().mean().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_rows_are_independent_in_evaluation_and_merging_is_refused(base, gate, per_layer):
    model, gate_input = adapted(base, gate, per_layer), inputs_of(base)
    other = torch.cat([gate_input[:1], -gate_input[1:]])
    together, changed = run(model, gate_input), run(model, other)
    # 8-bit products scale whole rows of activations, each separately
    torch.testing.assert_close(together[0], changed[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1:], changed[1:], rtol=1e-3) or gate == "topk_released"
    with pytest.raises(MergeError):
        model.merge_and_unload()
