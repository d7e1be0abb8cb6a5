"""How long a job takes: operations over the rate of a card, bytes over its bandwidth."""

import os
import time
from dataclasses import dataclass

import torch

from llm2rec.plan.cards import Card
from llm2rec.plan.measure import Cost

__all__ = ["Throughput", "processor"]

LAUNCH_SECONDS = 1e-5
"""What an operation costs the processor that starts it; Python, torch and a kernel's launch, of the order measured on
many machines. It bounds small models alone."""

UPDATE_BYTES = 28
"""Bytes that AdamW reads and writes for each parameter in float32: weight, gradient and two averages; all but one."""


@dataclass(frozen=True)
class Throughput:
    """How fast a card works off a cost: by operations, by bytes, or by launches, whichever takes longest.

    Attributes:
        flops_per_second: Rate that is reached.
        bandwidth: Bytes a second.
    """

    flops_per_second: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """Seconds of a cost."""
        return max(
            cost.flops / self.flops_per_second, cost.traffic_bytes / self.bandwidth, LAUNCH_SECONDS * cost.n_operations
        )

    def update_seconds(self, trained: int) -> float:
        """Seconds of one optimizer step over so many parameters."""
        return UPDATE_BYTES * trained / self.bandwidth


def processor() -> Card:
    """This machine's processor: its rate and bandwidth as they are at this moment, measured in a second."""
    left, right = torch.randn(2, 1024, 1024)
    block = torch.zeros(2**24)
    product, copy = min(_seconds(left.matmul, right) for _ in range(8)), min(_seconds(block.clone) for _ in range(8))
    rate = 2.0 * 1024**3 / product / 1e12
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bandwidth = 2 * block.nbytes / copy
    return Card("this machine's processor", memory, rate, rate, bandwidth, "measured now, on this machine")


def _seconds(function: object, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - start
