import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm2rec.core.errors import CheckpointError
from llm2rec.core.train.checkpoint import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_tensors,
    trainable_weights,
)
from llm2rec.core.train.optimizer import adamw


def model_of(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2))
    model[2].bias.requires_grad_(False)
    return model


def train(model, optimizer, n_steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()


def test_adamw_uses_trainable_parameters_and_decays_only_matrices():
    model = model_of()
    groups = adamw(model, lr=0.1, weight_decay=0.5).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [sorted(p.ndim for p in group["params"]) for group in groups] == [[2, 2], [1, 1, 1]]
    assert all(p is not model[2].bias for group in groups for p in group["params"])


def test_optimizer_state_round_trip_is_exact(tmp_path):
    model = model_of()
    optimizer = adamw(model, 0.05, 0.1)
    train(model, optimizer, 3)
    save_tensors(trainable_weights(model), tmp_path / "model.safetensors")
    save_tensors(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")

    other = model_of(seed=1)
    other[2].bias.data.copy_(model[2].bias)  # frozen, so not in the checkpoint
    restored = adamw(other, 0.05, 0.1)
    load_weights(other, tmp_path / "model.safetensors")
    load_optimizer(other, restored, tmp_path / "optimizer.safetensors")
    saved, loaded = optimizer_tensors(model, optimizer), optimizer_tensors(other, restored)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert {name.rsplit("/", 1)[1] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    assert saved["0.weight/step"] == 3

    for each, its in ((model, optimizer), (other, restored)):
        train(each, its, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_frozen_weights_are_not_saved(tmp_path):
    weights = trainable_weights(model_of())
    assert "2.bias" not in weights
    assert "2.weight" in weights


class Running(nn.Module):
    """A frozen and a trained module with running statistics, and buffers that are not saved."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(3).requires_grad_(False)
        self.trained = nn.BatchNorm1d(3)
        self.trained.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x):
        return self.trained(self.frozen(x))


def test_running_statistics_of_trained_modules_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = Running()
    for _ in range(3):
        model(torch.randn(8, 3) * 2 + 1)
    stored = trainable_weights(model)
    assert stored.keys() == {
        f"trained.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert stored["trained.num_batches_tracked"] == 3
    save_tensors(stored, tmp_path / "model.safetensors")
    other = Running()
    load_weights(other, tmp_path / "model.safetensors")
    assert all(torch.equal(other.state_dict()[name], value) for name, value in stored.items())
    assert torch.equal(other.frozen.running_mean, torch.zeros(3))


def test_file_without_running_statistics_raises(tmp_path):
    weights = trainable_weights(Running())
    del weights["trained.running_var"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing trained\.running_var"):
        load_weights(Running(), tmp_path / "model.safetensors")


def test_saved_weights_are_copies():
    model = model_of()
    weights = trainable_weights(model)
    before = weights["0.weight"].clone()
    model[0].weight.data.add_(1)
    assert torch.equal(weights["0.weight"], before)


def test_tied_and_transposed_tensors_are_saved(tmp_path):
    table = torch.arange(6.0).view(2, 3)
    save_tensors({"a": table, "b": table, "c": table.T}, tmp_path / "x.safetensors")
    stored = load_file(tmp_path / "x.safetensors")
    assert torch.equal(stored["a"], stored["b"])
    assert torch.equal(stored["c"], table.T)


def damaged(tmp_path, change):
    weights = trainable_weights(model_of())
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("0.bias"), r"missing 0\.bias"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda weights: weights.update({"0.bias": torch.zeros(7)}), r"0\.bias has shape \(7,\), expected \(3,\)"),
        # Would be broadcast by a plain copy.
        (lambda weights: weights.update({"0.weight": torch.zeros(1, 4)}), r"0\.weight has shape \(1, 4\), expected"),
    ],
)
def test_weights_of_another_model_raise_and_change_nothing(tmp_path, change, message):
    model = model_of(seed=3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=rf"does not fit the model: .*{message}"):
        load_weights(model, damaged(tmp_path, change))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_optimizer_state_of_another_model_raises(tmp_path):
    model = model_of()
    optimizer = adamw(model, 0.05, 0.1)
    train(model, optimizer, 1)
    tensors = optimizer_tensors(model, optimizer) | {"other.weight/exp_avg": torch.zeros(1)}
    save_tensors(tensors, tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown parameters: other\.weight"):
        load_optimizer(model, optimizer, tmp_path / "optimizer.safetensors")
