"""Searches of a stage's options on validation, by Optuna.

Each trial is a run of the stage in a process and a folder of its own. hydra-optuna-sweeper is not used, although the
syntax of spaces is the same: its newest release (1.3.0) requires an Optuna below 3, of 2022, and it neither continues
an interrupted trial nor goes on after a failed one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2rec.tune.dimensions import Interval

if TYPE_CHECKING:
    from llm2rec.tune.results import TuneResult

__all__ = ["Interval", "tune"]


def tune(
    stage: str,
    overrides: Sequence[str],
    space: Mapping[str, Any],
    *,
    n_trials: int = 20,
    seed: int = 0,
    folder: Path | str = ".",
    name: str | None = None,
    jobs: int = 1,
    prune: bool = False,
    storage: Path | str | None = None,
) -> "TuneResult":
    """Search options of a stage for the best validation value of ``metrics.select_on``; the test split is not opened.

    The first trial has the stage's defaults; then Optuna's TPE sampler proposes. The search is resumable: called again
    with the same arguments, it continues the trial that was interrupted and goes on until there are ``n_trials``. With
    one job, a search that was interrupted has the same trials as one that was not. Values that were tried before are
    not run again. A trial that fails is recorded with its error, and the search goes on.

    The folder ``<result_dir>/tune_<name>`` holds ``tune.json``, ``log.txt``, the SQLite file and the trials' run
    folders. Trials of the teacher and the ensemble write their outputs into their run folder; only those of the best
    trial are kept.

    Args:
        stage: ``student``, ``distill``, ``teacher`` or ``ensemble``.
        overrides: Of all trials, such as ``"dataset=movielens"``.
        space: By option: a sequence of values, an `Interval`, or the text of a sweep of Hydra, such as
            ``"tag(log, interval(1e-4, 1e-2))"``. Groups can be searched too: ``{"student": ["sasrec", "gru4rec"]}``.
        n_trials: Trials to end with, finished or pruned; failed and repeated ones do not count.
        seed: Seed of the search.
        folder: Folder to launch the trials in; ``data/`` and ``result/`` are created there.
        name: Name of the search; None derives it from the arguments, so that the same call continues the same search.
        jobs: Trials at the same time.
        prune: Whether to stop trials whose best validation so far is below the median of the earlier trials'.
        storage: SQLite file of the search; None for one in its folder.

    Returns:
        The best trial and all trials.

    Raises:
        ConfigError: If the space or the fixed options cannot be, before the first trial.
        StageError: If five trials fail in a row, or no trial has finished.
        Interrupted: If a trial was ended by a signal; call again to continue.
    """
    from llm2rec.tune.search import Search  # imports what the stages import
    from llm2rec.tune.settings import TuneSettings

    settings = TuneSettings(stage, n_trials, name, seed, prune, jobs, None if storage is None else str(storage))
    return Search(settings, overrides, space, Path(folder).resolve()).run()
