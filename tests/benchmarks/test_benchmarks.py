"""The benchmarks run and write the headline names they promise; no test asks for a speed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import harness
import ilora_layer
import pytest
import teacher_step
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MIB = 2**20
PROMISED = {
    "plan_check.py": {"live_ratio_least", "live_ratio_most", "rss_ratio_most", "rss_mapped_ratio_most"},
    "plan_table.py": {"gib_7b_1_gpu", "tokens_per_second_7b_1_gpu"},
    "ilora_layer.py": {"time_vs_lora", "memory_vs_lora", "speedup_vs_per_expert", "memory_e16_vs_e2"},
    "teacher_step.py": {"time_vs_lora_gate_cached", "time_vs_lora_gate_computed", "tokens_per_second"},
    "title_teacher.py": {"candidates_speedup_vs_passes", "step_peak_vs_all_logits", "search_rows_per_second"},
    "student_step.py": {"sequences_vs_plain", "sequences_share_of_floor", "evaluation_share_of_floor"},
    "serving_latency.py": {"one_user_vs_matvec", "one_user_p99_ms_10000", "many_users_p50_ms_1000"},
    "serving_blend.py": {
        "blend_ndcg20",
        "blend_ms",
        "blend_bytes",
        "sasrec_ndcg20",
        "neighbours_ndcg20",
        "blend_share",
    },
    "catalogue_memory.py": {"peak_vs_state_1e4", "beyond_state_vs_1e3_1e4", "peak_vs_plain_1e4", "time_vs_plain_1e4"},
    "listwise_step.py": {"time_of_scores_vs_tiles_15301_t1", "time_of_tiles_vs_own_15301_t1"},
    "preparation_memory.py": {"peak_mebibytes_1e5", "interactions_per_second_1e5"},
    "teacher_export.py": {"tokens_per_second_vs_forward", "tokens_per_second_vs_frozen", "padding_share"},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", PROMISED)
def test_a_quick_run_writes_what_others_read(script, tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--device", "cpu", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result.keys() == {"headline", "samples", "command", "commit", "environment"}
    assert result["headline"].keys() >= PROMISED[script]
    assert all(math.isfinite(number) and number > 0 for number in result["headline"].values())
    assert json.loads(done.stdout[done.stdout.index("{\n") :]) == result["headline"]
    assert str(tmp_path) not in file.read_text()
    assert str(ROOT) not in file.read_text()


def test_the_peak_is_what_is_held_at_once():
    def step():
        first = torch.empty(MIB, dtype=torch.uint8)
        del first
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        third = torch.empty(3 * MIB, dtype=torch.uint8)  # 5 MiB at once, 6 in all
        del second, third

    assert harness.peak_bytes(step, CPU) == 5 * MIB
    assert harness.peak_bytes(step, CPU) == 5 * MIB, "a second count starts from nothing"


def test_the_peak_of_a_frozen_layer_is_its_output_and_the_gradient_of_its_input():
    layer = nn.Linear(64, 32, bias=False).requires_grad_(False)
    x, grad = torch.randn(100, 64, requires_grad=True), torch.randn(100, 32)
    assert harness.peak_bytes(lambda: torch.autograd.grad(layer(x), x, grad), CPU) == 100 * (32 + 64) * 4


def test_saved_bytes_count_each_storage_once_and_no_weight():
    x = torch.randn(100, 64, requires_grad=True)
    down, up = nn.Linear(64, 8, bias=False), nn.Linear(8, 32, bias=False)
    weights = [down.weight, up.weight]
    # x for the gradient of `down`, which is also that of its double; the 8 wide activation for that of `up`.
    assert harness.saved_bytes(lambda: up(down(x)) + up(down(x.view(10, 10, 64))).view(100, 32), weights) == (
        100 * (64 + 8 + 8) * 4
    )


def test_ratios_are_taken_within_rounds():
    spread = harness.spread([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert spread == {"median": 2.0, "lower_quartile": 1.5, "upper_quartile": 2.5}


def test_each_round_times_every_step_and_another_goes_first():
    calls = []
    seconds = harness.seconds_by_round({name: lambda name=name: calls.append(name) for name in "abc"}, 3, warm_up=0)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("experts", [1, 2, 4, 16])
def test_all_variants_of_the_layer_give_the_same(experts):
    torch.manual_seed(experts)
    base = nn.Linear(24, 40, bias=False)
    trained, forwards = ilora_layer.variants(base, experts, 0.0)
    x, gates = torch.randn(3, 5, 24), torch.rand(3, experts).softmax(dim=1)
    ilora_layer.check_equal(forwards, x, gates)
    counts = {name: sum(w.numel() for w in module.parameters() if w.requires_grad) for name, module in trained.items()}
    assert counts == {"bare": 0, **dict.fromkeys(("lora", "ilora", "xlora", "per_expert"), 16 * (24 + 40))}


def test_variants_that_differ_are_refused():
    _, forwards = ilora_layer.variants(nn.Linear(24, 40, bias=False), 4, 0.0)
    forwards["per_expert"] = forwards["bare"]
    with pytest.raises(SystemExit, match="per_expert differs from iLoRA"):
        ilora_layer.check_equal(forwards, torch.randn(3, 5, 24), torch.rand(3, 4))


def test_operations_and_budget_follow_the_shapes():
    base = teacher_step.frozen_llama(teacher_step.llama(8, 16, 3, 2), "float32", CPU)
    batch = teacher_step.random_batch(base, 2, 5)
    linear = sum(module.weight.numel() for module in base.modules() if isinstance(module, nn.Linear))
    causal_attention = 3 * 2 * (2 * 5 * 5 * 8)  # blocks, rows, and half of two products of T x T x d
    assert teacher_step.step_flops(base.config, batch) == 4 * 10 * linear + 3 * causal_attention
    budget = teacher_step.budget_bytes(base, 7, batch, torch.float32, checkpointing=False)
    assert budget["activations"] == 3 * 10 * 4 * (2 * 8 + 6 * 8 + 4 * 16)
    assert budget["adapter_gradients_adam"] == 28
    assert budget["total"] == sum(budget.values()) - budget["total"]


def test_models_with_and_without_adapter_share_the_frozen_weights():
    base = teacher_step.frozen_llama(teacher_step.llama(8, 16, 3, 2), "float32", CPU)
    adapted = teacher_step.adapted(base, teacher_step.LoraConfig(target_modules=teacher_step.TARGETS), False)
    assert type(base.layers[0].self_attn.q_proj) is nn.Linear, "the original must stay without adapter"
    frozen = {weight.data_ptr() for weight in adapted.parameters() if not weight.requires_grad}
    assert frozen == {weight.data_ptr() for weight in base.parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measured_memory_is_near_the_budget(checkpointing):
    torch.manual_seed(0)
    base = teacher_step.frozen_llama(teacher_step.llama(64, 176, 6, 4), "float32", CPU)
    batch = teacher_step.random_batch(base, 8, 64)
    model = teacher_step.adapted(base, teacher_step.LoraConfig(r=4, target_modules=teacher_step.TARGETS), checkpointing)
    step = teacher_step.training_step(model, batch, teacher_step.nullcontext)
    step()  # the first makes Adam's averages
    trained = teacher_step.trained_bytes(model)
    peak = teacher_step.n_bytes(base) + 3 * trained + harness.peak_bytes(step, CPU)
    budget = teacher_step.budget_bytes(base, trained, batch, torch.float32, checkpointing)
    assert 1.0 < peak / budget["total"] < 1.2
