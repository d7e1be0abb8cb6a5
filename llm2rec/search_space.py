"""Search spaces of `llm2rec.tune`: read from Hydra's sweep syntax, and checked against a stage's configuration."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm2rec.composition import check_added, explained
from llm2rec.config import build, built_object, check_finite, register, schemas_of, texts_of_command
from llm2rec.core.errors import ConfigError, one_of
from llm2rec.core.paths import conf_folder, from_launch_folder
from llm2rec.overrides import check_read, quoted
from llm2rec.tune.dimensions import Choice, Dimension, Interval, Space, dimension

__all__ = ["CheckedSpace", "checked_space", "split_space"]

_READ_BY = {
    "student": ("dataset", "student", "metrics"),
    "distill": ("dataset", "student", "distill", "active", "metrics"),
    "teacher": ("dataset", "llm", "teacher", "active", "metrics"),
    "ensemble": ("dataset", "ensemble", "active", "metrics"),
}
"""Parts of the configuration that a stage builds."""
_OF_THE_SEARCH = ("resume", "finish", "reuse", "hydra.run", "hydra.sweep", "hydra.job")  # set by the search itself


@dataclass(frozen=True)
class CheckedSpace:
    """A search space whose values the stage accepts.

    Attributes:
        space: The dimensions; an interval of a whole-number option holds whole numbers.
        defaults: The stage's own value of each dimension that holds it, as text or number.
        result_dir: Folder of runs, absolute.
        select_on: Name of the validation metric.
    """

    space: Space
    defaults: dict[str, str | float]
    result_dir: Path
    select_on: str


def split_space(overrides: Sequence[str], space: Mapping[str, Any]) -> tuple[list[str], Space]:
    """Separate the fixed overrides from those that span the search space.

    Args:
        overrides: Of the stage; those with a sweep (``a,b``, ``choice``, ``range``, ``interval``) span the space.
        space: Further dimensions by option: a sequence of values, an `Interval`, or the text of a sweep.

    Returns:
        The fixed overrides and the space.

    Raises:
        ConfigError: If a dimension is empty, is given twice, or cannot be searched, or there is none.
    """
    texts = [f"{key}={value}" for key, value in space.items() if isinstance(value, str)]
    fixed, found = list[str](), dict[str, Dimension]()
    for text in [*overrides, *texts]:
        override = _parsed(text)
        if override.is_delete() or not override.is_sweep_override():
            if text in texts:
                raise ConfigError(f"`{text}` is a single value, expected a sweep such as `a,b` or `interval(0, 1)`.")
            fixed.append(text)
            continue
        key = override.get_key_element()
        if key in found:
            raise ConfigError(f"the search space names `{key}` twice; name each option once.")
        found[key] = _dimension(key, override)
    for key, value in space.items():
        if not isinstance(value, str):
            if key in found:
                raise ConfigError(f"the search space names `{key}` twice; name each option once.")
            found[key] = dimension(key, value)
    for key in [*found, *(_parsed(text).get_key_element() for text in fixed)]:
        if key.lstrip("+").startswith(_OF_THE_SEARCH):
            raise ConfigError(f"`{key}` is set by the search itself; leave it out.")
    if metric := next((key for key in found if key.startswith("metrics")), None):
        raise ConfigError(f"`{metric}` decides how trials are compared, so that it cannot be searched; give one value.")
    if not found:
        raise ConfigError(
            "there is nothing to search: give an option several values, such as `student.model.dropout=0.1,0.2` or "
            "`'student.training.learning_rate=tag(log, interval(1e-4, 1e-2))'`."
        )
    return fixed, found


def _parsed(text: str) -> Override:
    (argument,) = texts_of_command([text])
    try:
        with explained(schemas_of()):
            return OverridesParser.create().parse_override(argument)
    except ConfigError as error:
        raise error if text in str(error) else ConfigError(f"`{text}` cannot be read: {error}.") from error


def _dimension(key: str, override: Override) -> Dimension:
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        return dimension(key, tuple(override.sweep_string_iterator()))
    if isinstance(sweep, RangeSweep):
        numbers = [float(each) for each in sweep.range()]
        if not numbers:
            raise ConfigError(f"`{override.input_line}` is an empty range; the end is not part of a range.")
        return dimension(key, Interval(numbers[0], numbers[-1], step=abs(float(sweep.step))))
    if isinstance(sweep, IntervalSweep):
        if unknown := sweep.tags - {"log"}:
            raise ConfigError(f"`{override.input_line}` has the tag {min(unknown)!r}, expected `log` or none.")
        return dimension(key, Interval(float(sweep.start or 0), float(sweep.end or 0), log="log" in sweep.tags))
    raise ConfigError(f"`{override.input_line}` cannot be searched; use `a,b`, `choice`, `range` or `interval`.")


def checked_space(stage: str, fixed: Sequence[str], space: Space, folder: Path) -> CheckedSpace:
    """Check that a stage accepts its fixed overrides, and with them every choice and bound of a search space.

    Args:
        stage: The stage.
        fixed: Overrides of all trials.
        space: The search space.
        folder: Folder of the launch.

    Returns:
        The space with the types of its options, the stage's defaults, and what the search has to know of the stage.

    Raises:
        ConfigError: If the stage is not one that can be searched, an option does not exist, or a value is refused.
    """
    one_of("stage", stage, *_READ_BY)
    with _composing(folder) as composed:
        base, chosen = composed(fixed)
        _check(base, stage, fixed, fixed)
        groups = {key: each.texts()[0] for key, each in space.items() if key in chosen}
        shape = composed([*fixed, *_overrides(groups)])[0] if groups else base
        typed = {key: _typed(shape, key, each) for key, each in space.items()}
        lowest = {key: each.texts()[0] for key, each in typed.items()}
        low, _ = composed([*fixed, *_overrides(lowest)])
        _check(low, stage, fixed, _overrides(lowest))
        for key, each in typed.items():
            for text in each.texts()[1:]:
                values = _overrides(lowest | {key: text})
                cfg = composed([*fixed, *values])[0] if key in chosen else _updated(low, f"{key}={text}")
                _check(cfg, stage, fixed, values, f"{key}={text}")
        highest = _overrides({key: each.texts()[-1] for key, each in typed.items()})
        _check(composed([*fixed, *highest])[0], stage, fixed, highest)
    result_dir = from_launch_folder(str(base.paths.result_dir), base.paths.root)
    return CheckedSpace(typed, _defaults(base, chosen, typed), result_dir, str(base.metrics.select_on))


def _overrides(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in values.items()]


@contextmanager
def _composing(folder: Path) -> Iterator[Any]:
    """Yield a function from overrides to a configuration and the chosen file of each group, without a running Hydra."""
    register()
    schemas = schemas_of()

    def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
        root = f"paths.root={quoted(str(folder))}"  # else the working directory of a command
        with explained(schemas):
            cfg = compose("config", [root, *texts_of_command(overrides)], return_hydra_config=True)
        chosen = {group: str(name) for group, name in cfg.hydra.runtime.choices.items() if "/" not in group}
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        OmegaConf.set_struct(cfg, True)
        return cfg, chosen

    backup = get_gh_backup()  # the caller may be a command, or use Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            yield composed
    finally:
        restore_gh_from_backup(backup)


def _updated(cfg: DictConfig, override: str) -> DictConfig:
    """A copy of a configuration with one value changed, which is faster than to compose it."""
    cfg, parsed = copy.deepcopy(cfg), _parsed(override)
    try:
        OmegaConf.update(cfg, str(parsed.key_or_group), parsed.value())
    except OmegaConfBaseException as error:
        raise ConfigError(f"`{override}`: {str(error).splitlines()[0]}") from error
    return cfg


def _check(cfg: DictConfig, stage: str, fixed: Sequence[str], values: Sequence[str], what: str = "") -> None:
    """Build what the stage builds; errors name the override in question."""
    try:
        check_finite(cfg)
        check_read(cfg, [*fixed, *values])
        check_added(cfg, [*fixed, *values], schemas_of())
        if cfg.seed < 0:
            raise ConfigError(f"`seed` is {cfg.seed}, expected 0 or more.")
        for group in _READ_BY[stage]:
            is_policy = group == "active"
            built_object(cfg[group]) if is_policy else build(cfg[group], object)
    except ConfigError as error:
        if not what:
            raise
        raise ConfigError(f"the search space holds `{what}`, which {stage} refuses: {error}") from error


def _typed(cfg: DictConfig, key: str, each: Dimension) -> Dimension:
    """A dimension with the type of its option: intervals of whole numbers and of real ones."""
    if isinstance(each, Choice):
        return each
    parent, _, name = key.lstrip("+").rpartition(".")
    owner = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(owner, DictConfig) or name not in owner:
        return each  # there is no such option, as composing it will say
    node = owner._get_node(name)
    if not isinstance(node, IntegerNode | FloatNode):
        raise ConfigError(f"`{key}` is not a number, so that it has no interval; list its values: `{key}=a,b`.")
    whole = isinstance(node, IntegerNode)
    if whole and not all(number is None or number == int(number) for number in (each.low, each.high, each.step)):
        raise ConfigError(f"`{key}` is a whole number, but its interval is {each}.")
    return replace(each, whole=whole)


def _defaults(base: DictConfig, chosen: Mapping[str, str], space: Space) -> dict[str, str | float]:
    """The stage's value of each dimension that holds it."""
    found: dict[str, str | float] = {}
    for key, each in space.items():
        name = key.lstrip("+")
        value = chosen[name] if name in chosen else OmegaConf.select(base, name)
        if isinstance(each, Interval):
            if isinstance(value, int | float) and each.holds(value):
                found[key] = cast(float, value)
        else:
            same = (text for text in each.values if text == value or _parsed(f"{key}={text}").value() == value)
            if (text := next(same, None)) is not None:
                found[key] = text
    return found
