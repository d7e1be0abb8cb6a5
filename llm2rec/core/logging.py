"""Progress (a bar on a terminal, a line every half minute in a file), and which messages of libraries are shown."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm import tqdm

from llm2rec.core.processes import is_first_process, uses_gpu

__all__ = ["duration", "progress", "quiet_libraries"]

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 30.0


def progress(
    iterable: Iterable[Item], description: str, total: int, unit: str, *, initial: int = 0, shown: bool = True
) -> Iterator[Item]:
    """Iterate over ``iterable`` and show items done, speed and time left.

    Args:
        iterable: Items.
        description: Name of the phase.
        total: Number of items, including ``initial``.
        unit: Name of one item, such as ``step``.
        initial: Items done in an earlier run.
        shown: Whether to show anything.

    Yields:
        The items.
    """
    if not shown:
        yield from iterable
    elif sys.stderr.isatty():
        bar = tqdm(iterable, desc=description, total=total, initial=initial, unit=f" {unit}", leave=False)
        with _log_above_bar():
            yield from bar
    else:
        yield from _logged(iterable, description, total, unit, initial)


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


def _logged(iterable: Iterable[Item], description: str, total: int, unit: str, initial: int) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable):
        now = time.monotonic()
        if done and now - last >= _SECONDS_BETWEEN_LINES:
            last, seconds, at = now, (now - start) / done, initial + done
            speed = f"{1 / seconds:.3g} {unit}s/s" if seconds <= 1 else f"{seconds:.3g} s/{unit}"
            left = duration((total - at) * seconds)
            logger.info("%s: %d of %d %ss, %s, %s left", description, at, total, unit, speed, left)
        yield item


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
