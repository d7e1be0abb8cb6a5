"""Proposals of a search: values from Optuna's TPE sampler, each tried once, the defaults first."""

import logging
import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from llm2rec.core.seed import derived_seed
from llm2rec.tune.dimensions import Space, drawn

__all__ = ["Proposals"]

logger = logging.getLogger("llm2rec.tune")

_MOST_REPEATS = 100  # in a row
_MOST_LISTED = 10_000  # combinations of a finite space


class Proposals:
    """What to try next.

    A proposal is a function of the seed, its number and the results of the earlier trials: the sampler is seeded anew
    for every trial, so that a search that was interrupted proposes what an unbroken one does.

    Args:
        study: The study; its finished trials have a user attribute ``value``.
        space: The search space.
        defaults: The stage's value of each dimension that holds it. If some do not, the first trial, which has the
            defaults, has no parameters for them.
        seed: Seed.
    """

    def __init__(self, study: optuna.Study, space: Space, defaults: Mapping[str, str | float], seed: int) -> None:
        self.study, self.space, self.defaults, self.seed = study, space, dict(defaults), seed

    def next(self) -> optuna.Trial | None:
        """Ask for values that were not tried before; None if there are none left."""
        for _ in range(_MOST_REPEATS):
            untried = self._untried()
            if untried == []:
                return None
            trials = self.study.get_trials(deepcopy=False)
            if not trials:
                self.study.enqueue_trial(self.defaults)
            self._seed_sampler(sum(each.state != TrialState.WAITING for each in trials))
            trial = self.study.ask()
            if self._is_new(trial):
                return trial
            if untried:
                place = derived_seed(self.seed, "untried", trial.number) % len(untried)
                self.study.enqueue_trial(dict(zip(self.space, untried[place], strict=True)))
        return None

    def unfinished(self) -> list[optuna.Trial]:
        """The trials that were running when the search ended."""
        trials = list[optuna.Trial]()
        for each in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._seed_sampler(each.number)
            trials.append(optuna.Trial(self.study, each._trial_id))
        return [trial for trial in trials if self._is_new(trial)]

    def overrides(self, trial: optuna.Trial) -> list[str]:
        """The searched options with their values; none for the defaults."""
        if trial.number == 0:
            return []
        return [f"{key}={each.text(trial.params[key])}" for key, each in self.space.items()]

    def _seed_sampler(self, number: int) -> None:
        self.study.sampler = optuna.samplers.TPESampler(seed=derived_seed(self.seed, number) % 2**32)

    def _is_new(self, trial: optuna.Trial) -> bool:
        """Draw the values of a trial; if an earlier one has the same, give it that one's result."""
        for key, each in self.space.items():
            if trial.number > 0 or key in self.defaults:
                drawn(trial, key, each)
        values = self._values(trial.params)
        for earlier in self.study.get_trials(deepcopy=False)[: trial.number]:
            if "same_as" not in earlier.user_attrs and self._values(earlier.params) == values:
                self._repeat(trial, earlier)
                return False
        return True

    def _values(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The values of a trial as texts of overrides; fewer than options if a default is outside of the space."""
        return tuple(each.text(params[key]) for key, each in self.space.items() if key in params)

    def _untried(self) -> list[tuple[Any, ...]] | None:
        """Combinations that no trial has had; None if there are too many to list."""
        sizes = [each.size for each in self.space.values()]
        if any(size is None for size in sizes) or math.prod(size or 0 for size in sizes) > _MOST_LISTED:
            return None
        tried = {self._values(each.params) for each in self.study.get_trials(deepcopy=False)}
        combinations = product(*(each.listed() for each in self.space.values()))
        return [each for each in combinations if self._values(dict(zip(self.space, each, strict=True))) not in tried]

    def _repeat(self, trial: optuna.Trial, earlier: FrozenTrial) -> None:
        """Give a trial the result of an earlier one with the same values."""
        trial.set_user_attr("overrides", self.overrides(trial))
        trial.set_user_attr("same_as", earlier.number)
        trial.set_user_attr("value", earlier.user_attrs.get("value"))
        trial.set_user_attr("status", "repeated")
        is_complete = earlier.state == TrialState.COMPLETE
        self.study.tell(trial, earlier.value if is_complete else None, None if is_complete else TrialState.FAIL)
        logger.info("trial %d: the values of trial %d again; not run", trial.number, earlier.number)
