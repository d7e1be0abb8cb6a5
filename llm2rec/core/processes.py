"""Joining the processes of a launch before anything else happens.

`now` differs between processes and so would every folder named after it: the first process decides, the others are
told. This needs the process group, so it is joined here, once, the same way for the run folder and for the engine.
"""

import os
from typing import Any

from llm2rec.core.errors import ConfigError

__all__ = ["agree", "is_first_process", "join_processes", "n_processes", "process_arguments", "uses_gpu"]


def n_processes() -> int:
    """Number of processes of this launch, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes, known before they have joined."""
    return int(os.environ.get("RANK", "0")) == 0


def _asked_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")


def uses_gpu() -> bool:
    """Whether this launch computes on CUDA devices."""
    import torch

    return torch.cuda.is_available() and not _asked_for_cpu()


def process_arguments() -> tuple[bool, dict[str, Any]]:
    """How Accelerate is to set up its processes here.

    Returns:
        Whether to stay on the CPU, and the keywords of the process group. Without an accelerator the backend must be
        named: left to itself, Accelerate then believes in a single process.

    Raises:
        ConfigError: If the launch asks for DeepSpeed and, by ``ACCELERATE_USE_CPU``, for Accelerate's plain CPU mode.
    """
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if use_deepspeed and _asked_for_cpu():
        raise ConfigError(
            "the launch uses DeepSpeed, and ACCELERATE_USE_CPU is set, under which Accelerate cannot start it; unset "
            "that variable (DeepSpeed finds the CPU by itself), or use a launch configuration without DeepSpeed."
        )
    if n_processes() == 1 or uses_gpu():
        return _asked_for_cpu(), {}
    return not use_deepspeed, {"backend": "gloo"}  # with cpu=True Accelerate would not look at DeepSpeed at all


def join_processes() -> None:
    """Join the process group of this launch; does nothing in a single process or when already joined."""
    if n_processes() > 1:
        from accelerate import PartialState  # takes a second to import, which a single process need not pay here

        cpu, keywords = process_arguments()
        PartialState(cpu=cpu, **keywords)


def agree(value: Any) -> Any:
    """Tell all processes the first one's ``value`` (a collective: every process must call it)."""
    if n_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join_processes()
    return broadcast_object_list([value])[0]
