"""The process of a trial: a run of the stage in a folder of its own."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import read_object
from llm2rec.core.paths import FOLDER_FILE
from llm2rec.core.run import read_record
from llm2rec.overrides import quoted

__all__ = ["TrialProcess", "remove_outputs", "validation_history"]

_EXPORTING = ("teacher", "ensemble")  # stages that write teacher outputs beside their run
_OUTPUTS = "teacher_outputs"
_TIME_OF_LOG = re.compile(r"^\d\d:\d\d:\d\d ")
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


class TrialProcess:
    """A trial that is running.

    Its process has a session of its own, so that Ctrl-C reaches the search alone, and it inherits the lock of the
    search: a search that was killed cannot start again while the trial goes on without it.

    Args:
        stage: The stage.
        overrides: Its overrides.
        run: Run folder; if it holds a run that was interrupted, that run is resumed.
        launched_in: Working directory.
        lock: File descriptor of the lock.
    """

    def __init__(self, stage: str, overrides: Sequence[str], run: Path, launched_in: Path, lock: int) -> None:
        self.run, self._start = run, time.monotonic()
        self._output = run.with_name(f"{run.name}.txt")
        self.is_stopped = False
        own = [f"hydra.run.dir={quoted(str(run))}"]
        if stage in _EXPORTING:
            own.append(f"paths.teacher_outputs_dir={quoted(str(run / _OUTPUTS))}")
        if (run / "run.json").is_file():
            own.append(f"resume={quoted(str(run))}")
        environment = {name: value for name, value in os.environ.items() if name != FOLDER_FILE}
        with open(self._output, "w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"llm2rec.{stage}", *overrides, *own],
                cwd=launched_in,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def was_interrupted(self) -> bool:
        """Whether another program ended it by SIGINT or SIGTERM."""
        return not self.is_stopped and self._process.returncode in _INTERRUPTED

    def stop(self) -> None:
        """Send SIGTERM, upon which a training writes a checkpoint and ends."""
        self.is_stopped = True
        self._process.terminate()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()

    def error(self) -> str | None:
        """Why it failed, in one line; None if it ended well. Removes its output file."""
        code = self._process.returncode
        lines = [
            each for each in self._output.read_text(encoding="utf-8", errors="replace").splitlines() if each.strip()
        ]
        self._output.unlink()
        if code == 0:
            return None
        if code < 0:
            cause = ", probably because memory ran out" if code == -signal.SIGKILL else ""
            return f"the process was killed by signal {-code}{cause}"
        try:
            return str(read_record(self.run)["error"])
        except (CheckpointError, KeyError):  # refused before it began, which leaves no folder; or crashed
            return _TIME_OF_LOG.sub("", lines[-1]) if lines else f"exit code {code}"


def validation_history(run: Path) -> list[float]:
    """Values of the selecting metric, evaluation by evaluation; empty without an evaluation so far.

    Raises:
        DataError: If the file is damaged.
    """
    file = run / "metrics" / "validation.json"
    if not file.is_file():
        return []
    record = read_object(file, "select_on", "history")
    name = f"val/{record['select_on']}"
    values = [each.get(name) for each in record["history"]]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise DataError(f"{file} lacks {name!r} in an evaluation.")
    return [float(value) for value in values]


def remove_outputs(run: Path) -> None:
    """Remove the teacher outputs of a trial."""
    shutil.rmtree(run / _OUTPUTS, ignore_errors=True)
