"""Errors of this package."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["AdapterKeysError", "GateError", "ILoraError", "MergeError", "refuse_merge"]


class ILoraError(Exception):
    """Base class of this package's errors."""


class GateError(ILoraError, RuntimeError):
    """Gates are missing, held twice, or do not fit the model or the batch."""


class MergeError(ILoraError, NotImplementedError):
    """A mixture that differs between instances cannot be merged into one weight."""


class AdapterKeysError(ILoraError, ValueError):
    """An adapter file lacks tensors of the adapter or holds foreign ones."""


def refuse_merge() -> NoReturn:
    """Raise the error of every merge method.

    Raises:
        MergeError: Always.
    """
    raise MergeError(
        "iLoRA cannot be merged: the mixture of experts differs between instances, so no single weight equals it. Keep "
        "the adapter in place, call `unload()` for the base model without it, or convert ONE instance's mixture to a "
        "plain LoRA adapter with `llm2rec.ilora.fold`."
    )
