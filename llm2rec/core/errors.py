"""Errors of this library.

Every message names the problem, the value, the expected value and the remedy. Each class also inherits a builtin
exception, for callers that catch those.
"""

import signal
from dataclasses import dataclass

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubError",
    "Ignored",
    "Interrupted",
    "Llm2RecError",
    "NonFiniteError",
    "OutOfMemoryError",
    "StorageError",
    "TeacherOutputsError",
    "UnknownItemError",
    "one_of",
]


class Llm2RecError(Exception):
    """Base class of all errors of this library."""


class ConfigError(Llm2RecError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(Llm2RecError, ValueError):
    """Raw or prepared data that is missing, malformed or inconsistent."""


class UnknownItemError(DataError):
    """An item that a model was not trained on, or a title that several items have."""


class TeacherOutputsError(Llm2RecError, ValueError):
    """Teacher outputs that are missing, malformed or belong to another dataset."""


class CheckpointError(Llm2RecError, RuntimeError):
    """A run folder that cannot be resumed or loaded."""


class NonFiniteError(Llm2RecError, FloatingPointError):
    """A loss or gradient that is not finite."""


class OutOfMemoryError(Llm2RecError, MemoryError):
    """A training step that does not fit into the GPU's memory even with micro-batches of one row."""


class StorageError(Llm2RecError, OSError):
    """A file that cannot be written: the disk is full, or permission is missing."""


class HubError(Llm2RecError, ConnectionError):
    """A model that cannot be downloaded from, or uploaded to, the Hugging Face Hub."""


class Interrupted(Llm2RecError, RuntimeError):
    """A run that was ended by Ctrl-C or SIGTERM and can be continued.

    Args:
        message: What happened.
        signal_number: The signal, for the exit code.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Ignored:
    """Options that nothing reads while another option has one of some values; see `llm2rec.overrides.check_read`.

    A settings class lists them in its class attribute ``IGNORED``.

    Attributes:
        names: The options, relative to the settings.
        option: The other option; None if the options are never read.
        values: Its values.
    """

    names: tuple[str, ...]
    option: str | None = None
    values: tuple[object, ...] = ()


def one_of(name: str, value: str, *allowed: str) -> None:
    """Check that an option has one of the allowed values.

    Raises:
        ConfigError: Naming the option, its value and the allowed ones.
    """
    if value not in allowed:
        *others, last = map(repr, allowed)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")
