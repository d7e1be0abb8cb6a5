"""Run a stage from a notebook or a script, as its command does."""

import re
import subprocess
import sys
from pathlib import Path

from llm2rec.core.errors import Llm2RecError

__all__ = ["StageError", "run"]


class StageError(Llm2RecError):
    """A stage that was launched did not finish."""


def run(stage: str, *overrides: str, folder: Path | str = ".", quiet: bool = False) -> Path:
    """Run a stage in a process of its own: ``python -m llm2rec.<stage> <overrides>``.

    What it prints is shown. One process runs it; use ``accelerate launch`` for several.

    Args:
        stage: ``data``, ``student``, ``teacher``, ``ensemble``, ``distill`` or ``evaluate``.
        overrides: Of the configuration, such as ``"dataset=movielens"`` or ``"student.training.epochs=5"``.
        folder: Where to launch it; ``data/`` and ``result/`` lie there.
        quiet: Show nothing of it.

    Returns:
        The folder of the run.

    Raises:
        StageError: If the stage fails; its last lines tell why.
    """
    command = [sys.executable, "-m", f"llm2rec.{stage}", *overrides]
    lines: list[str] = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if not quiet:
                sys.stdout.write(line)
    # Every stage begins by telling its folder.
    told = [match[1] for line in lines if (match := re.match(rf"[0-9:]+ {re.escape(stage)}: (\S.*)", line))]
    if process.returncode or not told:
        raise StageError(
            f"llm2rec.{stage} with {list(overrides)} ended with exit code {process.returncode}; its last lines:\n"
            + "\n".join(lines[-5:])
        )
    return Path(folder, told[0]).resolve()
