"""Tune configuration (Hydra structured config)."""

import re
from dataclasses import dataclass

from llm2rec.core.errors import ConfigError

__all__ = ["TuneSettings"]


@dataclass
class TuneSettings:
    """A search. All other options of the command are those of the stage.

    Attributes:
        stage: Stage to search: ``student``, ``distill``, ``teacher`` or ``ensemble``.
        n_trials: Trials to end with, finished or pruned; failed and repeated ones do not count.
        name: Name of the search; its folder is ``<result_dir>/tune_<name>``. None derives it from stage, options and
            space, so that the same command continues the same search.
        search_seed: Seed of the search; ``seed`` is that of the stage.
        prune: Whether to stop trials whose best validation so far is below the median of the earlier trials'.
        jobs: Trials at the same time. With more than one the search depends on which of them ends first.
        storage: SQLite file of the search, which several searches may share; None for one in the folder.
    """

    stage: str = "???"
    n_trials: int = 20
    name: str | None = None
    search_seed: int = 0
    prune: bool = False
    jobs: int = 1
    storage: str | None = None

    def __post_init__(self) -> None:
        """Reject invalid values."""
        for option in ("n_trials", "jobs"):
            if (value := getattr(self, option)) < 1:
                raise ConfigError(f"`{option}` is {value}, expected at least 1.")
        if self.search_seed < 0:
            raise ConfigError(f"`search_seed` is {self.search_seed}, expected 0 or more.")
        if self.name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", self.name):
            raise ConfigError(
                f"`name` is {self.name!r}, expected the name of a folder: up to 100 letters, digits, `_`, `-` and `.`, "
                "the first a letter or digit."
            )
