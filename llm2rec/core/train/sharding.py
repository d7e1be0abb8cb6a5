"""Sharding: frozen weights by FSDP2 or ZeRO-3, and the optimizer state that ZeRO shards among processes.

**Frozen weights.** A launch shards the frozen language model with ``distributed_type: FSDP`` (PyTorch's FSDP2,
`fully_shard`) or with DeepSpeed's ``zero_stage: 3``. A sharded block is gathered for each pass, so all processes run
every pass together (`Engine`'s ``lockstep``). What is trained is small and stays whole on every process, so that
checkpoints and exports are those of any other launch. Accelerate and DeepSpeed would shard the whole model, trained
weights too, and wrap it before the first pass, while gate inputs and titles are computed before training begins. They
therefore see a launch of plain data parallelism (`launch_hidden`), and the frozen model is sharded while it loads.

**Optimizer state.** ZeRO-1/2 shard it; checkpoints store whole tensors, the same files as any other launch.
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

_SMALL = 10_000  # numbers in a tensor
_AVERAGES = ("exp_avg", "exp_avg_sq")  # of AdamW


def shards_frozen_weights() -> bool:
    """Whether this launch shards frozen weights among its processes.

    Raises:
        ConfigError: If it asks for an unsupported kind of FSDP.
    """
    if uses_fsdp():
        for name, variable, refused in (
            ("fsdp_version", "FSDP_VERSION", "1"),
            ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "true"),
        ):
            if os.environ.get(variable, "").lower() == refused:
                raise ConfigError(
                    f"the launch configuration sets {name}={refused}, which is not supported; use "
                    "accelerate_configs/multi_gpu_fsdp2.yaml as it is, or, to keep weights on the host, "
                    "accelerate_configs/multi_gpu_zero3.yaml with offload_param_device=cpu."
                )
    return n_processes() > 1 and (uses_fsdp() or uses_zero3())


def zero3_config(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for weights that are sharded and never trained."""
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but not read
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": 3, "offload_param": {"device": offload, "pin_memory": offload == "cpu"}},
    }


def gather_with_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """Let DeepSpeed gather each layer of a model that it has sharded for its passes, forward and backward."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    # Its hooks keep it alive. What is small, norms and biases, stays whole once it has been gathered.
    DeepSpeedZeRoOffload(model, timers=NoopTimer(), ds_config=config, param_persistence_threshold=_SMALL)


def shard(model: nn.Module, root: nn.Module, block_classes: Collection[str], device: torch.device) -> None:
    """Shard the blocks of a frozen model among all processes, in place; a collective.

    Weights and buffers are those of the first process. The others may hold them on the meta device: a host then needs
    memory for one copy, a device for its part of the blocks, one gathered block, and the rest.

    Args:
        model: The model.
        root: The part of it that every forward pass goes through.
        block_classes: Names of the classes of its blocks.
        device: This process's device.

    Raises:
        ConfigError: If there are no such blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = [module for module in root.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} does not name its blocks (`_no_split_modules`), so that it cannot be "
            "sharded among GPUs; use accelerate_configs/multi_gpu_ddp.yaml."
        )
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in blocks:
        _receive(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = {parameter for parameter in root.parameters() if id(parameter) not in inside}
    # Without weights of its own it only lets the blocks share their streams and prefetch one ahead.
    fully_shard(root, mesh=mesh, reshard_after_forward=False, ignored_params=rest)
    _receive(model, device, left_out=blocks)


def _receive(module: nn.Module, device: torch.device, left_out: Collection[nn.Module] = ()) -> None:
    """Move a module to the device, its tensors as they are on the first process; a collective."""
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
    """Exclude frozen weights from what data parallelism compares and copies among processes."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def full_numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, of which this process may hold a shard."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed leaves an empty tensor in its place


def complete_deepspeed_config(
    config: dict[str, Any], model: nn.Module, training: TrainingSettings, n_micro_batches: int
) -> None:
    """Complete DeepSpeed's configuration with what it would read from a data loader, which it does not get.

    Args:
        config: The launch's, changed in place.
        model: What is to be trained.
        training: Sizes and clipping.
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
        check_host_memory(16 * n_trained, "the optimizer", "take accelerate_configs/multi_gpu_zero2.yaml")
        # On the host too torch's AdamW steps, with the same numbers: DeepSpeed's own is compiled first.
        config["zero_force_ds_cpu_optimizer"] = False


def is_zero(optimizer: Any) -> bool:
    """Whether this is an optimizer of DeepSpeed that shards its state."""
    return hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp16_groups")


class FrozenGroupStates:
    """The optimizer state of parameter groups that are frozen in a step, restored after it.

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

    def restore(self) -> None:
        """Undo what the step has done to them."""
        for state, kept in zip(self._states, self._kept, strict=True):
            for key, value in kept.items():
                state[key].copy_(value)


def _link_states(optimizer: Any) -> None:
    """Link every parameter with its shard of the optimizer state, which a fresh optimizer gets here.

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
    """This process's shard of the state of each parameter's group, by the parameter's id."""
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
