"""Finished runs that are members of an ensemble."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_object
from llm2rec.core.paths import from_launch_folder
from llm2rec.core.processes import is_first_process
from llm2rec.core.run import described, is_sweep, jobs_of, latest_runs, read_record
from llm2rec.data import RecData

__all__ = ["FinishedRun", "finished_run", "latest_members", "named_runs"]

logger = logging.getLogger(__name__)
_STAGES = ("student", "distill", "teacher")


@dataclass(frozen=True)
class FinishedRun:
    """A finished student or LLM teacher.

    Attributes:
        folder: Its run folder.
        run: That folder's name; of a sweep's job with the sweep's before it.
        label: What it is, such as ``sasrec``.
        seed: Its seed.
        is_teacher: Whether it is an LLM teacher.
    """

    folder: Path
    run: str
    label: str
    seed: int | None
    is_teacher: bool

    @property
    def model(self) -> Path:
        """Folder of the finished model."""
        return self.folder / ("teacher" if self.is_teacher else "student")

    @property
    def about(self) -> dict[str, object]:
        """What identifies it in manifests."""
        return {"run": self.run, "label": self.label, "seed": self.seed}


def latest_members(result_dir: Path, outputs: Path, fingerprint: str) -> list[Path]:
    """The newest finished run of each student (label and seed), and of each LLM teacher whose outputs are there.

    Args:
        result_dir: Where runs are kept.
        outputs: Folder of the dataset's teacher outputs.
        fingerprint: The dataset's fingerprint.
    """
    exported = {read_object(manifest).get("run") for manifest in outputs.glob("*/manifest.json")}
    found = latest_runs(result_dir, fingerprint, ("student", "teacher"))
    return [each for each in found if read_record(each)["stage"] == "student" or each.name in exported]


def named_runs(runs: object, root: Path) -> dict[Path, str]:
    """Folders and names of the given runs; a sweep's folder stands for its finished jobs.

    Raises:
        ConfigError: If `runs` is no list, or holds a run twice.
    """
    if isinstance(runs, str) or not isinstance(runs, Sequence):
        raise ConfigError(
            f"`runs` is {runs!r}, expected `latest`, finished students and LLM teachers such as "
            "`runs=[result/result_...,result/result_...]`, the folder of a sweep (`python -m llm2rec.student "
            "--multirun seed=1,2,3`), or `runs=[]` for neighbours and titles alone."
        )
    found: dict[Path, str] = {}
    for folder in (from_launch_folder(str(each), root).resolve() for each in runs):
        jobs = jobs_of(folder) if is_sweep(folder) else []
        for job in (job for job in jobs if not job.is_finished and is_first_process()):
            logger.warning("%s is not finished and is left out of the ensemble", job.name)
        alone = f"{folder.parent.name}/{folder.name}" if is_sweep(folder.parent) else folder.name
        named = {job.folder: job.name for job in jobs if job.is_finished} or {folder: alone}
        if again := next((name for place, name in named.items() if place in found), None):
            raise ConfigError(f"`runs` names {again} twice; give every run once.")
        found |= named
    return found


def finished_run(folder: Path, name: str, data: RecData) -> FinishedRun:
    """A member of an ensemble.

    Raises:
        CheckpointError: If the folder is not a finished run of a student or teacher on this dataset.
    """
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"{folder} is not the folder of a run or sweep (it has no run.json); give `runs=[result/result_...]`."
        )
    record = read_record(folder)
    if record["stage"] not in _STAGES or record["status"] != "finished":
        raise CheckpointError(f"{name} is {described(record)}; expected a finished run of student, distill or teacher.")
    if read_record(folder, "dataset")["dataset"]["fingerprint"] != data.fingerprint:
        raise CheckpointError(
            f"{name} was trained on dataset {record['dataset']['name']!r}, not on this {data.name!r} "
            f"({data.fingerprint[:12]}); use the same dataset overrides as in training."
        )
    found = FinishedRun(folder, name, str(record["label"]), record.get("seed"), is_teacher=record["stage"] == "teacher")
    if not found.model.is_dir():
        raise CheckpointError(f"{name} holds no finished {record['stage']} ({found.model} is missing); run it again.")
    return found
