"""Runs that can answer."""

from pathlib import Path

from llm2rec.core.errors import CheckpointError
from llm2rec.core.run import read_record

__all__ = ["finished"]


def finished(folder: Path, *stages: str) -> Path:
    """The folder, if it is that of a finished run of one of the stages.

    Raises:
        CheckpointError: If it is not.
    """
    if not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} is no run folder (it holds no run.json); name one, such as result/result_...")
    record = read_record(folder)
    if record["stage"] not in stages or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is a {record['status']} run of stage {record['stage']!r}; only finished runs of "
            f"{' and '.join(stages)} can answer."
        )
    return folder
