"""What a run shows in TensorBoard: numbers and texts, and besides losses and metrics how fast and how large it is."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm2rec.core.files import storage_errors
from llm2rec.core.host_memory import resident_bytes

__all__ = ["TensorBoardWriter", "Throughput", "memory_in_use"]


class TensorBoardWriter:
    """Writes TensorBoard events into a folder; None writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, which only writers pay

            self._writer, self._folder = SummaryWriter(str(folder)), folder

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        if self._writer is not None:
            with storage_errors(self._folder):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def text(self, name: str, markdown: str, step: int) -> None:
        """Write a text, which TensorBoard renders as Markdown."""
        if self._writer is not None:
            with storage_errors(self._folder):
                self._writer.add_text(name, markdown, step)
                self._writer.flush()

    def close(self) -> None:
        """Flush what there is and close the file."""
        if self._writer is not None:
            self._writer.close()


class Throughput:
    """How much training gets done in a second; what lies between steps, such as an evaluation, does not count."""

    def __init__(self) -> None:
        self._seconds, self._done = 0.0, dict[str, int]()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a step."""
        began = time.perf_counter()
        yield
        # A GPU may still be at the weights' update, which the next step waits for.
        self._seconds += time.perf_counter() - began

    def count(self, **amounts: int) -> None:
        """Note what a step gets done, by name."""
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0) + amount

    def scalars(self) -> dict[str, float]:
        """Amounts a second since the last call, by name, for TensorBoard."""
        rates = {f"speed/{name}_per_second": n / self._seconds for name, n in self._done.items() if self._seconds > 0}
        self._seconds, self._done = 0.0, {}
        return rates


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, for TensorBoard: what it holds of the host's, and of a GPU's the most so far."""
    resident = resident_bytes()
    held = {} if resident is None else {"memory/process_gib": resident / 2**30}
    if device.type == "cuda":
        held["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return held
