"""Run folders: the record of a run, its metrics and phases; and the folders of sweeps (DESIGN 4.2)."""

import datetime
import logging
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2rec.core.errors import CheckpointError, DataError, StorageError
from llm2rec.core.files import read_object, remove_leftovers, replaced_file, without_secrets, write_json
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.processes import is_first_process

__all__ = [
    "Job",
    "Run",
    "changed_settings",
    "described",
    "discard",
    "is_sweep",
    "jobs_of",
    "latest_runs",
    "read_record",
]

_OF_NO_RESULT = ("resume", "finish", "reuse", "report", "logging.", "paths.root")  # options that change no result
_EPOCHS = ".training.epochs"
_OF_EVERY_RUN = {"run.json", "config.json", "log.txt", "metrics/time.json"}
_SWEEP = "multirun.yaml"  # written by Hydra into the folder of a sweep


@dataclass(frozen=True)
class Run:
    """One run folder, shared by all processes; only the first one writes.

    Attributes:
        folder: ``result/result_YYYYmmdd_HHMMSS``.
        stage: ``data``, ``student``, ``teacher``, ``ensemble``, ``distill`` or ``evaluate``.
        config: The resolved configuration, as plain values.
    """

    folder: Path
    stage: str
    config: dict[str, Any]

    @classmethod
    def start(cls, folder: Path, stage: str, config: dict[str, Any]) -> "Run":
        """Open a run folder: a new one, or one to resume.

        Raises:
            CheckpointError: If the folder belongs to another stage or was made with another configuration.
        """
        run = cls(folder, stage, config)
        record = folder / "run.json"
        if record.is_file():
            earlier = read_record(folder)
            has_fewer_epochs = run._check_resumable(earlier)
            if is_first_process():
                remove_leftovers(folder)
                if earlier["status"] != "finished":
                    kept = {key: value for key, value in earlier.items() if key not in ("error", "continue")}
                    early = {"ended_early": True} if has_fewer_epochs else {}
                    write_json(record, {**kept, "status": "running", **early})
        elif is_first_process():
            write_json(folder / "config.json", without_secrets(config))
            _clean_hydra(folder)
            write_json(
                record,
                {
                    "stage": stage,
                    "status": "running",
                    "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                    "seed": config.get("seed"),
                    "git": git_state(),
                    "versions": library_versions(),
                },
            )
        return run

    def _check_resumable(self, record: dict[str, Any]) -> bool:
        """Check that the run may be resumed; returns whether it is to train for fewer epochs than before."""
        if record["stage"] != self.stage:
            raise CheckpointError(
                f"{self.folder.name} is a run of stage {record['stage']!r}, not of {self.stage!r}; resume it with "
                f"`-m llm2rec.{record['stage']}`."
            )
        saved, now = read_object(self.folder / "config.json"), without_secrets(self.config)
        fewer = [key for key, was, epochs in _differences(saved, now) if key.endswith(_EPOCHS) and epochs < was]
        if changed := changed_settings(saved, now, besides=fewer):
            raise CheckpointError(
                f"{self.folder.name} was started with another configuration: {', '.join(changed)}. "
                "Resume with the same overrides, or start a new run."
            )
        return bool(fewer)

    @property
    def record(self) -> dict[str, Any]:
        """Contents of ``run.json``."""
        return read_record(self.folder)

    @property
    def masks_seen(self) -> bool | None:
        """Whether its rankings leave out the items of a user's past; None if that is not recorded."""
        return self.record.get("mask_seen") if (self.folder / "run.json").is_file() else None

    def note(self, **values: Any) -> None:
        """Add ``values`` to ``run.json``."""
        if is_first_process():
            write_json(self.folder / "run.json", {**self.record, **values})

    def keep(self, **values: Any) -> None:
        """Record values that must be the same when the run is resumed.

        Raises:
            CheckpointError: If one differs from when the run started.
        """
        kept = self.record
        if changed := [name for name, value in values.items() if kept.get(name, value) != value]:
            raise CheckpointError(
                f"{self.folder.name} was started with another value of `{'`, `'.join(changed)}` (see run.json); "
                "restore it, or start a new run."
            )
        self.note(**values)

    def stop(self, status: str, **values: str) -> None:
        """Record how a run ended that is not finished; any process may, as it may fail alone.

        Args:
            status: ``failed`` or ``interrupted``.
            values: The ``error``, or the command with which to ``continue``.
        """
        with suppress(CheckpointError, StorageError):  # a folder that is gone, a full disk: most likely the cause
            record = self.record
            if record["status"] == "running":
                write_json(self.folder / "run.json", without_secrets({**record, "status": status, **values}))

    def write_metrics(self, name: str, values: Any) -> None:
        """Write ``metrics/<name>.json``."""
        if is_first_process():
            write_json(self.folder / "metrics" / f"{name}.json", values)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; its seconds are added to ``metrics/time.json``, also over resumed runs and after an error."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(StorageError):  # probably the error being handled
                self._add_seconds(name, start)
            raise
        self._add_seconds(name, start)

    def _add_seconds(self, name: str, start: float) -> None:
        path = self.folder / "metrics" / "time.json"
        seconds = read_object(path) if path.is_file() else {}
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        self.write_metrics("time", seconds)


