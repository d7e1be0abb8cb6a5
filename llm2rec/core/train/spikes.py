"""Tell when a number of training jumps far above what it was."""

import logging
import math
import statistics
from collections import deque
from typing import Any

__all__ = ["SpikeDetector"]

logger = logging.getLogger(__name__)
_WINDOW = 64  # steps whose median is the measure
_FEWEST = 16  # steps before which nothing is called a spike


class SpikeDetector:
    """Compares each step's value with the median of the steps before; a warning begins each row of high values.

    A median takes no notice of the spikes themselves, so that the first does not hide the second, and follows a lasting
    change after half a window.

    Args:
        name: What is watched, for the warning.
        ratio: A value above this multiple of the median is a spike; 0 watches without ever telling.
    """

    def __init__(self, name: str, ratio: float) -> None:
        self.name, self.ratio = name, ratio
        self._values, self._is_high = deque[float](maxlen=_WINDOW), False

    @property
    def median(self) -> float | None:
        """Median of the last steps, or None before the first."""
        return statistics.median(self._values) if self._values else None

    def see(self, value: float, step: int) -> bool:
        """Note the value of a step; returns whether it is a spike. Values that are not finite are not noted."""
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

    def state(self) -> dict[str, Any]:
        """What to store in a checkpoint."""
        return {"values": list(self._values), "is_high": self._is_high}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._values, self._is_high = deque(state["values"], maxlen=_WINDOW), state["is_high"]
