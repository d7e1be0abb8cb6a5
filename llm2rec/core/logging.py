"""Progress (a bar on a terminal, a line every half minute in a file), and which messages of libraries are shown."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Self, TextIO, TypeVar

from tqdm import tqdm

from llm2rec.core.processes import is_first_process, uses_gpu

__all__ = ["Progress", "duration", "progress", "progress_shown", "quiet_libraries"]

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BEFORE_BAR = 1.0  # shorter phases draw nothing
_MIB = 2**20


class Progress:
    """Shows how many items of a phase are done, the speed and the time left; a context. Only on the first process.

    Args:
        description: Name of the phase.
        total: Number of items, including ``initial``.
        unit: Name of one item, such as ``step``; ``byte`` is shown in MiB.
        initial: Items done in an earlier run.
        at_most: Whether there may be fewer items than ``total``, as in a training that may stop early.
        shown: Whether to show anything.
    """

    enabled: ClassVar = True  # `progress_shown` changes it

    def __init__(
        self, description: str, total: int, unit: str, *, initial: int = 0, at_most: bool = False, shown: bool = True
    ) -> None:
        self._description, self._total, self._initial = description, total, initial
        self._unit, self._size = ("MiB", _MIB) if unit == "byte" else (unit, 1)
        shown = shown and self.enabled and is_first_process()
        self._on_terminal = shown and sys.stderr.isatty()
        self._in_file = shown and not self._on_terminal
        self._most = "at most " if at_most else ""
        self._done, self._amounts = 0, dict[str, int]()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if self._on_terminal:
            self._bar = tqdm(
                desc=self._description,
                total=self._total,
                initial=self._initial,
                unit=f" {self._unit}",
                unit_scale=False if self._size == 1 else 1 / self._size,
                delay=_SECONDS_BEFORE_BAR,
                leave=False,
                bar_format=f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}, {self._most}{{remaining}} left, "
                "{rate_fmt}{postfix}]",
            )
            self._open.enter_context(_log_above_bar())
            self._open.callback(self._bar.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def advance(self, n: int = 1, **amounts: int) -> None:
        """Count ``n`` more items as done, and other ``amounts`` whose speed is shown, such as ``tokens``."""
        self._done += n
        for name, amount in amounts.items():
            self._amounts[name] = self._amounts.get(name, 0) + amount
        now = time.monotonic()
        if self._on_terminal:
            self._bar.set_postfix_str(self._other_speeds(now), refresh=False)
            self._bar.update(n)
        elif self._in_file and self._done and now - self._last >= _SECONDS_BETWEEN_LINES:
            done, total, units = self._done / self._size, self._total / self._size, self._unit
            units += "" if self._unit == "MiB" else "s"
            self._last, at, seconds = now, self._initial / self._size + done, (now - self._start) / done
            speeds = f"{1 / seconds:.3g} {units}/s" if seconds <= 1 else f"{seconds:.3g} s/{self._unit}"
            if other := self._other_speeds(now):
                speeds += f", {other}"
            left = f"{self._most}{duration(max(0, total - at) * seconds)}"
            logger.info("%s: %.0f of %.0f %s, %s, %s left", self._description, at, total, units, speeds, left)

    def _other_speeds(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        return ", ".join(f"{amount / seconds:.3g} {name}/s" for name, amount in self._amounts.items())


def progress(
    iterable: Iterable[Item],
    description: str,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    at_most: bool = False,
    shown: bool = True,
) -> Iterator[Item]:
    """Iterate over ``iterable`` and show its `Progress`.

    Args:
        iterable: Items.
        description: Name of the phase.
        total: Number of items, including ``initial``.
        unit: Name of one item, such as ``step``.
        initial: Items done in an earlier run.
        at_most: Whether there may be fewer items than ``total``, as in a training that may stop early.
        shown: Whether to show anything.

    Yields:
        The items.
    """
    with Progress(description, total, unit, initial=initial, at_most=at_most, shown=shown) as bar:
        try:
            for item in iterable:
                yield item
                bar.advance()
        finally:
            if isinstance(iterable, Generator):  # now, not when it is collected
                iterable.close()


@contextmanager
def progress_shown(shown: bool) -> Iterator[None]:
    """Context in which no `Progress` shows anything unless ``shown``."""
    before, Progress.enabled = Progress.enabled, shown
    try:
        yield
    finally:
        Progress.enabled = before


class _AboveBar:
    """A stream that writes above the progress bar of a terminal."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._terminal, end="")

    def flush(self) -> None:
        self._terminal.flush()


@contextmanager
def _log_above_bar() -> Iterator[None]:
    """Log above the bar. tqdm's own `logging_redirect_tqdm` drops the levels of the handlers."""
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.StreamHandler)]
    on_terminal = [(each, each.stream) for each in handlers if each.stream is sys.stderr]
    for handler, stream in on_terminal:
        handler.setStream(_AboveBar(stream))
    try:
        yield
    finally:
        for handler, stream in on_terminal:
            handler.setStream(stream)


def duration(seconds: float) -> str:
    """A time in words: ``9 s``, ``12:30 min`` or ``3:05 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


def quiet_libraries() -> None:
    """Silence messages of libraries that do not help the user, and other processes than the first but for warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns about forks, once per worker
    if not uses_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
    for noisy in ("httpx", "httpx2", "httpcore", "matplotlib", "datasets", "fsspec", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A dozen lines of retries without a network; the caller then reports what was not found.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()  # we show one line per phase
    if "transformers" in sys.modules:  # a second to import, which only the teacher pays
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for each of "Loading weights" and "Writing model shards"
        enable_progress_bars()  # the line above also hides downloads, which may take an hour
    for message in (
        ".*is_gradient_checkpointing. is deprecated",  # PEFT 0.21 asks transformers 5 under the old name
        ".*torch.distributed.all_gather_into_tensor. is deprecated",  # Accelerate 1.15 and DeepSpeed 0.19 gather so
    ):
        warnings.filterwarnings("ignore", message, FutureWarning)
    if not is_first_process():
        for handler in logging.getLogger().handlers:  # warnings, errors, and tracebacks for the log file
            handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.exc_info is not None)
