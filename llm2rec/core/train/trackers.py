"""Throughput, memory and loss spikes of training, for logging."""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llm2rec.core.host_memory import resident_bytes

__all__ = ["SpikeDetector", "Throughput", "memory_in_use"]

logger = logging.getLogger(__name__)
_WINDOW = 64  # steps in the reference median
_FEWEST = 16  # steps before detection starts


class Throughput:
    """Rows and tokens per second of training steps, without the time between steps, such as evaluations."""

    def __init__(self) -> None:
        self._seconds, self._done = 0.0, dict[str, int]()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a step."""
        start = time.perf_counter()
        yield
        # On a GPU the weight update may still be running; the next step waits for it.
        self._seconds += time.perf_counter() - start

    def count(self, **amounts: int) -> None:
        """Add the amounts of a step, by name."""
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0) + amount

    def scalars(self) -> dict[str, float]:
        """Amounts per second since the last call, by name, for logging."""
        rates = {f"speed/{name}_per_second": n / self._seconds for name, n in self._done.items() if self._seconds > 0}
        self._seconds, self._done = 0.0, {}
        return rates


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, for logging: resident on the host, and the peak on a GPU."""
    resident = resident_bytes()
    used = {} if resident is None else {"memory/process_gib": resident / 2**30}
    if device.type == "cuda":
        used["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return used


class SpikeDetector:
    """Detects values far above the median of the previous steps, and warns at the first of consecutive spikes.

    The median is robust against the spikes themselves and follows a lasting change after half a window.

    Args:
        name: Name of the value, for the warning.
        ratio: A value above this multiple of the median is a spike; 0 detects none.
    """

    def __init__(self, name: str, ratio: float) -> None:
        self.name, self.ratio = name, ratio
        self._values, self._is_high = deque[float](maxlen=_WINDOW), False

    @property
    def median(self) -> float | None:
        """Median of the last steps, or None before the first."""
        return statistics.median(self._values) if self._values else None

    def add(self, value: float, step: int) -> bool:
        """Add the value of a step; returns whether it is a spike. Values that are not finite are ignored."""
        if not math.isfinite(value):
            return False
        median = self.median
        is_high = (
            self.ratio > 0 and median is not None and len(self._values) >= _FEWEST and value > self.ratio * median > 0
        )
        if is_high and not self._is_high:
            logger.warning(
                "step %d: the %s is %.4g, %.3g times the median of the last %d steps (%.4g)",
                step, self.name, value, value / (median or 1), len(self._values), median,
            )  # fmt: skip
        self._is_high = is_high
        self._values.append(value)
        return is_high

    def to_dict(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {"values": list(self._values), "is_high": self._is_high}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `to_dict`."""
        self._values, self._is_high = deque(state["values"], maxlen=_WINDOW), state["is_high"]
