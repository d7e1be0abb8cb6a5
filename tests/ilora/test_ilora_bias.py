"""Trained biases, and ranks and scales that differ by layer."""

import pytest
import torch
from ilora_helpers import adapt, batch, gate_inputs, layers, outputs, tiny
from peft import PeftModel

from llm2rec.ilora import AdapterKeysError, ILoraConfig, ILoraError, frozen_base


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("bias", ["all", "ilora_only"])
def test_biases_are_trained_and_travel(tmp_path, kind, bias):
    model = adapt(tiny(kind), bias=bias)
    biases = [p for name, p in model.named_parameters() if p.requires_grad and "ilora_" not in name]
    adapted = [layer.base_layer.bias for layer in layers(model)]
    in_all = sum(name.endswith(".bias") for name, _ in tiny(kind).named_parameters())
    assert len(biases) == (in_all if bias == "all" else len(adapted))
    with torch.no_grad():
        for parameter in biases:
            parameter.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    with model.base_model.use_gates(gate_inputs()), loaded.base_model.use_gates(gate_inputs()):
        assert torch.equal(outputs(loaded, **batch()), outputs(model, **batch()))


def test_frozen_base_refuses_where_the_base_is_trained():
    model = adapt(tiny("bert"), bias="all")
    with (
        pytest.raises(ILoraError, match=r"adapter 'default' trains biases of the base \(bias='all'\)"),
        frozen_base(model),
    ):
        pass


def test_biases_of_an_adapter_without_them_are_foreign(tmp_path):
    adapt(tiny("bert"), bias="all").save_pretrained(tmp_path)
    config = ILoraConfig.from_pretrained(tmp_path)
    config.bias = "none"
    config.save_pretrained(tmp_path)
    with pytest.raises(AdapterKeysError, match=r"foreign \(.*bias"):
        PeftModel.from_pretrained(tiny("bert"), tmp_path)


def test_rank_and_alpha_patterns_reach_their_layers_and_travel(tmp_path):
    options = {"rank_pattern": {"up_proj": 4, r"layers\.1\..*k_proj": 12}, "alpha_pattern": {"q_proj": 3}, "alpha": 32}
    model = adapt(tiny("llama"), **options)
    for layer in layers(model):
        rank = 4 if "up_proj" in layer.name else 12 if "1.self_attn.k_proj" in layer.name else 8
        assert layer.ilora_A["default"].weight.shape[0] == layer.ilora_B["default"].weight.shape[1] == rank
        assert layer.layouts["default"].scale == (3 if "q_proj" in layer.name else 32) / rank
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with model.base_model.use_gates(gate_inputs()), loaded.base_model.use_gates(gate_inputs()):
        assert torch.equal(outputs(loaded, **batch()), outputs(model, **batch()))


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(
        ValueError, match=r"no adapted layer matches rank_pattern\['upproj'\]; the adapted layers are model"
    ):
        adapt(tiny("llama"), rank_pattern={"upproj": 4})
