"""Selection policies that somebody else wrote: ``active=custom active.policy=module.Class``."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from llm2rec.core.errors import ConfigError
from llm2rec.distill.selection_policy import SelectionPolicy

__all__ = ["policy_named"]


def policy_named(policy: str, arguments: Mapping[str, Any]) -> SelectionPolicy:
    """Build a policy that somebody else wrote.

    Args:
        policy: Its class, as ``module.Class``, with a module that Python finds from where the command is launched.
        arguments: Of its constructor, by name.

    Raises:
        ConfigError: If there is no such class, it is no policy, or the arguments are not its own.
    """
    module, _, name = policy.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"active.policy is {policy!r}, which cannot be imported ({error}); expected `module.Class` of a module in "
            "the folder of the launch or on PYTHONPATH."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, SelectionPolicy)):
        raise ConfigError(f"active.policy is {policy!r}, which is no subclass of {SelectionPolicy.__module__}.")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"active.policy {policy!r} cannot be built from {dict(arguments)}: {error}.") from error
