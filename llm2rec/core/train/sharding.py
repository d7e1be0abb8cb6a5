"""Frozen weights divided among processes, for models that do not fit one device.

A launch asks for it by ``distributed_type: FSDP`` (PyTorch's FSDP2, `fully_shard`) or by DeepSpeed's ``zero_stage: 3``.
A divided block is put together for each pass, so that all processes have to make every pass together (`Engine`'s
``lockstep``). What is trained is small and stays whole on every process, so that checkpoints and exports are those of
any other launch.

Accelerate and DeepSpeed would divide the whole model, trained weights too, and want it wrapped before anything is read
with it, while gate inputs and titles are read before training begins. So they are told of a launch of plain data
parallelism (`launch_hidden`), which trains, and only the frozen language model is divided, while it loads.
"""

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm2rec.core.errors import ConfigError
from llm2rec.core.processes import n_processes, uses_fsdp, uses_zero3

__all__ = ["divide", "divides_frozen", "full_size", "keep_out_of_exchange", "put_together_by_deepspeed", "zero3_config"]

_SMALL = 10_000  # numbers in a tensor


def divides_frozen() -> bool:
    """Whether this launch divides frozen weights among its processes.

    Raises:
        ConfigError: If it asks for what is not done here.
    """
    if uses_fsdp():
        for name, variable, refused in (
            ("fsdp_version", "FSDP_VERSION", "1"),
            ("fsdp_offload_params", "FSDP_OFFLOAD_PARAMS", "true"),
        ):
            if os.environ.get(variable, "").lower() == refused:
                raise ConfigError(
                    f"the launch configuration says {name}={refused}, which is not done here; take "
                    "accelerate_configs/multi_gpu_fsdp2.yaml as it is, or, to keep weights on the host, "
                    "accelerate_configs/multi_gpu_zero3.yaml with offload_param_device=cpu."
                )
    return n_processes() > 1 and (uses_fsdp() or uses_zero3())


def zero3_config(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration for weights that are divided and never trained."""
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    return {
        "train_micro_batch_size_per_gpu": 1,  # must be there, and is not read
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"stage": 3, "offload_param": {"device": offload, "pin_memory": offload == "cpu"}},
    }


def put_together_by_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """Let each layer of a model that DeepSpeed has divided be put together for its passes, forward and backward."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    # Its hooks keep it alive. What is small, norms and biases, stays whole once it has been put together.
    DeepSpeedZeRoOffload(model, timers=NoopTimer(), ds_config=config, param_persistence_threshold=_SMALL)


def divide(model: nn.Module, root: nn.Module, block_classes: Collection[str], device: torch.device) -> None:
    """Divide the blocks of a frozen model among all processes, in place; a collective.

    Weights and buffers are those of the first process. The others may hold them on the meta device: a host then needs
    memory for one copy, a device for its part of the blocks, one block that is put together, and the rest.

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
            f"{type(model).__name__} does not say which of its parts are blocks (`_no_split_modules`), so that it "
            "cannot be divided among GPUs; use accelerate_configs/multi_gpu_ddp.yaml."
        )
    mesh = init_device_mesh(device.type, (n_processes(),))
    for block in blocks:
        _receive(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = {parameter for parameter in root.parameters() if id(parameter) not in inside}
    # Without weights of its own it only lets the blocks share their streams, and fetch one ahead.
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


def keep_out_of_exchange(model: nn.Module) -> None:
    """Keep frozen weights out of what data parallelism compares and copies among processes."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def full_size(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, of which this process may hold a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # DeepSpeed leaves an empty tensor in its place
