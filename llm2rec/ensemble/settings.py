"""Ensemble configuration (Hydra structured configs): members, the search for their weights, exported outputs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from llm2rec.core.errors import ConfigError, Ignored

__all__ = [
    "EnsembleSettings",
    "NeighboursSettings",
    "SearchSettings",
    "StudentsSettings",
    "TeachersSettings",
    "TitlesSettings",
]


@dataclass
class StudentsSettings:
    """The finished students among ``runs``, which split a share equally.

    Attributes:
        share: Share of the mixture, 0 to 1; null is chosen on validation.
        temperature: Temperature of a student's distribution; above 1 it softens what students know by heart of
            training rows. null is chosen on validation.
    """

    share: float | None = None
    temperature: float | None = None


@dataclass
class NeighboursSettings:
    """Item-to-item counts.

    Attributes:
        share: Share of the mixture, 0 to 1; null is chosen on validation, 0 switches them off.
        temperature: Scores are raised to the power of 1 over it; null is chosen on validation.
    """

    share: float | None = None
    temperature: float | None = None


@dataclass
class TitlesSettings:
    """Title neighbours by the language model ``llm`` without training.

    Attributes:
        share: Share of the mixture, 0 to 1; null is chosen on validation, 0 switches them off: no language model is
            then loaded.
        temperature: Temperature of the softmax over cosines; null is chosen on validation.
        whitening: 0 only centres title vectors, 1 whitens their principal components, values between whiten softly;
            null is chosen on validation.
        decay: Weight of an item in a history relative to the next one, up to 1; null is chosen on validation.
        history: Items of a history that are read, which may be more than students read.
    """

    share: float | None = None
    temperature: float | None = None
    whitening: float | None = None
    decay: float | None = None
    history: int = 20


@dataclass
class TeachersSettings:
    """The finished LLM teachers among ``runs``, each a member with weights of its own.

    Attributes:
        share: Share of the mixture of all together, 0 to 1, then split equally; null is chosen on validation for each.
        temperature: Temperature of each teacher's distribution over its best items; null is chosen on validation.
        top_k: Items of each row that a teacher ranks; fewer if its exported outputs have fewer.
    """

    share: float | None = None
    temperature: float | None = None
    top_k: int = 200


@dataclass
class SearchSettings:
    """The search for what is null above, on validation rows by ``metrics.select_on``.

    Attributes:
        rows: Validation rows to use, a seeded choice.
        rounds: Rounds over all values, at most; it stops when none improves.
    """

    rows: int = 4096
    rounds: int = 4


@dataclass
class EnsembleSettings:
    """Members of an ensemble, their weights, and its exported outputs.

    Attributes:
        name: Name of its outputs, ``<teacher outputs>/<dataset>/<name>``.
        students: Finished students among ``runs``.
        neighbours: Item-to-item counts.
        titles: Title neighbours.
        teachers: Finished LLM teachers among ``runs``.
        search: The search for weights.
        vectors: Members whose item vectors are exported, side by side: ``students``, ``titles`` (raw title vectors), or
            names of runs; null for ``[titles]`` if there are title neighbours, else ``[students]``.
        top_k: Items per training row.
        block_rows: Rows per resumable block.
        batch_rows: Rows per batch, fewer with a large catalogue.
    """

    name: str = "ensemble"
    students: StudentsSettings = field(default_factory=StudentsSettings)
    neighbours: NeighboursSettings = field(default_factory=NeighboursSettings)
    titles: TitlesSettings = field(default_factory=TitlesSettings)
    teachers: TeachersSettings = field(default_factory=TeachersSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    vectors: list[str] | None = None
    top_k: int = 100
    block_rows: int = 16384
    batch_rows: int = 512

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        Ignored(("neighbours.temperature",), "neighbours.share", (0.0,)),
        Ignored(("titles.temperature", "titles.whitening", "titles.decay", "titles.history"), "titles.share", (0.0,)),
        Ignored(("teachers.temperature", "teachers.top_k"), "teachers.share", (0.0,)),
    )

    def __post_init__(self) -> None:
        """Reject invalid values."""
        if not re.fullmatch(r"\w[\w. -]{0,99}", self.name):
            raise ConfigError(
                f"ensemble.name is {self.name!r}, expected the name of a folder: up to 100 letters, digits, `_`, `-`, "
                "`.` and spaces, the first a letter or digit."
            )
        groups = {name: getattr(self, name) for name in ("students", "neighbours", "titles", "teachers")}
        for name, group in groups.items():
            _check(f"{name}.share", group.share, "a share from 0 to 1", lambda value: 0 <= value <= 1)
            _check(
                f"{name}.temperature",
                group.temperature,
                "a number from 0.01 to 100",
                lambda value: 0.01 <= value <= 100,
            )
        given = {f"ensemble.{name}.share": group.share for name, group in groups.items() if group.share is not None}
        if sum(given.values()) > 1 + 1e-9:
            shown = ", ".join(f"`{name}={share:g}`" for name, share in given.items())
            raise ConfigError(f"the shares {shown} sum to {sum(given.values()):g}, expected at most 1.")
        _check("titles.whitening", self.titles.whitening, "a number from 0 to 1", lambda value: 0 <= value <= 1)
        _check("titles.decay", self.titles.decay, "a number above 0 and up to 1", lambda value: 0 < value <= 1)
        if self.vectors is not None and (not self.vectors or len({*self.vectors}) < len(self.vectors)):
            raise ConfigError(
                f"ensemble.vectors is {self.vectors}, expected different members such as `[titles,students]`, or null."
            )
        sizes = (
            "top_k",
            "block_rows",
            "batch_rows",
            "titles.history",
            "teachers.top_k",
            "search.rows",
            "search.rounds",
        )
        for name in sizes:
            group, _, option = name.rpartition(".")
            if (value := getattr(getattr(self, group) if group else self, option)) < 1:
                raise ConfigError(f"ensemble.{name} is {value}, expected at least 1.")


def _check(name: str, value: float | None, expected: str, is_valid: Callable[[float], bool]) -> None:
    if value is not None and not is_valid(value):
        raise ConfigError(f"ensemble.{name} is {value}, expected {expected}, or null to choose it on validation.")
