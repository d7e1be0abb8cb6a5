"""The errors this library raises on purpose.

Every message says what is wrong, what came, what was expected and what to do. Each class also inherits the builtin
that a caller who knows nothing of us would catch.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubError",
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
    """Root of all errors of this library."""


class ConfigError(Llm2RecError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(Llm2RecError, ValueError):
    """Raw or prepared data that is missing, malformed or inconsistent."""


class UnknownItemError(DataError):
    """An item that a model was not trained on, or a title that several items have."""


class TeacherOutputsError(Llm2RecError, ValueError):
    """Teacher outputs that are missing, malformed or belong to another dataset."""


class CheckpointError(Llm2RecError, RuntimeError):
    """A run folder that cannot be resumed or loaded as asked."""


class NonFiniteError(Llm2RecError, FloatingPointError):
    """A loss or gradient that is not finite."""


class OutOfMemoryError(Llm2RecError, MemoryError):
    """A training step that does not fit into the GPU's memory, however it is divided."""


class StorageError(Llm2RecError, OSError):
    """A file that cannot be written: the disk is full, or the folder may not be written to."""


class HubError(Llm2RecError, ConnectionError):
    """A model on the Hugging Face Hub that cannot be found, fetched or put there."""


class Interrupted(Llm2RecError, RuntimeError):
    """A training that was asked to end (SIGTERM) and has written a checkpoint to go on from."""


def one_of(name: str, value: str, *allowed: str) -> None:
    """Refuse a setting that is not one of the allowed values.

    Raises:
        ConfigError: Naming the setting, its value and what was expected.
    """
    if value not in allowed:
        *others, last = map(repr, allowed)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{name} is {value!r}, expected {expected}.")
