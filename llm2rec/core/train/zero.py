"""The optimizer state that DeepSpeed ZeRO divides among processes, read and written as whole tensors."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from llm2rec.core.host_memory import check_host_memory
from llm2rec.core.train.settings import TrainingSettings

__all__ = ["FrozenGroupStates", "configure", "is_zero", "load_zero", "zero_tensors"]

_AVERAGES = ("exp_avg", "exp_avg_sq")  # of AdamW


def configure(config: dict[str, Any], model: nn.Module, training: TrainingSettings, n_micro_batches: int) -> None:
    """Complete DeepSpeed's configuration by what it would read off a data loader, which we do not give it.

    Args:
        config: The launch's, changed in place.
        model: What is to be trained.
        training: Sizes and clipping.
        n_micro_batches: Micro-batches per process and optimizer step.

    Raises:
        ConfigError: If the optimizer is to go to a host that has no room for it.
    """
    config["train_micro_batch_size_per_gpu"] = training.micro_batch_size
    config["gradient_accumulation_steps"] = n_micro_batches
    config["gradient_clipping"] = training.max_grad_norm
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu":
        n_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        # Weights, gradients and two averages in float32.
        check_host_memory(16 * n_trained, "the optimizer", "take accelerate_configs/multi_gpu_zero2.yaml")
        # On the host too torch's AdamW steps, with the same numbers: DeepSpeed's own is compiled first.
        config["zero_force_ds_cpu_optimizer"] = False


def is_zero(optimizer: Any) -> bool:
    """Whether this is an optimizer of DeepSpeed that divides its state."""
    return hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp16_groups")


class FrozenGroupStates:
    """The state of parameter groups that a step is to leave alone, put back after it.

    DeepSpeed steps all groups at once, with gradients of zero where there are none, which would move AdamW's averages
    and its count of steps.

    Args:
        optimizer: DeepSpeed's, before the step.
        names: Names of the groups.
    """

    def __init__(self, optimizer: Any, names: Collection[str]) -> None:
        groups = [group for group in optimizer.optimizer.param_groups if group.get("name") in names]
        if groups:
            _link_states(optimizer)
        self._states = [optimizer.optimizer.state[parameter] for group in groups for parameter in group["params"]]
        self._kept = [{key: value.clone() for key, value in state.items()} for state in self._states]

    def put_back(self) -> None:
        """Undo what the step has done to them."""
        for state, kept in zip(self._states, self._kept, strict=True):
            for key, value in kept.items():
                state[key].copy_(value)


def _link_states(optimizer: Any) -> None:
    """Let every parameter find its part of the optimizer's state, which a fresh optimizer gets here.

    DeepSpeed 0.19 does so once, in the first step, right after that of the first parameter group: a fresh optimizer has
    nothing to restore into, and the other groups have no state yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = optimizer.optimizer.state[partition]
        if not state:  # what AdamW makes in its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        lazy_init_hp_params_optimizer_state(group, partition, optimizer.optimizer.state)


def _states(optimizer: Any) -> dict[int, dict[str, Tensor]]:
    """This process's part of the state of each parameter's group, by the parameter's id."""
    _link_states(optimizer)
    return {
        id(parameter): optimizer.optimizer.state[partition]
        for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        for parameter in group
    }


def zero_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What `llm2rec.core.train.checkpoint.optimizer_tensors` returns for DeepSpeed's optimizers; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # only where it is in use

    states, tensors = _states(optimizer), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"{name}/fp32"] = safe_get_full_fp32_param(parameter)
            tensors[f"{name}/step"] = states[id(parameter)]["step"]
            for key in _AVERAGES:
                tensors[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
    return tensors


def load_zero(model: nn.Module, optimizer: Any, stored: dict[str, dict[str, Tensor]]) -> None:
    """Restore tensors by parameter and state, whoever has written them."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    states = _states(optimizer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Written without ZeRO, what has never been stepped has no state: that of a fresh optimizer.
            state = stored.get(name, {})
            # Nor is there a copy in float32: the weights are the master weights.
            safe_set_full_fp32_param(parameter, state.get("fp32", parameter.detach().float()))
            for key in _AVERAGES:
                safe_set_full_optimizer_state(parameter, state.get(key, torch.zeros_like(parameter).float()), key)
            states[id(parameter)]["step"].fill_(state.get("step", 0))  # parameters of a group share a counter
