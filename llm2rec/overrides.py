"""Overrides of the command line: texts are taken as typed, and every option given is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llm2rec.core.errors import ConfigError

__all__ = ["check_read", "quoted", "text_options", "texts_as_typed"]

_OPENING, _CLOSING = "[({", "])}"


def check_read(cfg: DictConfig, overrides: Sequence[str], *, is_sweep: bool = False) -> None:
    """Reject overrides that the chosen files and values of a configuration do not read.

    Args:
        cfg: A configuration whose nodes have schemas.
        overrides: Of the command line.
        is_sweep: Whether this is a job of a sweep: where the deciding option is given too, other jobs may read what
            this one does not.

    Raises:
        ConfigError: Naming the option.
    """
    given = {key: value for key, value in map(_split, overrides) if value is not None}
    groups = [("", cfg), *((f"{name}.", cfg._get_node(name)) for name in map(str, cfg))]
    for prefix, node in groups:
        if not isinstance(node, DictConfig):
            continue
        schema = OmegaConf.get_type(node)
        for rule in getattr(schema, "IGNORED", ()):
            names = [prefix + name for name in rule.names if prefix + name in given]
            if not names:
                continue
            if rule.option is None:
                group = prefix.removesuffix(".")
                raise ConfigError(
                    f"`{names[0]}` is given, but `{group}={OmegaConf.select(node, 'name')}` does not read it; choose "
                    f"another `{group}` too, or leave it out."
                )
            chosen = OmegaConf.select(node, rule.option)
            is_decided = is_sweep and not given.keys().isdisjoint((prefix + rule.option, prefix.removesuffix(".")))
            if chosen in rule.values and not is_decided:
                raise ConfigError(
                    f"`{names[0]}` is given, but nothing reads it while `{prefix}{rule.option}` is "
                    f"{'null' if chosen is None else chosen}; change that too, or leave it out."
                )


def text_options(schemas: Mapping[str, Sequence[type]]) -> dict[str, bool]:
    """Options that hold text, by their full names; True for lists.

    Args:
        schemas: Dataclasses by the name of their group, ``""`` for the root.
    """
    options: dict[str, bool] = {}
    for group, kinds in schemas.items():
        for kind in kinds:
            options |= _texts_of(kind, f"{group}." if group else "")
    return options


def texts_as_typed(arguments: Sequence[str], options: Mapping[str, bool]) -> list[str]:
    """Quote the values of text options that Hydra would read as numbers or booleans, such as the id ``1_0`` as 10.

    Values that Hydra cannot read, such as ``a (1)``, and all elements of lists of text are quoted too.

    Args:
        arguments: Of the command line.
        options: Return value of `text_options`.

    Returns:
        The arguments for Hydra.
    """
    quoted = []
    for argument in arguments:
        key, value = _split(argument)
        if value is not None and key in options:
            parts = [_list(part) if options[key] and _is_list(part) else _scalar(part) for part in _parts(value)]
            argument = f"{argument[: argument.index('=')]}={','.join(parts)}"
        quoted.append(argument)
    return quoted


def _split(argument: str) -> tuple[str, str | None]:
    """Key and value of an override; no value for other arguments."""
    key, sign, value = argument.partition("=")
    return key.lstrip("+"), value if sign and not argument.startswith("-") else None


def _texts_of(kind: type, prefix: str) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for name, annotation in get_type_hints(kind).items():
        choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        for each in choices:
            if is_dataclass(each):
                found |= _texts_of(each, f"{prefix}{name}.")  # type: ignore[arg-type]
            elif each is str or each is Any or (get_origin(each) is list and get_args(each) == (str,)):
                found[prefix + name] = each is not str
    return found


def _parts(text: str) -> list[str]:
    """Split at commas outside quotes and brackets."""
    parts, start, depth, quote, is_start, is_escaped = [], 0, 0, "", True, False
    for place, sign in enumerate(text):
        if is_escaped or sign == "\\":
            is_escaped = not is_escaped
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and is_start:  # elsewhere it is an apostrophe
            quote = sign
        elif sign in _OPENING:
            depth += 1
        elif sign in _CLOSING:
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
        is_start = sign in ",[({" or (is_start and sign.isspace())
    return [*parts, text[start:]]


def _is_list(part: str) -> bool:
    return part.strip().startswith("[") and part.strip().endswith("]")


def _list(part: str) -> str:
    elements = (each.strip() for each in _parts(part.strip()[1:-1]))
    return f"[{','.join(each if _is_hydras(each) else quoted(each) for each in elements)}]"


def _is_hydras(element: str) -> bool:
    """Whether an element has syntax of Hydra: quotes, escapes or an interpolation."""
    return not element or element[0] in "'\"" or "\\" in element or "${" in element


def _scalar(part: str) -> str:
    try:
        override = OverridesParser.create().parse_override(f"option={part}")
    except HydraException:
        return part if part[:1] in ("[", "'", '"') or "${" in part else quoted(part.strip())
    if override.is_sweep_override():
        return part
    return quoted(part.strip()) if isinstance(override.value(), int | float) else part


def quoted(text: str) -> str:
    """Quote a text; backslashes before a quote are doubled, as Hydra's grammar halves them."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'
