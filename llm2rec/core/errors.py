"""Errors of this library.

Messages state the problem, the value, the expected value and the remedy. Each class also inherits from a builtin
exception.
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
    """Invalid setting or combination of settings."""


class DataError(Llm2RecError, ValueError):
    """Missing, malformed or inconsistent raw or prepared data."""


class UnknownItemError(DataError):
    """Item that a model was not trained on, or ambiguous title."""


class TeacherOutputsError(Llm2RecError, ValueError):
    """Teacher outputs that are missing, malformed or of another dataset."""


class CheckpointError(Llm2RecError, RuntimeError):
    """Run folder that cannot be resumed or loaded."""


class NonFiniteError(Llm2RecError, FloatingPointError):
    """Loss, gradient or score that is not finite."""


class OutOfMemoryError(Llm2RecError, MemoryError):
    """Training step that does not fit into the GPU's memory and cannot be retried with smaller micro-batches."""


class StorageError(Llm2RecError, OSError):
    """File that cannot be written because the disk is full or a permission is missing."""


class HubError(Llm2RecError, ConnectionError):
    """Failed download from, or upload to, the Hugging Face Hub."""


class Interrupted(Llm2RecError, RuntimeError):
    """Run ended by Ctrl-C or SIGTERM that can be resumed.

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
        ConfigError: If it has another value.
    """
    if value not in allowed:
        *others, last = map(repr, allowed)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")
