"""Adapters that no forward pass uses are refused before the first step, and the dry run leaves no trace."""

import copy
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from architecture_helpers import make_architecture
from peft import LoraConfig, get_peft_model
from teacher_helpers import CPU, build, engine_in, fit, split, teacher_rows
from torch import nn

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.dry_run import check_trained_tensors, exclusion
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, PromptSettings, TeacherSettings
from llm2rec.teacher.trainer import ItemObjective, check_first_pass


def rows_for(model, data):
    return [teacher_rows(model, split(data, name), np.arange(8)) for name in ("train", "validation")]


def fit_adapters(folder, data, run, tuning, **adapter):
    """Train adapters of all linear layers, or raise."""
    llm = LLMSettings("x", str(folder), pooling="mean", prompt=PromptSettings(max_tokens=320))
    options = {"r": 4, "dropout": 0.0, "target_modules": "all-linear"}
    settings = TeacherSettings(tuning=tuning, adapter=AdapterSettings(**options | adapter))
    model, _ = build_teacher(llm, str(folder), settings, data, split(data).targets.numpy(), CPU)
    fit(model, *rows_for(model, data), engine_in(run, epochs=1, batch_size=4, micro_batch_size=4), tuning=tuning)


@pytest.mark.parametrize("tuning", ["ilora", "lora"])
def test_layers_that_no_pass_uses_are_named_and_the_proposed_exclusion_works(tuning, data, llm_folder, tmp_path):
    adapter = {"target_modules": "all-linear"} | ({} if tuning == "ilora" else {"num_experts": 4})
    model, _ = build("bert", llm_folder, data, adapter=adapter, tuning=tuning)
    with pytest.raises(ConfigError, match=r"'bert' uses the adapters of pooler\.dense .*exclude_modules='pooler\.\*'"):
        fit(model, *rows_for(model, data), engine_in(tmp_path / "run", epochs=1), tuning=tuning)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    model, _ = build("bert", llm_folder, data, adapter=adapter | {"exclude_modules": "pooler.*"}, tuning=tuning)
    fit(model, *rows_for(model, data), engine_in(tmp_path / "again", epochs=1), tuning=tuning)


@pytest.mark.parametrize(
    ("case", "tuning", "why", "exclude"),
    [
        ("deberta, relative", "ilora", "positions that all rows share", "[pos_proj,pos_q_proj]"),
        ("deberta-v2, relative", "ilora", "positions that all rows share", "[pos_key_proj,pos_query_proj]"),
        ("deberta-v2, shared keys", "ilora", "positions that all rows share", "[key_proj,query_proj]"),
        ("qwen3_next", "ilora", "flattened", "[down_proj,gate_proj,shared_expert_gate,up_proj]"),
        ("llama4_text", "ilora", "several tensors .* or read tokens", "'layers.1.feed_forward.*'"),
        ("llama4_text", "lora", r"several tensors \(a router\):", "[router]"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named_and_the_proposed_exclusion_works(
    case, tuning, why, exclude, data, tmp_path
):
    folder = make_architecture(case, tmp_path / "llm", data.titles)
    with pytest.raises(ConfigError, match=rf"{why}.*exclude_modules={re.escape(exclude)}`"):
        fit_adapters(folder, data, tmp_path / "run", tuning)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    named = exclude.strip("'") if "*" in exclude else exclude.strip("[]").split(",")
    fit_adapters(folder, data, tmp_path / "again", tuning, exclude_modules=named)


def test_lora_of_fused_experts_needs_a_dropout_of_0(data, tmp_path):
    folder = make_architecture("qwen3_next", tmp_path / "llm", data.titles)
    with pytest.raises(ConfigError, match=r"lora_dropout != 0; use `teacher\.adapter\.dropout=0`"):
        fit_adapters(folder, data, tmp_path / "run", "lora", dropout=0.1)
    fit_adapters(folder, data, tmp_path / "again", "lora")


def test_the_dry_run_leaves_no_trace(data, llm_folder, tmp_path):
    """Weights, running statistics, gradients, modes and random numbers; the convolutional gate has all of them."""
    model, _ = build("llama", llm_folder, data, adapter={"gate": "conv", "dropout": 0.3})
    model.train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    engine, state = engine_in(tmp_path / "run"), torch.get_rng_state()
    check_first_pass(model, ItemObjective(model, *rows_for(model, data), engine), engine)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Mixture(nn.Module):
    """Two experts, of which the one row uses the first."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 1)}) for _ in range(2))

    def forward(self, x):
        return self.experts[0]["up"](x).sum()


def test_an_expert_that_the_row_does_not_reach_is_refused_on_several_processes_only():
    model = get_peft_model(Mixture(), LoraConfig(target_modules=["up"]))

    def loss(n_rows):
        return nullcontext(model(torch.ones(n_rows, 2)))

    check_trained_tensors(model, loss, "x")
    with pytest.raises(ConfigError, match=r"'x' uses the adapters of .*experts\.1\.up"):
        check_trained_tensors(model, loss, "x", n_processes=2)


def test_a_tensor_outside_of_an_adapter_is_named():
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match="'x' uses these trained tensors: bias"):
        check_trained_tensors(model, lambda n_rows: nullcontext(model.weight.sum()), "x")


def test_an_out_of_memory_error_is_left_to_the_first_step():
    def loss(n_rows):
        raise torch.OutOfMemoryError

    check_trained_tensors(nn.Linear(2, 1), loss, "x")


def test_errors_of_a_models_own_code_are_readable():
    def loss(n_rows):
        raise TypeError("forward() got an unexpected keyword")

    with pytest.raises(ConfigError, match="'x' fails on the first training row with TypeError: forward"):
        check_trained_tensors(nn.Linear(2, 1), loss, "x")


@pytest.mark.parametrize(
    ("unused", "used", "expected"),
    [
        (["0.mixer.dt_proj", "1.mixer.dt_proj"], ["0.mixer.in_proj"], "[dt_proj]"),
        (["pooler.dense"], ["encoder.0.dense"], "'pooler.*'"),
        (["vision.a.q", "vision.b.q"], ["text.0.q"], "'vision.*'"),
        (["layers.1.k"], ["layers.0.k", "layers.10.k"], "[layers.1.k]"),
        (["layers.2.k", "layers.3.k"], ["layers.0.k", "layers.2.q"], "'layers.2.k.*|layers.3.*'"),
    ],
)
def test_the_proposed_exclusion_leaves_out_what_is_unused_alone(unused, used, expected):
    assert exclusion(unused, used) == expected
