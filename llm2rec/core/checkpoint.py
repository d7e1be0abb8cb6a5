"""Trainable weights and optimizer state as safetensors, the same files for one process, DDP and ZeRO-1/2.

Tensors are stored whole under their parameter's name, so a run may continue on another number of processes. Nothing
is pickled.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError

__all__ = ["load_optimizer", "load_weights", "optimizer_tensors", "save_tensors", "trainable_weights"]


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name, on the CPU and contiguous. A frozen base model is not among them."""
    return {name: _to_cpu(p) for name, p in model.named_parameters() if p.requires_grad}


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy stored weights into the trained parameters.

    Raises:
        CheckpointError: If names or shapes differ from those of the model.
    """
    stored = load_file(file)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"missing {name}" for name in own.keys() - stored.keys()]
    problems += [f"unknown {name}" for name in stored.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(stored[name].shape)}, expected {tuple(p.shape)}"
        for name, p in own.items()
        if name in stored and stored[name].shape != p.shape
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model: {'; '.join(sorted(problems)[:5])}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors by name; tied ones are written once each, as copies."""
    save_file({name: _to_cpu(tensor) for name, tensor in tensors.items()}, file)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def optimizer_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """State of the optimizer as ``{"<parameter>/<state>": tensor}``; a collective under ZeRO.

    Args:
        model: The unwrapped model.
        optimizer: A torch optimizer, or DeepSpeed's around one.
    """
    if _is_zero(optimizer):
        return _zero_tensors(model, optimizer)
    names = _names(model)
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(model: nn.Module, optimizer: Any, file: Path) -> None:
    """Restore what `optimizer_tensors` returned.

    Raises:
        CheckpointError: If a stored parameter is not the optimizer's.
    """
    stored: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        parameter, key = name.rsplit("/", 1)
        stored.setdefault(parameter, {})[key] = tensor
    if _is_zero(optimizer):
        _load_zero(model, optimizer, stored)
        return
    names = _names(model)
    state_dict = optimizer.state_dict()
    parameters = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    unknown = stored.keys() - set(parameters)
    if unknown:
        raise CheckpointError(f"{file} holds optimizer state of unknown parameters: {', '.join(sorted(unknown)[:5])}.")
    state_dict["state"] = {index: stored[name] for index, name in enumerate(parameters) if name in stored}
    optimizer.load_state_dict(state_dict)


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _is_zero(optimizer: Any) -> bool:
    return hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp16_groups")


def _zero_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # only where it is in use

    steps = [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"{name}/fp32"] = safe_get_full_fp32_param(parameter)
            tensors[f"{name}/step"] = torch.as_tensor(steps[0], dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
    return tensors


def _load_zero(model: nn.Module, optimizer: Any, stored: dict[str, dict[str, Tensor]]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = stored[name]
            # A checkpoint written without ZeRO has no copy in float32: its weights are the master weights.
            safe_set_full_fp32_param(parameter, state.get("fp32", parameter.detach().float()))
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, state[key], key)
    step = next(iter(stored.values()))["step"]
    for state in optimizer.optimizer.state.values():
        current = state.get("step")
        state["step"] = step.to(current.device) if isinstance(current, Tensor) else int(step)
