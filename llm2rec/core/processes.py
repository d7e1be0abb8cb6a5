"""The processes of a launch: who they are, what they agree on, and how they end.

`now` differs between processes, so the first one chooses the run folder and broadcasts it. This needs the process
group, which is therefore joined here, once, in the same way for the run folder and for the engine.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from types import FrameType
from typing import Any

from llm2rec.core.errors import ConfigError

__all__ = [
    "Termination",
    "agree",
    "is_first_process",
    "is_first_to_report",
    "join_processes",
    "launch_hidden",
    "n_processes",
    "process_arguments",
    "sigterm_raises",
    "uses_deepspeed",
    "uses_fsdp",
    "uses_gpu",
    "uses_zero3",
]

_SECONDS_OF_ONE_INTERRUPT = 1.0
_DEEPSPEED, _FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"


def n_processes() -> int:
    """Number of processes of this launch, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process that writes; known before they have joined."""
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
    """Hide ZeRO-3 and FSDP from Accelerate, which then sees plain data parallelism: we shard frozen weights."""
    hidden = [_FSDP, *([_DEEPSPEED] if uses_zero3() else [])]
    asked = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def process_arguments() -> tuple[bool, dict[str, Any]]:
    """Arguments for Accelerate's process group.

    Returns:
        Whether to stay on the CPU, and the keywords of the process group. Without a GPU the backend must be named, or
        Accelerate assumes a single process.

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
            "that variable (DeepSpeed finds the CPU without it), or use a launch configuration without DeepSpeed."
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
    """Broadcast the first process's ``value`` to all (a collective: every process must call it)."""
    if n_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join_processes()
    return broadcast_object_list([value])[0]


def is_first_to_report(message: str) -> bool:
    """Whether no other process of this launch has reported ``message`` yet.

    Counted in the key-value store of the launcher, which needs neither a process group nor the other processes.
    """
    if n_processes() == 1:
        return True
    from torch.distributed import TCPStore

    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "29500"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"llm2rec/{attempt}/{message}", 1) == 1
    except RuntimeError:  # the process that kept the store has ended; better twice than never
        return True


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does, so that a run can record how it ended.

    Only in a single process: one of several may be waiting inside a collective, where no exception reaches it.
    """
    if n_processes() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Termination:
    """Records SIGTERM, by which clusters and spot machines announce the end of a process, and Ctrl-C.

    Attributes:
        received: The signals that were received while they were `awaited`.
    """

    def __init__(self) -> None:
        self.received = set[int]()
        self._first_interrupt = 0.0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Record signals while this context is open; a second Ctrl-C raises `KeyboardInterrupt` all the same.

        Only the main thread can handle signals; in any other thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # Launchers of several processes send on what the terminal has sent already.
            if number in self.received and time.monotonic() - self._first_interrupt > _SECONDS_OF_ONE_INTERRUPT:
                raise KeyboardInterrupt
            self._first_interrupt = self._first_interrupt or time.monotonic()
        self.received.add(number)
