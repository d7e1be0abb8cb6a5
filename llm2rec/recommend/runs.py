"""Folders of finished students and teachers, in their run or copied from it."""

from pathlib import Path

from llm2rec.core.errors import CheckpointError
from llm2rec.core.hub import obtained
from llm2rec.core.run import described, read_record

__all__ = ["finished_student", "finished_teacher"]


def finished_student(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a finished student.

    Args:
        place: Folder of a finished run of `llm2rec.student` or `llm2rec.distill`, the student's folder in it or a copy
            of that, or an id on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        CheckpointError: If there is none.
        HubError: If it cannot be fetched.
    """
    return _finished(obtained(place, revision), "student", "student", "distill")


def finished_teacher(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a finished teacher; as `finished_student`, of a run of `llm2rec.teacher`."""
    return _finished(obtained(place, revision), "teacher", "teacher")


def _finished(folder: Path, part: str, *stages: str) -> Path:
    if (folder / "config.json").is_file() and not (folder / "run.json").is_file():  # a model without its run
        return folder
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"{folder} is not a run folder (it has no run.json); give one, such as result/result_..., the folder of a "
            f"{part}, or an id on the Hugging Face Hub."
        )
    record = read_record(folder)
    if record["stage"] not in stages or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is {described(record)}; expected a finished run of {' or '.join(stages)}."
        )
    return folder / part
