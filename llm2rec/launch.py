"""Run a stage from a notebook or a script: in this process, whose state is restored, or in one of its own."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from llm2rec.core.errors import Llm2RecError
from llm2rec.core.paths import FOLDER_FILE
from llm2rec.core.processes import n_processes

__all__ = ["StageError", "run"]


class StageError(Llm2RecError):
    """A launched stage failed."""


def run(stage: str, *overrides: str, folder: Path | str = ".", quiet: bool = False) -> Path:
    """Run a stage as ``python -m llm2rec.<stage> <overrides>`` does, and show its output.

    The stage runs in this process, with the threads that torch has here. Working folder, ``sys.argv``, environment,
    logging, signal handlers, random states and the settings of torch, Hydra and Accelerate are afterwards as before. A
    sweep (``--multirun``), and a call from another thread than the main one, get a process of their own: a process has
    one working folder. For several processes, use ``accelerate launch``.

    Args:
        stage: ``data``, ``student``, ``teacher``, ``ensemble``, ``distill`` or ``evaluate``.
        overrides: Of the configuration, such as ``"dataset=movielens"`` or ``"student.training.epochs=5"``.
        folder: Folder to launch it in; ``data/`` and ``result/`` are created there.
        quiet: Show no output.

    Returns:
        The folder of the run: with ``reuse=true`` perhaps an earlier one, with ``--multirun`` that of the whole sweep.

    Raises:
        Llm2RecError: The error of the stage, such as `ConfigError`.
        StageError: If the stage ends without a run, or fails in a process of its own; the message then holds its last
            lines.
    """
    alone = threading.current_thread() is threading.main_thread() and n_processes() == 1
    launch = _run_here if alone and not {"-m", "--multirun"} & {*overrides} else _run_apart
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside, "folder")
        failure = launch(stage, overrides, Path(folder), quiet, file)
        if failure is not None or not file.is_file():
            raise StageError(f"llm2rec.{stage} with {list(overrides)} ended {failure or 'without a run'}")
        return Path(file.read_text(encoding="utf-8")).resolve()


def _run_here(stage: str, overrides: Sequence[str], folder: Path, quiet: bool, file: Path) -> str | None:
    """Run a stage in this process; returns how it failed, if it raised no error of its own."""
    from llm2rec.process_state import state_restored  # imports torch
    from llm2rec.reporting import Failed

    with ExitStack() as stack:
        stack.enter_context(state_restored())
        out = stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if quiet else sys.stdout
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(out))
        os.chdir(folder)
        os.environ[FOLDER_FILE] = str(file)
        sys.argv = [f"llm2rec.{stage}", *overrides]
        try:
            import_module(f"llm2rec.{stage}.__main__").main()
        except Failed as failed:
            raise failed.error from failed.error.__cause__
        except SystemExit as ending:
            return f"with exit code {ending.code}" if ending.code else None
    return None


def _run_apart(stage: str, overrides: Sequence[str], folder: Path, quiet: bool, file: Path) -> str | None:
    """Run a stage in a process of its own; returns how it failed."""
    command, lines = [sys.executable, "-m", f"llm2rec.{stage}", *overrides], list[str]()
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
    if not process.returncode:
        return None
    return f"with exit code {process.returncode}; its last lines:\n" + "\n".join(lines[-5:])
