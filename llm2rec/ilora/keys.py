"""Check that an adapter file holds exactly the tensors of the adapter."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from .errors import AdapterKeysError

__all__ = ["PREFIX", "check_keys"]

PREFIX = "ilora_"
"""Prefix of the names of all adapter modules."""


def check_keys(keys: Set[str], model: nn.Module, adapter: str, biases: Set[str]) -> None:
    """Raise unless a file holds exactly this adapter.

    Args:
        keys: Names of the file's tensors, mapped to the model's.
        model: The model with the adapter.
        adapter: Name of the adapter.
        biases: Names of the biases trained with it.

    Raises:
        AdapterKeysError: If tensors are missing or foreign.
    """
    state = model.state_dict().keys()
    wanted = {key for key in state if _belongs_to(key, adapter)}
    wanted |= {key for key in biases if f".{PREFIX}" not in key and not _is_wrapped(key)}
    missing = sorted(wanted - keys)
    others = keys - wanted - biases
    foreign = sorted(key for key in others if key not in state or not _may_travel(key, model, adapter))
    if missing or foreign:
        raise AdapterKeysError(
            f"the file does not hold adapter {adapter!r} of this model: {_listing('missing', missing)}; "
            f"{_listing('foreign', foreign)}. Load it into the base model and with the configuration "
            "(target modules, blocks) it was saved from."
        )


def _belongs_to(key: str, adapter: str) -> bool:
    parts = key.split(".")
    return any(part.startswith(PREFIX) and parts[i + 1 : i + 2] == [adapter] for i, part in enumerate(parts))


def _may_travel(key: str, model: nn.Module, adapter: str) -> bool:
    """Whether PEFT may save this tensor with the adapter: `modules_to_save` and resized embeddings."""
    if f".modules_to_save.{adapter}." in key:
        return True
    for name in ("get_input_embeddings", "get_output_embeddings"):
        embeddings = getattr(model, name, lambda: None)()
        embeddings = getattr(embeddings, "base_layer", embeddings)
        if isinstance(embeddings, nn.Module) and key.rpartition(".")[0] == _name_of(embeddings, model):
            return True
    return False


def _name_of(module: nn.Module, model: nn.Module) -> str | None:
    return next((name for name, each in model.named_modules() if each is module), None)


def _is_wrapped(key: str) -> bool:
    """Whether a tensor belongs to one of `modules_to_save` or to the original of one."""
    return ".modules_to_save." in key or ".original_module." in key


def _listing(name: str, keys: list[str], n_shown: int = 3) -> str:
    shown = ", ".join(keys[:n_shown]) + (", ..." if len(keys) > n_shown else "")
    return f"{len(keys)} {name}" + (f" ({shown})" if keys else "")
