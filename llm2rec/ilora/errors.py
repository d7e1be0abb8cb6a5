"""Errors of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

__all__ = [
    "AdapterKeysError",
    "GateError",
    "ILoraError",
    "MergeError",
    "RowAdaptersError",
    "not_called",
    "refuse_merge",
    "refuse_row_adapters",
]


class ILoraError(Exception):
    """Base class of this package's errors."""


class GateError(ILoraError, RuntimeError):
    """Gates are missing, held twice, or do not fit the model or the batch."""


class MergeError(ILoraError, NotImplementedError):
    """A mixture that differs between instances cannot be merged into one weight."""


class AdapterKeysError(ILoraError, ValueError):
    """An adapter file lacks tensors of the adapter or holds foreign ones."""


class RowAdaptersError(ILoraError, ValueError):
    """An adapter, or where it starts, is chosen for each row of a batch."""


def refuse_row_adapters(arguments: Mapping[str, Any], adapters: Sequence[str]) -> None:
    """Raise for arguments of a forward pass that PEFT takes out and iLoRA would ignore.

    Raises:
        RowAdaptersError: If ``adapter_names`` or ``alora_offsets`` is given.
    """
    if arguments.get("adapter_names") is not None:
        raise RowAdaptersError(
            f"`adapter_names` is {arguments['adapter_names']!r}, and iLoRA cannot choose an adapter for each row; call "
            f"`set_adapter` with one of {list(adapters)} and run the rows of each adapter as a batch of their own."
        )
    if arguments.get("alora_offsets") is not None:
        raise RowAdaptersError("`alora_offsets` is given, which is for aLoRA and not read by iLoRA; leave it out.")


def not_called(layer: str, model: str) -> ValueError:
    """The error for a layer whose weight a model reads without calling the layer."""
    return ValueError(
        f"layer {layer!r} cannot be adapted: {model} may read its weight without calling it, so the adapter would be "
        "ignored; leave it out with `exclude_modules`."
    )


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
