"""Joining the processes of a launch before anything else happens.

`now` differs between processes and so would every folder named after it: the first process decides, the others are
told. This needs the process group, so it is joined here, once, the same way for the run folder and for the engine.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any

from llm2rec.core.errors import ConfigError

__all__ = [
    "Termination",
    "agree",
    "is_first_process",
    "join_processes",
    "launch_hidden",
    "n_processes",
    "process_arguments",
    "uses_deepspeed",
    "uses_fsdp",
    "uses_gpu",
    "uses_zero3",
]

_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"


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


def uses_deepspeed() -> bool:
    """Whether this launch asks for DeepSpeed."""
    return os.environ.get(_DEEPSPEED, "false").lower() == "true"


def uses_zero3() -> bool:
    """Whether this launch asks for DeepSpeed's ZeRO-3; see `llm2rec.core.train.sharding`."""
    return uses_deepspeed() and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"


def uses_fsdp() -> bool:
    """Whether this launch asks for FSDP; see `llm2rec.core.train.sharding`."""
    return os.environ.get(_FSDP, "false").lower() == "true"


@contextmanager
def launch_hidden() -> Iterator[None]:
    """Let Accelerate see plain data parallelism where frozen weights are divided by us."""
    hidden = [_FSDP, *([_DEEPSPEED] if uses_zero3() else [])]
    asked = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def process_arguments() -> tuple[bool, dict[str, Any]]:
    """How Accelerate is to set up its processes here.

    Returns:
        Whether to stay on the CPU, and the keywords of the process group. Without an accelerator the backend must be
        named: left to itself, Accelerate then believes in a single process.

    Raises:
        ConfigError: If the launch asks for DeepSpeed, which is not installed, or, by ``ACCELERATE_USE_CPU``, for
            Accelerate's plain CPU mode as well.
    """
    use_deepspeed = uses_deepspeed()
    if use_deepspeed and find_spec("deepspeed") is None:
        raise ConfigError(
            "the launch uses DeepSpeed, which is not installed; install it (`pip install deepspeed`, or this project's "
            "extra `deepspeed`), or launch with accelerate_configs/multi_gpu_ddp.yaml."
        )
    if use_deepspeed and _asked_for_cpu():
        raise ConfigError(
            "the launch uses DeepSpeed, and ACCELERATE_USE_CPU is set, under which Accelerate cannot start it; unset "
            "that variable (DeepSpeed finds the CPU by itself), or use a launch configuration without DeepSpeed."
        )
    if n_processes() == 1 or uses_gpu():
        return _asked_for_cpu(), {}
    return not use_deepspeed or uses_zero3(), {
        "backend": "gloo"
    }  # with cpu=True Accelerate would not look at DeepSpeed at all


def join_processes() -> None:
    """Join the process group of this launch; does nothing in a single process or when already joined."""
    if n_processes() > 1:
        from accelerate import PartialState  # takes a second to import, which a single process need not pay here

        cpu, keywords = process_arguments()
        with launch_hidden():
            PartialState(cpu=cpu, **keywords)


def agree(value: Any) -> Any:
    """Tell all processes the first one's ``value`` (a collective: every process must call it)."""
    if n_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join_processes()
    return broadcast_object_list([value])[0]


class Termination:
    """Notes SIGTERM instead of dying of it, while it is `awaited`.

    Attributes:
        is_asked: Whether the signal has come.
    """

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Note the signal while this context is open; outside it, SIGTERM ends the process as ever.

        Only the main thread may listen to signals; in any other nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
