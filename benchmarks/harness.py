"""Shared by the benchmarks: interleaved timing, exact memory counts, and one format of JSON file.

Other processes disturb a timing more than most differences worth measuring. Variants therefore take turns, round after
round; a ratio is taken within each round, and the median of the ratios is reported.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once: else the profiler prints a line at each start and stop

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llm2rec.core.files import write_json
from llm2rec.core.git_info import git_state, library_versions

__all__ = [
    "command_line",
    "existing",
    "floor_rates",
    "matmul",
    "peak_bytes",
    "relative",
    "saved_bytes",
    "seconds_by_round",
    "spread",
    "write_result",
]

Step = Callable[[], object]


def command_line(description: str, rounds: int) -> argparse.ArgumentParser:
    """Parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: under a minute")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each variant is timed")
    parser.add_argument("--threads", type=int, help="processor threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    return parser


def existing(path: str) -> Path:
    """Type of arguments that name an input: refuse what does not exist before anything is measured."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return Path(path)


def seconds_by_round(steps: Mapping[str, Step], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time each step once a round; who goes first changes from round to round."""
    for step in [*steps.values()] * warm_up:
        step()
    names, seconds = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(over: Iterable[float], under: Iterable[float]) -> dict[str, float]:
    """Median and quartiles of the ratios taken round by round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes that a step holds at once, beyond what was allocated before it.

    On a GPU this is torch's own counter. On a CPU the profiler reports each block that torch's allocator hands out or
    takes back, and the largest running sum is exact; scratch space inside BLAS is not torch's and is not seen. A step
    must free what it allocates (gradients too): the profiler forgets blocks that are older than itself.
    """
    if device.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Tensor], constants: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once.

    Args:
        forward: Runs it. The result is kept until all has been counted.
        constants: Tensors that are there anyway: weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()  # the graph keeps it alive, so no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(saved.values())


def matmul(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Step, float]:
    """Make a product of two square matrices, and say how many floating-point operations it is.

    Timed among the other steps, it shows the rate that the machine reaches at that moment.
    """
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return lambda: left @ right, 2.0 * size**3


def floor_rates(width: int, side: int = 2048) -> tuple[float, float, float]:
    """Seconds of a multiplication or an addition, of an exponential, and of a byte read or written, here and now.

    Products are of the form of scores, ``(side, width)`` with ``(width, side)``; all are the fastest of five.
    """
    users, items = torch.randn(2, side, width)
    tile = users @ items.T
    there, back = torch.randn(2, 2**24)
    steps: dict[str, Step] = {
        "product": lambda: torch.mm(users, items.T, out=tile),
        "exponential": lambda: torch.exp2(tile),
        "copy": lambda: back.copy_(there),
    }
    product, exponential, copy = (min(times) for times in seconds_by_round(steps, 5).values())
    return product / (2 * side * side * width), exponential / tile.numel(), copy / (2 * there.nbytes)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_result(
    options: argparse.Namespace, headline: dict[str, Any], samples: Any, *, show: bool = True, **further: Any
) -> None:
    """Write the JSON file, ``further`` entries last, and print the headline if ``show`` is set."""
    on_gpu = str(getattr(options, "device", "cpu")).startswith("cuda")
    environment = {
        **library_versions(),
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    command = " ".join(["python", *map(relative, sys.argv)])
    result = {"headline": headline, "samples": samples, "command": command, "commit": git_state()}
    write_json(options.json, {**result, "environment": environment, **further}, indent=1)  # some are long
    if show:
        print(json.dumps(headline, indent=2))


def relative(argument: str) -> str:
    """Give an argument without this machine's folders."""
    path = Path(argument)
    return path.name if path.is_absolute() else argument
