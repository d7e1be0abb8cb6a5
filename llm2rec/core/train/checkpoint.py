"""Trained weights and optimizer state as safetensors, the same files for one process, DDP and ZeRO-1/2.

Tensors are stored unsharded under their parameter's name, so a run may resume on another number of processes. Nothing
is pickled.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError
from llm2rec.core.train.sharding import is_zero, load_zero, zero_tensors

__all__ = [
    "load_optimizer",
    "load_weights",
    "optimizer_tensors",
    "read_tensors",
    "save_tensors",
    "trainable_weights",
    "trained_buffers",
]


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers of modules with trainable parameters, by name, such as running statistics.

    Buffers of other modules belong to the frozen base model or follow from the settings, unless their module sets
    ``has_trained_buffers``.
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        if getattr(module, "has_trained_buffers", False)
        or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False)
        # No public API; `state_dict()` of the whole model would copy a quantised base model.
        if name not in module._non_persistent_buffers_set
    }


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and `trained_buffers` by name, on the CPU and contiguous; no frozen base model."""
    return {name: _to_cpu(tensor) for name, tensor in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**parameters, **trained_buffers(model)}


def load_weights(model: nn.Module, file: Path) -> None:
    """Load the result of `trainable_weights` into the model.

    Raises:
        CheckpointError: If names or shapes differ from those of the model.
    """
    stored = read_tensors(file)
    trained = _trained(model)
    problems = [f"missing {name}" for name in trained.keys() - stored.keys()]
    problems += [f"unknown {name}" for name in stored.keys() - trained.keys()]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in trained.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model: {'; '.join(sorted(problems)[:5])}.")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(stored[name])


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors by name; tied tensors are written as copies."""
    save_file({name: _to_cpu(tensor) for name, tensor in tensors.items()}, file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read tensors written by `save_tensors`.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file} ({error}); restore the original file.") from error


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def optimizer_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """State of the optimizer as ``{"<parameter>/<state>": tensor}``; a collective under ZeRO.

    Args:
        model: The unwrapped model.
        optimizer: A torch optimizer, or a DeepSpeed optimizer that wraps one.
    """
    if is_zero(optimizer):
        return zero_tensors(model, optimizer)
    names = _names(model)
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Restore the result of `optimizer_tensors`.

    Raises:
        CheckpointError: If the optimizer does not have a stored parameter.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file).items():
        parameter, key = name.rsplit("/", 1)
        stored.setdefault(parameter, {})[key] = tensor
    if is_zero(optimizer):
        load_zero(model, optimizer, stored)
        return
    names = _names(model)
    state_dict = optimizer.state_dict()
    parameters = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    unknown = stored.keys() - set(parameters)
    if unknown:
        raise CheckpointError(f"{file} has optimizer state of unknown parameters: {', '.join(sorted(unknown)[:5])}.")
    state_dict["state"] = {index: stored[name] for index, name in enumerate(parameters) if name in stored}
    optimizer.load_state_dict(state_dict)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}
