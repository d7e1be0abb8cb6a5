import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("golden_check", HERE / "check.py")
assert _spec is not None
assert _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)


def test_the_copies_agree(capsys):
    assert check.main([str(HERE)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in check.CHECKERS)
    assert "case3" in printed


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("ilora_linear.safetensors", "case1.y"),
        ("ilora_linear.safetensors", "case0.grad_gates"),
        ("ilora_linear.safetensors", "case2.grad_lora_A"),
        *(("gates.safetensors", f"{kind}.out") for kind in check.GATES),
        ("gates.safetensors", "conv.layer2.1.bn2.running_var"),
        ("dllm2rec_loss.safetensors", "case0.loss_bce"),
        ("dllm2rec_loss.safetensors", "case1.loss_dros"),
        *(
            ("dllm2rec_loss.safetensors", f"case3.{name}")
            for name in ("weight_position", "weight_confidence", "weight_consistency", "weight")
        ),
        ("dllm2rec_loss.safetensors", "case2.loss_ranking"),
        ("dllm2rec_loss.safetensors", "case4.loss_total"),
        ("dllm2rec_loss.safetensors", "case3.grad_logits"),
        ("grounding.safetensors", "distance"),
    ],
)
@pytest.mark.parametrize("damage", [1.001, float("nan")])
def test_a_wrong_number_exits_1(tmp_path, file, key, damage):
    tensors = load_file(HERE / file)
    tensors[key] = tensors[key] * damage
    save_file(tensors, tmp_path / file)
    if (HERE / file).with_suffix(".json").exists():
        shutil.copy((HERE / file).with_suffix(".json"), tmp_path)
    assert check.main([str(tmp_path)]) == 1


def test_a_wrong_schedule_exits_1(tmp_path):
    settings = json.loads((HERE / "lr_schedule.json").read_text())
    settings["warmup_steps"] += 1
    (tmp_path / "lr_schedule.json").write_text(json.dumps(settings))
    assert check.main([str(tmp_path)]) == 1


@pytest.mark.parametrize("key", ["valid_ratio", "hit_ratio_at_1"])
def test_a_wrong_hit_ratio_exits_1(tmp_path, key):
    reference = json.loads((HERE / "hit_ratio.json").read_text())
    reference[key] *= 1.001
    (tmp_path / "hit_ratio.json").write_text(json.dumps(reference))
    assert check.main([str(tmp_path)]) == 1


def test_other_ranks_exit_1(tmp_path):
    tensors = load_file(HERE / "grounding.safetensors")
    tensors["rank"] = tensors["rank"].flip(1).contiguous()
    save_file(tensors, tmp_path / "grounding.safetensors")
    assert check.main([str(tmp_path)]) == 1


def test_a_broken_file_exits_1(tmp_path, capsys):
    shutil.copy(HERE / "ilora_linear.safetensors", tmp_path)  # its .json is missing
    assert check.main([str(tmp_path)]) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_nothing_to_check_exits_2(tmp_path, capsys):
    (tmp_path / "other.safetensors").touch()
    assert check.main([str(tmp_path)]) == 2
    assert "nothing to check" in capsys.readouterr().err
    assert check.main([str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize("rule", ["per_expert", "total"])
def test_other_sizes_and_scales_of_the_same_format(tmp_path, rule):
    """A file made here, expert by expert, with sizes that no shipped case has."""
    torch.manual_seed(0)
    batch, length, in_features, out_features, rank, experts, alpha = 5, 2, 6, 9, 6, 3, 7
    scaling = alpha / (rank / experts if rule == "per_expert" else rank)
    shapes = {
        "x": (batch, length, in_features),
        "weight": (out_features, in_features),
        "bias": (out_features,),
        "lora_A": (rank, in_features),
        "lora_B": (out_features, rank),
        "gates": (batch, experts),
        "cotangent": (batch, length, out_features),
    }
    case = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs = {name: case[name].requires_grad_() for name in ("x", "lora_A", "lora_B", "gates")}
    y = case["x"] @ case["weight"].T + case["bias"]
    for expert in range(experts):
        own = slice(expert * rank // experts, (expert + 1) * rank // experts)
        delta = case["x"] @ case["lora_A"][own].T @ case["lora_B"][:, own].T
        y = y + scaling * case["gates"][:, expert, None, None] * delta
    (y * case["cotangent"]).sum().backward()
    case |= {"y": y} | {f"grad_{name}": tensor.grad for name, tensor in inputs.items()}
    save_file(
        {f"case0.{name}": tensor.detach().float().contiguous() for name, tensor in case.items()},
        tmp_path / "ilora_linear.safetensors",
    )
    settings = [{"case": 0, "r": rank, "num_experts": experts, "lora_alpha": alpha, "scaling": scaling}]
    (tmp_path / "ilora_linear.json").write_text(json.dumps(settings))
    assert check.main([str(tmp_path)]) == 0
