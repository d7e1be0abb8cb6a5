"""Sharding of frozen weights (FSDP2 or ZeRO-3) and of optimizer state (ZeRO).

**Frozen weights.** A launch shards the frozen language model with ``distributed_type: FSDP`` (PyTorch's FSDP2,
`fully_shard`) or with DeepSpeed's ``zero_stage: 3``. A sharded block is gathered for each pass, so all processes run
every pass together (`Engine`'s ``lockstep``). Trained weights are small and stay unsharded, so checkpoints and exports
are the same as those of other launches. Accelerate and DeepSpeed would shard the whole model, including trained
weights, and wrap it before the first pass, but gate inputs and titles are computed before training. Accelerate is
therefore configured for plain data parallelism (`launch_hidden`), and the frozen model is sharded while it loads.

**Optimizer state.** ZeRO-1/2 shard it; checkpoints store unsharded tensors, the same files as other launches.
"""

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm2rec.core.errors import ConfigError
from llm2rec.core.host_memory import check_host_memory
from llm2rec.core.processes import n_processes, uses_fsdp, uses_zero3
from llm2rec.core.train.settings import TrainingSettings

__all__ = [
    "FrozenGroupStates",
    "complete_deepspeed_config",
    "exclude_frozen_from_ddp",
    "full_numel",
    "gather_with_deepspeed",
    "is_zero",
    "load_zero",
    "shard",
    "shards_frozen_weights",
    "zero3_config",
    "zero_tensors",
]

_SMALL = 10_000  # elements of tensors that ZeRO-3 keeps gathered
_AVERAGES = ("exp_avg", "exp_avg_sq")  # AdamW state


def shards_frozen_weights() -> bool:
    """Whether this launch shards frozen weights among its processes.

    Raises:
        ConfigError: If the launch uses an unsupported FSDP option.
    """
    if uses_fsdp():
        for name, variable, refused in (
            ("fsdp_version", "FSDP_VERSION", "1"),
            ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "true"),
        ):
            if os.environ.get(variable, "").lower() == refused:
                raise ConfigError(
                    f"the launch configuration sets {name}={refused}, which is not supported; use "
                    "accelerate_configs/multi_gpu_fsdp2.yaml unchanged, or, to offload weights to the host, "
                    "accelerate_configs/multi_gpu_zero3.yaml with offload_param_device=cpu."
                )
    return n_processes() > 1 and (uses_fsdp() or uses_zero3())


