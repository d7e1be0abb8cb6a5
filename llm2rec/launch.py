"""Run a stage from a notebook or a script."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llm2rec.core.errors import Llm2RecError
from llm2rec.core.paths import FOLDER_FILE

__all__ = ["StageError", "run"]


class StageError(Llm2RecError):
    """A launched stage failed."""


def run(stage: str, *overrides: str, folder: Path | str = ".", quiet: bool = False) -> Path:
    """Run a stage in its own process: ``python -m llm2rec.<stage> <overrides>``.

    Its output is shown. For several processes, use ``accelerate launch``.

    Args:
        stage: ``data``, ``student``, ``teacher``, ``ensemble``, ``distill`` or ``evaluate``.
        overrides: Of the configuration, such as ``"dataset=movielens"`` or ``"student.training.epochs=5"``.
        folder: Folder to launch it in; ``data/`` and ``result/`` are created there.
        quiet: Show no output.

    Returns:
        The folder of the run: with ``reuse=true`` perhaps an earlier one, with ``--multirun`` that of the whole sweep.

    Raises:
        StageError: If the stage fails; the message holds its last lines.
    """
    command = [sys.executable, "-m", f"llm2rec.{stage}", *overrides]
    with tempfile.TemporaryDirectory() as aside:
        file, lines = Path(aside, "folder"), list[str]()
        with subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, FOLDER_FILE: str(file)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                if not quiet:
                    sys.stdout.write(line)
        if process.returncode or not file.is_file():
            raise StageError(
                f"llm2rec.{stage} with {list(overrides)} ended with exit code {process.returncode}; its last lines:\n"
                + "\n".join(lines[-5:])
            )
        return Path(file.read_text(encoding="utf-8")).resolve()
