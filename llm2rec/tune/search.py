"""The search: asks Optuna for values, runs trials, and records them."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from llm2rec.core.errors import CheckpointError, ConfigError, DataError, Interrupted
from llm2rec.core.files import storage_errors, without_secrets
from llm2rec.core.logging import duration
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.processes import n_processes
from llm2rec.core.run import read_record
from llm2rec.core.seed import derived_seed
from llm2rec.launch import StageError
from llm2rec.search_space import CheckedSpace, checked_space, split_space
from llm2rec.tune.process import TrialProcess, remove_outputs, validation_history
from llm2rec.tune.proposals import Proposals
from llm2rec.tune.results import Trial, TuneResult, best_of, format_trials, repeating, write_trials
from llm2rec.tune.settings import TuneSettings
from llm2rec.tune.study import locked, logged, open_study

__all__ = ["Search"]

logger = logging.getLogger("llm2rec.tune")

_POLL_SECONDS = 0.1
_MOST_FAILURES = 5  # in a row
# Errors that every trial would have, since the first one has no searched options; such a trial is run again.
_REFUSALS = ("ConfigError", "DataError", "CheckpointError", "TeacherOutputsError", "HubError")
_FULL_DISK = ("StorageError",)


@dataclass
class _Running:
    """A trial that is running: Optuna's object, its process, the evaluations that were checked for pruning."""

    trial: optuna.Trial
    process: TrialProcess
    n_checked: int
    is_pruned: bool = False