def zero3_config(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed configuration for frozen sharded weights."""
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but not read
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": 3, "offload_param": {"device": offload, "pin_memory": offload == "cpu"}},
    }


def gather_with_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """Register DeepSpeed's hooks that gather each sharded layer for forward and backward passes."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    # The hooks keep the object alive. Small tensors (norms, biases) stay gathered after their first use.
    DeepSpeedZeRoOffload(model, timers=NoopTimer(), ds_config=config, param_persistence_threshold=_SMALL)


def shard(model: nn.Module, root: nn.Module, block_classes: Collection[str], device: torch.device) -> None:
    """Shard the blocks of a frozen model among all processes, in place; a collective.

    Weights and buffers are broadcast from the first process; the other processes may have them on the meta device. A
    host then needs memory for one copy, and a device for its shard of the blocks, one gathered block, and the rest.

    Args:
        model: The model.
        root: Submodule that every forward pass uses.
        block_classes: Class names of its blocks.
        device: This process's device.

    Raises:
        ConfigError: If the model has no such blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [module for module in root.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} does not name its blocks (`_no_split_modules`), so it cannot be sharded; use "
            "accelerate_configs/multi_gpu_ddp.yaml."
        )
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in blocks:
        _receive(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = {parameter for parameter in root.parameters() if id(parameter) not in inside}
    # The root has no sharded weights; it lets the blocks share streams and prefetch the next block.
    fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=rest)
    _receive(model, device, left_out=blocks)


def _receive(module: nn.Module, device: torch.device, left_out: Collection[nn.Module] = ()) -> None:
    """Move a module to the device with the tensors of the first process; a collective."""
    done = {id(inner) for block in left_out for inner in block.modules()}
    for inner in module.modules():
        if id(inner) in done:
            continue
        stores: tuple[dict[str, Any], ...] = (inner._parameters, inner._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = _received(tensor, device)


def _received(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    here = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
    torch.distributed.broadcast(here, 0)
    return nn.Parameter(here, requires_grad=False) if isinstance(tensor, nn.Parameter) else here


def exclude_frozen_from_ddp(model: nn.Module) -> None:
    """Exclude frozen weights from DDP's checks and broadcasts."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def full_numel(parameter: nn.Parameter) -> int:
    """Number of elements of the unsharded parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed replaces it by an empty tensor


def complete_deepspeed_config(
    config: dict[str, Any], model: nn.Module, training: TrainingSettings, n_micro_batches: int
) -> None:
    """Complete DeepSpeed's configuration with values that it would otherwise read from a data loader.

    Args:
        config: Configuration of the launch, changed in place.
        model: The model to train.
        training: Batch sizes and clipping.
        n_micro_batches: Micro-batches per process and optimizer step.

    Raises:
        ConfigError: If the optimizer is offloaded to a host without enough memory.
    """
    config["train_micro_batch_size_per_gpu"] = training.micro_batch_size
    config["gradient_accumulation_steps"] = n_micro_batches
    config["gradient_clipping"] = training.max_grad_norm
    if config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu":
        n_trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        # Weights, gradients and two averages in float32.
        check_host_memory(16 * n_trained, "the optimizer", "use accelerate_configs/multi_gpu_zero2.yaml")
        # Use torch's AdamW on the host, with the same numbers; DeepSpeed's CPU Adam must be compiled first.
        config["zero_force_ds_cpu_optimizer"] = False


def is_zero(optimizer: Any) -> bool:
    """Whether this is a ZeRO optimizer of DeepSpeed, which shards its state."""
    return hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp16_groups")


class FrozenGroupStates:
    """Saves the optimizer state of parameter groups that are frozen in a step, and restores it afterwards.

    DeepSpeed updates all groups, with zero gradients where there are none, which would change AdamW's averages and step
    counts.

    Args:
        optimizer: DeepSpeed's optimizer, before the step.
        names: Names of the groups.
    """

    def __init__(self, optimizer: Any, names: Collection[str]) -> None:
        groups = [group for group in optimizer.optimizer.param_groups if group.get("name") in names]
        if groups:
            _link_states(optimizer)
        self._states = [optimizer.optimizer.state[parameter] for group in groups for parameter in group["params"]]
        self._saved = [{key: value.clone() for key, value in state.items()} for state in self._states]

    def restore(self) -> None:
        """Restore the saved state."""
        for state, saved in zip(self._states, self._saved, strict=True):
            for key, value in saved.items():
                state[key].copy_(value)


def _link_states(optimizer: Any) -> None:
    """Link every parameter with its shard of the optimizer state; initialises the state of a new optimizer.

    DeepSpeed 0.19 links them once, in the first step, after updating the first parameter group: before that, a new
    optimizer has no state to restore into, and at that point the other groups have none.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        state = optimizer.optimizer.state[partition]
        if not state:  # as AdamW initialises it in its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(partition), torch.zeros_like(partition)
        lazy_init_hp_params_optimizer_state(group, partition, optimizer.optimizer.state)


def _states(optimizer: Any) -> dict[int, dict[str, Tensor]]:
    """This process's shard of the state of each parameter's group, by the parameter's id."""
    _link_states(optimizer)
    return {
        id(parameter): optimizer.optimizer.state[partition]
        for group, partition in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        for parameter in group
    }


def zero_tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """`llm2rec.core.train.checkpoint.optimizer_tensors` for DeepSpeed optimizers; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # optional dependency

    states, tensors = _states(optimizer), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"{name}/fp32"] = safe_get_full_fp32_param(parameter)
            tensors[f"{name}/step"] = states[id(parameter)]["step"]
            for key in _AVERAGES:
                tensors[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key)
    return tensors


def load_zero(model: nn.Module, optimizer: Any, stored: dict[str, dict[str, Tensor]]) -> None:
    """Restore optimizer tensors by parameter and state, written with or without ZeRO."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    states = _states(optimizer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Without ZeRO, parameters that were never updated have no state, so use that of a new optimizer.
            state = stored.get(name, {})
            # Without ZeRO there is no float32 copy either; the weights are the master weights.
            safe_set_full_fp32_param(parameter, state.get("fp32", parameter.detach().float()))
            for key in _AVERAGES:
                safe_set_full_optimizer_state(parameter, state.get(key, torch.zeros_like(parameter).float()), key)
            states[id(parameter)]["step"].fill_(state.get("step", 0))  # parameters of a group share a counter
