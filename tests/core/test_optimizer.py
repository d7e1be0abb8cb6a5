import pytest
import torch
from engine_helpers import engine_in
from torch import nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.checkpoint import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_tensors,
    trainable_weights,
)
from llm2rec.core.train.optimizer import adamw


class Parts(nn.Module):
    """Names that hold ``gate`` as a component, and one that only begins with it."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.gate_proj = nn.Linear(4, 3)
        self.gate = nn.ModuleDict({"default": nn.Linear(3, 3), "frozen": nn.Linear(2, 2).requires_grad_(False)})
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.gate["default"](self.gate_proj(x).tanh()))


def train(model, optimizer, n_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def named(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_parameter_groups_by_decay_and_name_component():
    model = Parts()
    groups = adamw(model, 0.1, 0.5, {"gate": 3.0}).param_groups
    found = {(group["weight_decay"], group["lr_ratio"]): named(model, group) for group in groups}
    assert found == {
        (0.5, 1.0): {"gate_proj.weight", "head.weight"},
        (0.0, 1.0): {"gate_proj.bias", "head.bias"},
        (0.5, 3.0): {"gate.default.weight"},
        (0.0, 3.0): {"gate.default.bias"},
    }


def test_first_matching_component_applies():
    model = Parts()
    model.head = nn.ModuleDict({"default": model.head})
    groups = adamw(model, 0.1, 0.0, {"gate": 3.0, "default": 2.0}).param_groups
    found = {name: group["lr_ratio"] for group in groups for name in named(model, group) if "weight" in name}
    assert found == {"gate_proj.weight": 1.0, "gate.default.weight": 3.0, "head.default.weight": 2.0}


def test_lr_ratio_scales_the_learning_rate(tmp_path):
    """The first step of Adam moves every weight by its learning rate, whatever the gradient."""
    engine = engine_in(tmp_path, learning_rate=0.01)
    model = Parts()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, 0.01, 0.0, {"gate": 0.25})
    engine.begin_step(0, 10, optimizer)
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        expected = 0.0 if "frozen" in name else 0.01 * (0.25 if name.startswith("gate.") else 1.0)
        moved = (parameter - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_invalid_ratio_raises(ratio):
    with pytest.raises(ConfigError, match=rf"ratio of 'gate' is {ratio}, expected a positive finite number"):
        adamw(Parts(), 0.1, 0.0, {"gate": ratio})


@pytest.mark.parametrize("component", ["gates", "frozen"])
def test_ratio_without_trainable_parameter_raises(component):
    with pytest.raises(ConfigError, match=f"given for {component}, which match no trainable parameter"):
        adamw(Parts(), 0.1, 0.0, {component: 2.0})


@pytest.mark.parametrize("stored_with", [{"gate": 3.0}, None])
def test_state_resumes_exactly_with_other_parameter_groups(tmp_path, stored_with):
    """State is saved by parameter name, so the groups may differ."""
    model = Parts()
    optimizer = adamw(model, 0.05, 0.1, {"gate": 3.0})
    train(model, optimizer, 3)
    kept = adamw(model, 0.05, 0.1, stored_with)
    kept.state.update(optimizer.state)
    save_tensors(trainable_weights(model), tmp_path / "model.safetensors")
    save_tensors(optimizer_tensors(model, kept), tmp_path / "optimizer.safetensors")

    other = Parts(seed=1)
    restored = adamw(other, 0.05, 0.1, {"gate": 3.0})
    load_weights(other, tmp_path / "model.safetensors")
    load_optimizer(other, restored, tmp_path / "optimizer.safetensors")
    assert [group["lr_ratio"] for group in restored.param_groups] == [1.0, 1.0, 3.0, 3.0]
    for each, its in ((model, optimizer), (other, restored)):
        train(each, its, 2, seed=9)
    ours, theirs = trainable_weights(other), trainable_weights(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
