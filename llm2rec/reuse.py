"""Finished runs that have made what another one would make."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import read_object, without_secrets
from llm2rec.core.git_info import git_state
from llm2rec.core.run import changed_settings, read_record

__all__ = ["made_by_other_code", "same_runs"]


def same_runs(result_dir: Path, stage: str, config: dict[str, Any], reads: Sequence[str]) -> list[tuple[Path, str]]:
    """Finished runs of a stage with the same configuration, as far as the stage reads it.

    Args:
        result_dir: Where runs are kept.
        stage: The stage.
        config: The resolved configuration, plain values.
        reads: Its parts that count; how work is divided into micro-batches never does.

    Returns:
        Folder and fingerprint of the dataset of each, the newest first.
    """
    wanted = without_secrets({name: config[name] for name in reads})
    found = []
    for file in sorted(result_dir.glob("result_*/run.json"), reverse=True):
        folder = file.parent
        try:
            record = read_record(folder, "dataset")
            if record["stage"] != stage or record["status"] != "finished":
                continue
            saved = read_object(folder / "config.json", *reads)
        except (CheckpointError, DataError):  # a run of another kind, or a damaged one, which is of no use
            continue
        if not changed_settings({name: saved[name] for name in reads}, wanted):
            found.append((folder, str(record["dataset"]["fingerprint"])))
    return found


def made_by_other_code(run: Path) -> str | None:
    """The commit that made a run, if the code that is running is known to be another."""
    commit, now = read_record(run).get("git", {}).get("commit"), git_state()["commit"]
    return str(commit)[:12] if commit and now and commit != now else None
