"""SIGTERM, by which clusters and spot machines announce that they take a machine back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Termination"]


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
