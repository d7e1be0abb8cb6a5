"""Results of a search: its trials, the best of them, and the table and file that show them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm2rec.core.files import without_secrets, write_json
from llm2rec.core.git_info import git_state, library_versions

__all__ = ["Trial", "TuneResult", "best_of", "format_trials", "repeating", "write_trials"]

_SHOWN_ERROR = 100  # characters in the table


@dataclass(frozen=True)
class Trial:
    """One trial of a search.

    Attributes:
        number: Its number, from 0.
        overrides: The searched options with their values; empty for the stage's defaults.
        status: ``finished``, ``pruned``, ``failed``, ``repeated`` (the values were tried before) or ``running``.
        value: Best validation value; of a pruned trial, before it was stopped; None if there is none.
        seconds: Wall-clock time; None if it did not run.
        run: Its run folder, of a repeated trial that of the earlier one; a failed trial may have none.
        error: Why it failed.
    """

    number: int
    overrides: list[str]
    status: str
    value: float | None = None
    seconds: float | None = None
    run: Path | None = None
    error: str | None = None


@dataclass(frozen=True)
class TuneResult:
    """A finished search.

    Attributes:
        value: Best validation value.
        overrides: The searched options of the best trial; empty if the defaults are best.
        run: Run folder of the best trial.
        trials: All trials in the order of their numbers.
        command: Command that repeats the best trial as an ordinary run.
        folder: Folder of the search.
    """

    value: float
    overrides: list[str]
    run: Path
    trials: list[Trial]
    command: str
    folder: Path


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the highest value, of equal ones the first; None if none has finished."""
    finished = [each for each in trials if each.status == "finished" and each.value is not None]
    return max(finished, key=lambda each: (each.value, -each.number), default=None)


def repeating(stage: str, fixed: Sequence[str], trial: Trial) -> str:
    """The command that repeats a trial as an ordinary run."""
    return shlex.join(["python", "-m", f"llm2rec.{stage}", *without_secrets([*fixed, *trial.overrides])])


def format_trials(trials: Sequence[Trial], select_on: str) -> str:
    """A text table of trials, the best first, then those without a value."""
    ordered = sorted(trials, key=lambda each: (each.value is None, -(each.value or 0), each.number))
    rows = [("trial", f"val/{select_on}", "status", "seconds", "options")]
    for each in ordered:
        value = "" if each.value is None else f"{each.value:.4f}"
        seconds = "" if each.seconds is None else f"{each.seconds:.0f}"
        options = " ".join(each.overrides) or "defaults"
        note = f"  ({each.error[:_SHOWN_ERROR]})" if each.error else ""
        rows.append((str(each.number), value, each.status, seconds, options + note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)


def write_trials(
    file: Path, stage: str, fixed: Sequence[str], trials: Sequence[Trial], about: Mapping[str, Any]
) -> None:
    """Write ``tune.json``: the best trial, the command that repeats it, and all trials.

    Args:
        file: The file.
        stage: The stage.
        fixed: Overrides of all trials.
        trials: All trials.
        about: Facts on the search, written first.
    """
    best = best_of(trials)
    content = {
        **about,
        "best": None if best is None else asdict(best),
        "command": None if best is None else repeating(stage, fixed, best),
        "trials": [asdict(each) for each in trials],
        "git": git_state(),
        "versions": library_versions(),
    }
    write_json(file, without_secrets(_plain(content)))


def _plain(value: Any) -> Any:
    """Paths as text, so that `without_secrets` sees them."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
