"""Sweeps: the folders that ``--multirun`` leaves, a run folder for each job."""

from dataclasses import dataclass
from pathlib import Path

from llm2rec.core.errors import CheckpointError
from llm2rec.core.run import read_record

__all__ = ["Job", "is_sweep", "jobs_of"]

_SWEEP = "multirun.yaml"  # Hydra's mark of a sweep's folder


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        folder: Its run folder, ``<sweep>/<number>``.
        options: Its overrides by their keys, without the seed.
        is_finished: Whether there is something to evaluate.
    """

    folder: Path
    options: dict[str, str]
    is_finished: bool

    @property
    def name(self) -> str:
        """Sweep and number."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep, and of no run."""
    return not (folder / "run.json").is_file() and (folder / _SWEEP).is_file()


def jobs_of(folder: Path) -> list[Job]:
    """The jobs of a sweep in the order they were run.

    Raises:
        CheckpointError: If none of them is finished.
    """
    jobs = [_job(each) for each in folder.iterdir() if each.name.isdecimal() and each.is_dir()]
    if not any(job.is_finished for job in jobs):
        raise CheckpointError(
            f"no job of the sweep {folder} is finished; its {len(jobs)} jobs tell why in their log.txt."
        )
    return sorted(jobs, key=lambda job: (len(job.folder.name), job.folder.name))  # 2 before 10


def _job(folder: Path) -> Job:
    if not (folder / "run.json").is_file():  # it failed early
        return Job(folder, {}, False)
    record = read_record(folder)
    options = dict(each.partition("=")[::2] for each in record.get("overrides", ()))
    options.pop("seed", None)
    return Job(folder, options, record["status"] == "finished")
