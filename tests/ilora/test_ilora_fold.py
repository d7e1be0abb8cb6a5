"""One instance's mixture as a plain LoRA."""

import subprocess
import sys
import textwrap

import pytest
import torch
from ilora_helpers import adapt, batch, gate_inputs, layers, outputs, quantized, tiny, train
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from llm2rec.ilora import GateError, ILoraConfig, ILoraError, fold


def write(folder, config, tensors):
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"scaling": "per_expert", "alpha": 5}),
        ("llama", {"gate_per_layer": True, "gate": "mlp"}),
        ("llama", {"rank_pattern": {"up_proj": 4, r"layers\.1\..*k_proj": 12}, "alpha_pattern": {"q_proj": 3}}),
        ("llama", {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 3}, "scaling": "per_expert"}),
        ("llama", {"gate": "topk", "dropout": 0.5, "modules_to_save": ["lm_head"]}),
        ("bert", {"bias": "all"}),
        ("bert", {"bias": "ilora_only"}),
        ("gpt2", {}),
        ("8bit", {}),
        ("4bit", {}),
    ],
)
def test_vanilla_peft_loads_it_with_equal_outputs(tmp_path, kind, options):
    def base():
        return quantized(kind) if kind.endswith("bit") else tiny(kind)

    model = adapt(base(), **options)
    with torch.no_grad():  # what is trained in full must have moved
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ilora_" not in name:
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    gate_input = gate_inputs(3, 64 if kind.endswith("bit") else 16)
    with torch.no_grad(), model.base_model.use_gates(gate_input) as gates:
        expected = outputs(model, **batch())
    # A 4-bit model without iLoRA may take a bfloat16 kernel on some CPUs; see test_ilora_quantized.py.
    tolerance = 0.01 if kind == "4bit" else 1e-4
    for row in range(3):
        write(tmp_path / str(row), *fold(model, gates[row]))
        loaded = PeftModel.from_pretrained(base(), tmp_path / str(row)).eval()
        assert type(loaded.peft_config["default"]) is LoraConfig
        assert not layers(loaded)
        with torch.no_grad():
            alone = outputs(loaded, **batch())
        torch.testing.assert_close(alone[row], expected[row], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(alone[row - 1], expected[row - 1], rtol=10 * tolerance, atol=10 * tolerance)


def test_a_process_without_llm2rec_loads_and_merges_it(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapt(base)
    with torch.no_grad(), model.base_model.use_gates(gate_inputs()) as gates:
        logits = outputs(model, **batch())
    write(tmp_path / "user", *fold(model, gates[1:2]))
    save_file({"logits": logits, "ids": batch()["input_ids"]}, tmp_path / "expected.safetensors")
    program = f"""
        import sys, torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
        model = PeftModel.from_pretrained(model, {str(tmp_path / "user")!r}).merge_and_unload()
        expected = load_file({str(tmp_path / "expected.safetensors")!r})
        with torch.no_grad():
            logits = model(expected["ids"]).logits
        torch.testing.assert_close(logits[1], expected["logits"][1], rtol=1e-4, atol=1e-4)
        assert "llm2rec" not in sys.modules
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "equal"


def test_tensors_load_in_memory_and_are_not_those_in_training():
    model = adapt(tiny("llama"))
    config, tensors = fold(model, torch.full((4,), 0.25))
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    train(model, seed=8)
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)
    plain = get_peft_model(tiny("llama"), config)
    result = set_peft_model_state_dict(plain, tensors)
    assert not result.unexpected_keys
    assert len(tensors) == 2 * len(layers(model))


def test_another_adapter_can_be_folded(tmp_path):
    model = adapt(tiny("llama"))
    model.add_adapter("other", ILoraConfig(r=6, num_experts=3, target_modules=["v_proj"]))
    train(model, "other", seed=7)
    _, tensors = fold(model, torch.full((3,), 1 / 3), "other")
    write(tmp_path, *fold(model, torch.full((3,), 1 / 3), "other"))
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(tensors) == 4


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (torch.ones(2, 4), r"holds the mixture of one instance, got gates of shape \(2, 4\); fold one row"),
        (torch.ones(5), r"must be floats of shape \(B, 4\)"),
        (torch.ones(4, dtype=torch.long), "must be floats"),
    ],
)
def test_gates_of_several_instances_are_refused(gates, message):
    with pytest.raises(GateError, match=message):
        fold(adapt(tiny("llama")), gates)


def test_a_model_without_the_adapter_is_refused():
    with pytest.raises(ILoraError, match=r"no iLoRA adapter 'other' to fold; the model has \['default'\]"):
        fold(adapt(tiny("llama")), torch.ones(4), "other")
    with pytest.raises(ILoraError, match=r"the model has \[\]"):
        fold(get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])), torch.ones(4))
    with pytest.raises(ILoraError, match=r"the model has \[\]"):
        fold(nn.Linear(2, 2), torch.ones(4))
