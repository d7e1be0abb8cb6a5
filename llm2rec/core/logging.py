"""One calm progress line per phase: a bar on a terminal, a few log lines in a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm import tqdm

__all__ = ["progress"]

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_SECONDS_BETWEEN_LINES = 30.0


def progress(
    iterable: Iterable[Item], description: str, total: int, unit: str, *, initial: int = 0, shown: bool = True
) -> Iterator[Item]:
    """Iterate over ``iterable`` and show how far it is, how fast, and how long it still takes.

    Args:
        iterable: What to iterate over.
        description: Name of the phase.
        total: Number of items, those done before included.
        unit: What an item is.
        initial: Items done before.
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
    """A terminal on which texts come above the bar that is drawn there, instead of into it."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._terminal, end="")

    def flush(self) -> None:
        self._terminal.flush()


@contextmanager
def _log_above_bar() -> Iterator[None]:
    """Let the log write above the bar; tqdm's own way to do so forgets the level of the handlers."""
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
            last, rate, at = now, done / (now - start), initial + done
            logger.info(
                "%s: %d of %d %ss, %.3g a second, %.0f s left",
                description, at, total, unit, rate, (total - at) / rate,
            )  # fmt: skip
        yield item
