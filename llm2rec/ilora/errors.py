"""What can go wrong, by type."""

from __future__ import annotations

from typing import NoReturn

__all__ = ["AdapterKeysError", "GateError", "ILoraError", "MergeError", "refuse_merge"]


class ILoraError(Exception):
    """Root of the errors that this package raises on purpose."""


class GateError(ILoraError, RuntimeError):
    """Gates that are missing, held twice, or do not fit the model or the batch."""


class MergeError(ILoraError, NotImplementedError):
    """An attempt to fold a mixture that differs from instance to instance into one weight."""


class AdapterKeysError(ILoraError, ValueError):
    """An adapter file that lacks tensors of the adapter or holds tensors that are not the adapter's."""


def refuse_merge() -> NoReturn:
    """Raise the error that every way of merging ends in.

    Raises:
        MergeError: Always.
    """
    raise MergeError(
        "iLoRA cannot be merged: the mixture of experts differs from instance to instance, so no single weight equals "
        "it. Keep the adapter in place, call `unload()` for the base model without it, or write ONE instance's mixture "
        "as a plain LoRA adapter with `llm2rec.ilora.fold`."
    )
