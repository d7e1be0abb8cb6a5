"""Dimensions of a search space: choices and intervals, as texts of overrides and as numbers that Optuna draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm2rec.core.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Choice", "Dimension", "Interval", "Space", "dimension", "drawn"]


@dataclass(frozen=True)
class Choice:
    """Some values of an option.

    Attributes:
        values: Each as it is written in an override.
    """

    values: tuple[str, ...]

    def texts(self) -> tuple[str, ...]:
        """All values."""
        return self.values

    def text(self, value: Any) -> str:
        """A drawn value as it is written in an override."""
        return str(value)

    @property
    def size(self) -> int | None:
        """Number of values."""
        return len(self.values)

    def listed(self) -> list[Any]:
        """All values that can be drawn."""
        return list(self.values)

    def __str__(self) -> str:
        return ",".join(self.values)


@dataclass(frozen=True)
class Interval:
    """The numbers between two bounds, which it includes.

    Attributes:
        low: The lowest.
        high: The highest.
        log: Whether numbers are drawn evenly on the logarithmic scale.
        step: Distance between numbers; None for all numbers, or all whole ones.
        whole: Whether the option takes whole numbers; set from the option's type.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def texts(self) -> tuple[str, ...]:
        """The bounds."""
        return self.text(self.low), self.text(self.high)

    def text(self, value: Any) -> str:
        """A drawn value as it is written in an override: 6 significant digits, within the bounds."""
        if self.whole:
            return str(round(value))
        return repr(min(max(float(f"{value:.6g}"), self.low), self.high))

    @property
    def size(self) -> int | None:
        """Number of values; None for infinitely many."""
        if self.step is None and not self.whole:
            return None
        return int((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    def listed(self) -> list[Any]:
        """All values that can be drawn, of finitely many."""
        numbers = [self.low + place * (self.step or 1) for place in range(self.size or 0)]
        return [int(number) for number in numbers] if self.whole else numbers

    def holds(self, value: float) -> bool:
        """Whether a number can be drawn."""
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            return False
        return self.step is None or abs((value - self.low) / self.step - round((value - self.low) / self.step)) < 1e-9

    def __str__(self) -> str:
        bounds = f"interval({self.low:g}, {self.high:g})"
        if self.step is not None:
            return f"range({self.low:g}, {self.high:g}, step={self.step:g}), the end included"
        return f"tag(log, {bounds})" if self.log else bounds


Dimension = Choice | Interval
Space = dict[str, Dimension]


def dimension(key: str, value: Any) -> Dimension:
    """The dimension of an option.

    Args:
        key: The option, for messages.
        value: An `Interval`, or a sequence of values: texts as written in an override, numbers, booleans, None.

    Raises:
        ConfigError: If it is empty or its bounds cannot be.
    """
    if isinstance(value, Interval):
        _check_interval(key, value)
        return value
    if isinstance(value, Mapping) or isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"the search space holds `{key}` as {value!r}, expected a list of values or an `Interval`.")
    texts = tuple(_text(each) for each in value)
    if not texts:
        raise ConfigError(f"the search space holds no value of `{key}`; give at least one.")
    if len(set(texts)) < len(texts):
        raise ConfigError(f"the search space holds a value of `{key}` twice: {', '.join(texts)}.")
    return Choice(texts)


def _check_interval(key: str, each: Interval) -> None:
    if not each.low < each.high:
        raise ConfigError(f"the interval of `{key}` is {each}, expected a lower bound below the upper one.")
    if each.log and (each.low <= 0 or each.step is not None):
        raise ConfigError(f"the interval of `{key}` is {each}: on a logarithmic scale low > 0, and there are no steps.")
    if each.step is not None and each.step <= 0:
        raise ConfigError(f"the interval of `{key}` has step {each.step:g}, expected a positive one.")


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value)


def drawn(trial: "Trial", key: str, each: Dimension) -> None:
    """Draw the value of a dimension for a trial, unless it has one."""
    if isinstance(each, Choice):
        trial.suggest_categorical(key, each.values)
    elif each.whole:
        trial.suggest_int(key, int(each.low), int(each.high), log=each.log, step=int(each.step or 1))
    else:
        trial.suggest_float(key, each.low, each.high, log=each.log, step=each.step)