class Search:
    """A search over the options of a stage; see `llm2rec.tune.tune`.

    Args:
        settings: Of the search.
        overrides: Of the stage; those with a sweep belong to the space.
        space: Further dimensions.
        launched_in: Folder to launch the trials in, absolute.

    Raises:
        ConfigError: If the stage refuses a value of the space, or the search cannot be.
    """

    def __init__(
        self, settings: TuneSettings, overrides: Sequence[str], space: Mapping[str, Any], launched_in: Path
    ) -> None:
        if n_processes() > 1:
            raise ConfigError(f"llm2rec.tune is launched in {n_processes()} processes, expected one: it starts others.")
        self.settings, self.launched_in = settings, launched_in
        self.fixed, given = split_space(overrides, space)
        self.checked: CheckedSpace = checked_space(settings.stage, self.fixed, given, launched_in)
        self.space = self.checked.space
        self._identity = without_secrets(
            {
                "stage": settings.stage,
                "overrides": sorted(self.fixed),
                "space": {key: str(each) for key, each in self.space.items()},
                "search_seed": settings.search_seed,
                "prune": settings.prune,
            }
        )
        hashed = derived_seed(json.dumps(self._identity, sort_keys=True))
        self.name = settings.name or f"{settings.stage}-{hashed:016x}"[: len(settings.stage) + 9]
        self.folder = self.checked.result_dir / f"tune_{self.name}"
        self._failures = 0
        self._study: optuna.Study
        self._proposals: Proposals

    def run(self) -> TuneResult:
        """Run trials until there are enough; returns the result."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        given = self.settings.storage
        file = self.folder / "trials.db" if given is None else from_launch_folder(given, self.launched_in)
        with locked(self.folder) as lock, logged(logger, self.folder / "log.txt"):
            self._study = open_study(file, self.name, self._identity, prune=self.settings.prune)
            of_space = self.space, self.checked.defaults, self.settings.search_seed
            self._proposals = Proposals(self._study, *of_space)
            logger.info("tune: %s, %d options, %s", self.folder, len(self.space), self._counted())
            waiting = self._proposals.unfinished()
            running = list[_Running]()
            try:
                while self._fill(running, waiting, lock):
                    time.sleep(_POLL_SECONDS)
                    for each in list(running):
                        self._check(each)
                        if not each.process.is_running:
                            running.remove(each)
                            self._end(each)
            finally:
                for each in running:  # after Ctrl-C or an error; they continue when the search does
                    each.process.stop()
                for each in running:
                    each.process.wait()
                    self._note_interrupted(each)
            self._write()
            return self._result()

    # Trials ----------------------------------------------------------------------------------------------------------

    def _fill(self, running: list[_Running], waiting: list[optuna.Trial], lock: int) -> bool:
        """Start trials until enough are running; returns whether any is."""
        while len(running) < self.settings.jobs:
            if waiting:
                trial: optuna.Trial | None = waiting.pop(0)
            elif self._n_counted() + len(running) < self.settings.n_trials:
                trial = self._proposals.next()
            else:
                break
            if trial is None:
                break
            running.append(self._start(trial, lock))
        return bool(running)

    def _start(self, trial: optuna.Trial, lock: int) -> _Running:
        overrides = self._proposals.overrides(trial)
        trial.set_user_attr("overrides", overrides)
        run = self._run_of(trial.number)
        logger.info("trial %d: %s", trial.number, " ".join(overrides) or "defaults")
        process = TrialProcess(self.settings.stage, [*self.fixed, *overrides], run, self.launched_in, lock)
        n_reported = len(self._frozen(trial).intermediate_values)
        return _Running(trial, process, max(n_reported - 1, 0))

    def _check(self, each: _Running) -> None:
        """Report new evaluations to the pruner, and stop the trial if it says so."""
        if not self.settings.prune or each.is_pruned:
            return
        reported = self._frozen(each.trial).intermediate_values
        for place, value in enumerate(validation_history(each.process.run)):
            if place < each.n_checked:
                continue
            if place not in reported:
                each.trial.report(value, place)
            each.n_checked = place + 1
            if each.trial.should_prune():
                each.is_pruned = True
                each.process.stop()
                return

    def _end(self, each: _Running) -> None:
        """Record a trial whose process has ended.

        Raises:
            Interrupted: If a signal of another program ended it.
            StageError: If too many trials have failed in a row, or all would fail in the same way.
            ConfigError: If the data have changed during the search.
        """
        self._check(each)  # evaluations since the last look
        trial, number = each.trial, each.trial.number
        if each.process.was_interrupted:
            self._note_interrupted(each)
            raise Interrupted(f"trial {number} was ended by a signal.")
        error = each.process.error()
        error = None if each.is_pruned else error
        if error and error.startswith(_FULL_DISK if number else (*_REFUSALS, *_FULL_DISK)):
            raise StageError(
                f"trial {number}, {'the defaults' if number == 0 else trial.user_attrs['overrides']}: {error}"
            )
        value: float | None = None
        try:
            value = max(validation_history(each.process.run), default=None)
        except DataError as damaged:
            error = error or str(damaged)
        if value is None and error is None:
            error = "it ended without a validation"
        status = "pruned" if each.is_pruned else "failed" if error else "finished"
        if status == "finished":
            self._check_data(each.process.run)
        seconds = round(each.process.seconds + trial.user_attrs.get("seconds", 0.0), 1)
        values = {"value": value if status != "failed" else None, "seconds": seconds, "error": error, "status": status}
        for name, noted in values.items():
            trial.set_user_attr(name, noted)
        is_partial = len(trial.params) < len(self.space)  # TPE models the options that all complete trials have
        if status == "finished" and not is_partial:
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)
        self._log_end(number, status, value, seconds, error)
        self._write()
        self._failures = self._failures + 1 if status == "failed" else 0
        if self._failures >= _MOST_FAILURES:
            raise StageError(f"{self._failures} trials in a row have failed; the last one: {error}")

    def _note_interrupted(self, each: _Running) -> None:
        """Keep the seconds of a trial that will be continued."""
        each.process.error()
        each.trial.set_user_attr("seconds", each.process.seconds + each.trial.user_attrs.get("seconds", 0.0))

    def _check_data(self, run: Path) -> None:
        if any(key.startswith("dataset") for key in self.space):
            return
        fingerprint = read_record(run, "dataset")["dataset"]["fingerprint"]
        if self._study.user_attrs.get("fingerprint", fingerprint) != fingerprint:
            raise ConfigError(
                f"the data of {run.name} differ from those of earlier trials, so that their values cannot be compared; "
                "restore the data, or start another search with `name=NAME`."
            )
        self._study.set_user_attr("fingerprint", fingerprint)

    # Files and results -----------------------------------------------------------------------------------------------

    def _run_of(self, number: int) -> Path:
        return self.folder / f"{self.name}_{number:03d}"

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[trial.number]

    def _trials(self) -> list[Trial]:
        found = []
        for each in self._study.get_trials(deepcopy=False):
            if each.state != TrialState.WAITING:
                noted = each.user_attrs
                run = self._run_of(noted.get("same_as", each.number))
                of_run = noted.get("value"), noted.get("seconds"), run if run.is_dir() else None, noted.get("error")
                found.append(Trial(each.number, noted.get("overrides", []), noted.get("status", "running"), *of_run))
        return found

    def _n_counted(self) -> int:
        return sum(each.status in ("finished", "pruned") for each in self._trials())

    def _counted(self) -> str:
        return f"{self._n_counted()} of {self.settings.n_trials} trials done"

    def _log_end(self, number: int, status: str, value: float | None, seconds: float, error: str | None) -> None:
        best = best_of(self._trials())
        note = ", the best so far" if best is not None and best.number == number else ""
        reached = f"{self.checked.select_on} {value:.4f}{note}" if status != "failed" else str(error)
        logger.info("trial %d: %s after %s: %s (%s)", number, status, duration(seconds), reached, self._counted())

    def _write(self) -> None:
        """Write ``tune.json``, and remove the teacher outputs of all trials but the best."""
        trials, file = self._trials(), self.folder / "tune.json"
        about = {"name": self.name, **self._identity, "select_on": self.checked.select_on}
        write_trials(file, self.settings.stage, self.fixed, trials, {**about, "n_trials": self.settings.n_trials})
        best = best_of(trials)
        for each in trials:
            if best is not None and each.run not in (None, best.run) and each.status != "running":
                remove_outputs(self._run_of(each.number))

    def _result(self) -> TuneResult:
        trials = self._trials()
        best = best_of(trials)
        if best is None or best.value is None:
            raise StageError(f"no trial of {self.folder} has finished; see tune.json.")
        if best.run is None:
            raise CheckpointError(f"the run of the best trial, {self._run_of(best.number)}, is gone; restore it.")
        if (n_counted := self._n_counted()) < self.settings.n_trials:
            logger.info("tune: the search space has no more than %d different trials", n_counted)
        command = repeating(self.settings.stage, self.fixed, best)
        logger.info("\n%s", format_trials(trials, self.checked.select_on))
        logger.info("tune: best %s %.4f: trial %d, %s", self.checked.select_on, best.value, best.number, best.run)
        logger.info("tune: repeat it with: %s", command)
        return TuneResult(best.value, best.overrides, best.run, trials, command, self.folder)
