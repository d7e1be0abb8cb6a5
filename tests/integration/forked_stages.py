"""Stages in processes forked from a server that has imported everything: imports take longer than most stages."""

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from unittest import mock

import command_helpers

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "data",
    "student",
    "teacher",
    "distill",
    "ensemble",
    "evaluate",
    "recommend",
    "plan",
    "distill.export_dllm2rec",
)
LATE_IMPORTS = ("matplotlib.pyplot", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama")
SECONDS_AT_MOST = 300


@functools.cache
def _context():
    """The fork server's context; the server reads its environment once and has no threads that a fork would lose."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # the server imports this module, too
    environment = {**command_helpers.environment(), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver")
    with mock.patch.dict(os.environ, environment, clear=True):
        context.set_forkserver_preload([__name__, *LATE_IMPORTS, *(f"llm2rec.{stage}.__main__" for stage in STAGES)])
        multiprocessing.forkserver.ensure_running()
    return context


def start(folder, stage, overrides, stderr, stdout=os.devnull):
    """Start a stage in ``folder`` as ``python -m llm2rec.<stage>`` does, in a process group of its own.

    Args:
        folder: Its working directory.
        stage: Name of the stage's package.
        overrides: Its command line.
        stderr: File for its standard error stream.
        stdout: File for its standard output.

    Returns:
        The process, already started.
    """
    process = _context().Process(target=_become, args=(folder, stage, overrides, stderr, stdout), daemon=False)
    process.start()
    return process


def run(folder, stage, overrides, stderr, stdout=os.devnull):
    """Run a stage to its end; returns its exit status, negative for a signal, and the lines it wrote to ``stderr``."""
    process = start(folder, stage, overrides, stderr, stdout)
    process.join()
    lines = [line for line in stderr.read_text(errors="replace").splitlines() if line.strip()]
    return process.exitcode, lines


def kill(process):
    """Kill a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):  # too young to have a group
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _become(folder, stage, overrides, stderr, stdout):
    """Turn this forked process into the stage; never returns."""
    os.setsid()
    signal.alarm(SECONDS_AT_MOST)  # an input that is accepted must not run for ever
    os.chdir(folder)
    with open(stderr, "w", buffering=1, encoding="utf-8") as errors, open(stdout, "w", encoding="utf-8") as output:
        os.dup2(errors.fileno(), 2)
        os.dup2(output.fileno(), 1)
        sys.argv = [stage, *overrides]
        sys.modules.pop(f"llm2rec.{stage}.__main__", None)  # runpy warns of modules that are imported before they run
        code = 0
        try:
            runpy.run_module(f"llm2rec.{stage}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):  # as the interpreter does
                print(end.code, file=sys.stderr)  # noqa: T201
        except BaseException:
            traceback.print_exc()
            code = 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
