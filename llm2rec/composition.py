"""Explain in one line why a configuration cannot be composed: misspelt options and choices, and missing quotes."""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm2rec.core.errors import ConfigError
from llm2rec.overrides import quoted

__all__ = ["check_added", "check_flags", "explained", "options_of"]

Schemas = Mapping[str, Mapping[str, type]]
"""The dataclasses of each group by their names; those of the root under ``""``."""

_FLAGS = (
    "help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion", "config-path",
    "config-name", "config-dir", "experimental-rerun", "info",
)  # fmt: skip
_SYNTAX = "()[]{},:='\"\\$"
_MOST_SUGGESTED = 3


def options_of(kind: type, prefix: str = "") -> Iterator[str]:
    """Full names of the options of a dataclass and of the dataclasses in it, which are named too."""
    for field in fields(kind):
        yield prefix + field.name
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from options_of(field.type, f"{prefix}{field.name}.")


def check_flags(arguments: Sequence[str], schemas: Schemas) -> None:
    """Reject flags that Hydra does not have, such as ``--epochs=3``.

    Raises:
        ConfigError: Naming the option that was probably meant.
    """
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if argument.startswith("--") and name and not any(flag.startswith(name) for flag in _FLAGS):
            meant = _nearest(name.replace("-", "_"), _known(schemas))
            remedy = f"; did you mean {' or '.join(f'`{each}=VALUE`' for each in meant)}?" if meant else "."
            raise ConfigError(f"`--{name}` is not a flag of this command; options are written option=value{remedy}")


def check_added(cfg: DictConfig, overrides: Sequence[str], schemas: Schemas) -> None:
    """Reject options that are added with ``+`` and that no dataclass has: nothing reads them.

    Raises:
        ConfigError: Naming the option.
    """
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if not override.startswith("+") or key.startswith("hydra") or "@" in key or "/" in key:
            continue
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        if is_dataclass(kind) and name not in {field.name for field in fields(kind)}:
            raise ConfigError(_unknown(key, schemas))


@contextmanager
def explained(schemas: Schemas) -> Iterator[None]:
    """Raise errors of composing a configuration as `ConfigError`, with a remedy.

    Args:
        schemas: Of the command.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explanation(error, schemas)) from error


def _explanation(error: Exception, schemas: Schemas) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_choice(error.missing_cfg_file, error.options or ())
    if found := re.match(r"Ambiguous value for argument '(.*)'\n", text):
        return _ambiguous(found[1])
    if found := re.match(r"Could not append to config. An item is already at '(.*)'", text):
        return f"`{found[1]}` exists already; leave out the `+` before it."
    if found := re.match(r"Could not (?:override|append|delete)[^']*'([^'@]+)", text):
        return _unknown(found[1].split("=")[0], schemas)
    if found := re.match(r"Error merging override (.*)", text):
        return f"`{found[1]}`: {_first_line(error.__cause__ or error)}."
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _known(schemas: Schemas) -> list[str]:
    """Options of all choices of all groups."""
    kinds = ((f"{group}." if group else "", kind) for group, named in schemas.items() for kind in named.values())
    return list(dict.fromkeys(name for prefix, kind in kinds for name in options_of(kind, prefix)))


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """Options that were probably meant: of the same last name, or spelt alike."""
    last = key.rpartition(".")[2]
    same_last = [each for each in known if each.rpartition(".")[2] == last]
    spelt_alike = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if spelt_alike and (spelt_alike[0] in same_last or not same_last):
        return spelt_alike
    return difflib.get_close_matches(key, same_last, n=_MOST_SUGGESTED, cutoff=0.0)


def _unknown(key: str, schemas: Schemas) -> str:
    known, group = _known(schemas), key.partition(".")[0]
    if key in known:  # but the chosen file does not have it
        name = key.removeprefix(f"{group}.")
        owners = [each for each, kind in schemas.get(group, {}).items() if name in options_of(kind)]
        return f"the chosen `{group}` has no option `{key}`, which is one of {group}={', '.join(owners)}."
    meant = _nearest(key, known)
    remedy = f"did you mean {' or '.join(f'`{each}`' for each in meant)}?" if meant else "--cfg job shows all options."
    return f"there is no option `{key}`; {remedy}"


def _no_choice(file: str, options: Sequence[str]) -> str:
    group, _, choice = file.rpartition("/")
    choices = [each for each in options if not each.startswith("base_")]
    if not choices:
        return f"there is no configuration file `{file}`."
    meant = difflib.get_close_matches(choice, choices, n=1)
    remedy = f" Did you mean `{group}={meant[0]}`?" if meant else ""
    return f"`{group}={choice}` does not exist, expected one of {', '.join(choices)}.{remedy}"


def _ambiguous(override: str) -> str:
    key, _, value = override.partition("=")
    return (
        f"`{override}` holds a comma, which separates the values of a sweep (--multirun). Quote a text: "
        f"{_with_quotes(key, value)}; write a list with brackets: {shlex.quote(f'{key}=[{value}]')}."
    )


def _unreadable(override: str) -> str:
    key, sign, value = override.partition("=")
    if not sign:
        return f"`{override}` is not of the form option=value; a value with a space needs quotes: 'option=a b'."
    if value.lstrip().startswith("[") and not value.rstrip().endswith("]"):
        return (
            f"`{override}` is a list without its end; the shell splits at spaces, so quote the whole of it: "
            f"{shlex.quote(f'{key}=[a, b]')}."
        )
    found = " ".join(dict.fromkeys(each for each in value if each in _SYNTAX))
    return (
        f"`{override}` cannot be read: {found or 'its value'} is syntax of overrides. Quote the value, and all of it "
        f"for the shell: {_with_quotes(key, value)}."
    )


def _with_quotes(key: str, value: str) -> str:
    return shlex.quote(f"{key}={quoted(value)}")