def discard(folder: Path) -> None:
    """Remove the folder of a run that made nothing: what every run writes, and the folder if that was all."""
    record, logs = folder / "run.json", {"log.txt", *_open_logs(folder)}
    if record.is_file():
        with suppress(CheckpointError):
            if read_record(folder)["status"] == "finished":
                return
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        if not all(file in _OF_EVERY_RUN | logs or file.startswith((".hydra", "tensorboard")) for file in files):
            return
        for name in _OF_EVERY_RUN - logs:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with suppress(OSError):
            (folder / "metrics").rmdir()
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    for name in logs:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # a folder that was there before keeps its other files
        folder.rmdir()


def _open_logs(folder: Path) -> list[str]:
    """Names of the log files in a folder that this process writes, such as that of ``hydra/job_logging=default``."""
    files = [Path(each.baseFilename) for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]
    return [file.name for file in files if file.parent == folder.absolute()]


def described(record: dict[str, Any]) -> str:
    """A run in a message, such as ``a failed run of stage 'student'``."""
    status = str(record["status"])
    return f"{'an' if status[:1] in 'aeiou' else 'a'} {status} run of stage {record['stage']!r}"


def changed_settings(old: dict[str, Any], new: dict[str, Any], besides: Collection[str] = ()) -> list[str]:
    """Changed options that may change a result, each with its old and new value, for a message; not ``besides``."""
    return [
        f"{key} (was {was!r}, now {now!r})"
        for key, was, now in _differences(old, new)
        # The micro-batch size changes no result, and has to change after a GPU ran out of memory.
        if not (key.startswith(_OF_NO_RESULT) or key.endswith(".micro_batch_size") or key in besides)
    ]


def read_record(folder: Path, *keys: str) -> dict[str, Any]:
    """Read a run's ``run.json``.

    Args:
        folder: The run's folder.
        keys: Required keys in addition to stage and status; a ``dataset`` has a name and a fingerprint.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    file = folder / "run.json"
    try:
        record = read_object(file, "stage", "status", *keys)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    dataset = record.get("dataset", {})
    if not isinstance(dataset, dict) or ("dataset" in keys and not {"name", "fingerprint"} <= dataset.keys()):
        raise CheckpointError(f"`dataset` in {file} is {dataset!r}, expected a name and a fingerprint.")
    return record


def _clean_hydra(folder: Path) -> None:
    """Remove home folder and secrets from the files that Hydra wrote before our code ran."""
    for file in [*(folder / ".hydra").glob("*.yaml"), *folder.parent.glob("multirun.yaml")]:
        text = file.read_text(encoding="utf-8")
        if (cleaned := without_secrets(text)) != text:
            with replaced_file(file) as aside:
                aside.write_text(cleaned, encoding="utf-8")


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.rstrip("."), old, new


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        folder: Its run folder, ``<sweep>/<number>``.
        options: Its overrides by key, without the seed.
        is_finished: Whether it can be evaluated.
    """

    folder: Path
    options: dict[str, str]
    is_finished: bool

    @property
    def name(self) -> str:
        """Name of the sweep and number of the job."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def latest_runs(result_dir: Path, fingerprint: str, stages: Collection[str]) -> list[Path]:
    """The newest finished run of each kind (label and seed) on a dataset, oldest first.

    Args:
        result_dir: Where runs are kept.
        fingerprint: The dataset's fingerprint.
        stages: Stages of the runs.
    """
    newest: dict[tuple[str, Any], Path] = {}
    # A multirun keeps its runs one folder deeper.
    for file in sorted([*result_dir.glob("result_*/run.json"), *result_dir.glob("result_*/*/run.json")]):
        folder, record = file.parent, read_record(file.parent)
        same = record.get("dataset", {}).get("fingerprint") == fingerprint
        if same and record["status"] == "finished" and record["stage"] in stages:
            record = read_record(folder, "dataset", "label", "seed", "parameters")  # of a finished model
            newest[(record["label"], record["seed"])] = folder
    return sorted(newest.values())


def is_sweep(folder: Path) -> bool:
    """Whether a folder belongs to a sweep and not to a single run."""
    return not (folder / "run.json").is_file() and (folder / _SWEEP).is_file()


def jobs_of(folder: Path) -> list[Job]:
    """The jobs of a sweep in the order they ran.

    Raises:
        CheckpointError: If none of them is finished.
    """
    jobs = [_job(each) for each in folder.iterdir() if each.name.isdecimal() and each.is_dir()]
    if not any(job.is_finished for job in jobs):
        raise CheckpointError(f"no job of the sweep {folder} is finished; see log.txt of its {len(jobs)} jobs.")
    return sorted(jobs, key=lambda job: (len(job.folder.name), job.folder.name))  # 2 before 10


def _job(folder: Path) -> Job:
    if not (folder / "run.json").is_file():  # it failed early
        return Job(folder, {}, False)
    record = read_record(folder)
    options = dict(each.partition("=")[::2] for each in record.get("overrides", ()))
    options.pop("seed", None)
    return Job(folder, options, record["status"] == "finished")
