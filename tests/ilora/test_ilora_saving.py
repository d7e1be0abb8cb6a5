import json

import pytest
import torch
from ilora_helpers import KINDS, adapt, batch, gate_inputs, layers, outputs, tiny, train
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llm2rec.ilora import AdapterKeysError, ILoraConfig

WEIGHTS = "adapter_model.safetensors"


def result_of(model, **inputs):
    with model.base_model.use_gates(gate_inputs()):
        return outputs(model, **inputs)


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_round_trip_is_bit_equal(tmp_path, kind, low_cpu_mem_usage):
    model = adapt(tiny(kind), scaling="per_expert", alpha=5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["gate_input_size"], config["scaling"]) == ("ILORA", 16, "per_expert")
    saved = load_file(tmp_path / WEIGHTS)
    assert len(saved) == 2 * KINDS[kind] + 1
    assert "base_model.ilora_gate.weight" in saved

    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(result_of(loaded, **batch()), result_of(model, **batch()))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


def test_loading_to_train_on(tmp_path):
    adapt(tiny("llama")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "ilora_" in name}


def test_two_adapters_are_saved_apart_and_load_under_any_name(tmp_path):
    model = adapt(tiny("llama"))
    model.add_adapter("other", ILoraConfig(r=6, num_experts=3, target_modules=["v_proj"]))
    train(model, "other", seed=7)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * KINDS["llama"] + 1
    assert len(load_file(tmp_path / "other" / WEIGHTS)) == 2 * 2 + 1

    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "renamed")
    assert torch.equal(result_of(loaded, **batch()), result_of(model, **batch()))
    loaded.set_adapter("renamed")
    model.set_adapter("other")
    assert torch.equal(result_of(loaded, **batch()), result_of(model, **batch()))


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = adapt(tiny("llama"), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "ilora_" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(result_of(loaded, **batch()), result_of(model, **batch()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.ilora_gate.weight"),
            r"1 missing \(base_model.ilora_gate.(default|other).weight\)",
        ),
        (lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.ilora_B.weight"), r"1 missing \(.*up_proj.ilora"),
        (lambda t: t.update(stranger=torch.zeros(1)), r"0 missing; 1 foreign \(stranger\)"),
        (
            lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.ilora_B.weight": torch.zeros(1)}),
            r"1 foreign \(.*layers.7",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": torch.zeros(32, 16)}),
            r"1 foreign \(.*base_layer.weight\)",
        ),
    ],
)
def test_a_file_that_is_not_this_adapter_is_refused(tmp_path, change, message):
    adapt(tiny("llama")).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(AdapterKeysError, match=message):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with pytest.raises(AdapterKeysError, match=message):
        adapt(tiny("llama")).load_adapter(tmp_path, "other")


def test_resized_embeddings_travel_with_the_adapter(tmp_path):
    model = adapt(tiny("llama"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(tiny("llama", seed=5), tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapt(tiny("llama"), target_modules=["q_proj", "c_fc"]).save_pretrained(tmp_path)
    with pytest.raises(
        AdapterKeysError, match=r"4 missing .*; 4 foreign .*Load it into the base model and with the conf"
    ):
        PeftModel.from_pretrained(tiny("gpt2"), tmp_path)


def test_another_size_is_refused(tmp_path):
    adapt(tiny("llama")).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"base_model.ilora_gate.weight": torch.zeros(4, 15)}))
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.ilora_gate"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


def test_saved_tensors_are_the_adapters_alone(tmp_path):
    model = adapt(tiny("bert"))
    model.save_pretrained(tmp_path)
    parameters = sum(
        p.numel() for layer in layers(model) for p in (*layer.ilora_A.parameters(), *layer.ilora_B.parameters())
    )
    assert sum(t.numel() for t in load_file(tmp_path / WEIGHTS).values()) == parameters + 4 * 16
