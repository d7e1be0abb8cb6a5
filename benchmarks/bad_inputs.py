"""What bad inputs get: whether every one of many ends in one clear error, with nothing of value lost.

    .venv/bin/python benchmarks/bad_inputs.py --json benchmarks/results/bad_inputs.json

A small workshop is made first: a toy dataset, a student, a teacher with its outputs, and a distilled student, all
finished. Each try (``bad_input_cases.py``) gets a copy of it, spoils something there, and runs the stage as
``python -m`` does, in a process of its own; processes are forked from one that has imported everything, since imports
take longer than refusals. A try is clear if

- the process exits with status 1,
- what it says holds one error, the last line, of a type in ``llm2rec.core.errors``, or it is Hydra's own message about
  an option or a file of the configuration, in at most 16 lines,
- that error names the value or the file,
- there is no traceback, and
- no file that was there before is changed or gone. What attempts append to a run's ``log.txt``, ``.hydra`` and
  ``metrics/time.json`` is not counted.

Headline: ``tried`` and ``unclear``. Samples: one row a try.
"""

import hashlib
import logging
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import bad_input_ways as ways
import harness
from bad_input_cases import DATA, STUDENTS, TEACHERS
from bad_input_later_cases import DISTILLED, OTHERS

from llm2rec.core import errors

STAGES = ("data", "student", "teacher", "distill", "evaluate", "recommend", "plan", "distill.export_dllm2rec")
TRIES = (*DATA, *STUDENTS, *TEACHERS, *DISTILLED, *OTHERS)
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120
LINES_OF_HYDRA = 16
OURS = tuple(name for name in errors.__all__ if name != "one_of")
_TYPED = re.compile(rf"^(?:\d\d:\d\d:\d\d )?(?:{'|'.join(OURS)}): ")
_STAMPED = re.compile(r"^\d\d:\d\d:\d\d ")
_ATTEMPTS = re.compile(r"(^|/)(log\.txt|\.hydra/[^/]*|metrics/time\.json)$")


@dataclass(frozen=True)
class Done:
    """What a stage left.

    Attributes:
        code: Exit status; negative for a signal.
        lines: What it wrote to the standard error stream.
        seconds: How long it took.
    """

    code: int
    lines: list[str]
    seconds: float


def main() -> None:
    """Make the workshop, try everything, write the JSON file."""
    parser = harness.command_line(__doc__, rounds=1)
    parser.add_argument("--only", help="tries whose name holds this; they are shown in full")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to try")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
    for stage in STAGES:
        import_module(f"llm2rec.{stage}.__main__")
    with tempfile.TemporaryDirectory() as base:
        # The same path for all copies, so that what a run remembers of its folder stays true.
        kept, folder = Path(base) / "kept", Path(base) / "workshop"
        folder.mkdir()
        for stage, overrides in ways.WORKSHOP:
            done = run(folder, stage, overrides)
            if done.code != 0:
                sys.exit(f"the workshop cannot be made: {stage} says\n" + "\n".join(done.lines))
            time.sleep(1.1)  # runs are named after the second they start in
        ways.finish_workshop(folder)
        folder.rename(kept)
        chosen = [
            each for each in TRIES if each.stage in options.stages and (not options.only or options.only in each.name)
        ]
        samples = [tried(each, kept, folder, show=bool(options.only)) for each in chosen[:: 10 if options.quick else 1]]
    unclear = sum(sample["why_unclear"] is not None for sample in samples)
    harness.write_result(options, {"tried": len(samples), "unclear": unclear}, samples)


def tried(each: ways.Try, kept: Path, folder: Path, show: bool) -> dict[str, Any]:
    """Try one bad input on a fresh copy of the workshop."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder, symlinks=True)
    each.spoil(folder)
    before = contents(folder)
    done = run(folder, each.stage, each.overrides)
    after = contents(folder)
    changed = sorted(name for name, value in before.items() if after.get(name) != value)
    why = why_unclear(done, each.names, changed)
    if show or why:
        print("\n".join([f"--- {each.name}: {why}", *done.lines]), flush=True)
    last = next((line for line in reversed(done.lines) if _TYPED.match(line)), " ".join(done.lines[:2]))
    return {
        "stage": each.stage,
        "input": each.name,
        "exit_code": done.code,
        "error": _STAMPED.sub("", last).replace(str(folder), ".").replace(str(ROOT), "<checkout>"),
        "seconds": round(done.seconds, 2),
        "why_unclear": why,
    }


def why_unclear(done: Done, names: str, changed: list[str]) -> str | None:
    """Say what is not clear about an error; None if all is."""
    typed = [line for line in done.lines if _TYPED.match(line)]
    if any(line.startswith("Traceback") for line in done.lines):
        return "there is a traceback"
    if done.code != 1:
        return f"the exit status is {done.code}"
    if changed:
        return f"changed: {', '.join(changed)}"
    if typed:
        if len(typed) > 1 or not _TYPED.match(done.lines[-1]):
            return "the error is not one last line"
        return None if names in typed[0] else f"the error does not name {names!r}"
    if len(done.lines) > LINES_OF_HYDRA or any(_STAMPED.match(line) for line in done.lines):
        return "there is no error of ours"
    return None if names in "\n".join(done.lines) else f"Hydra does not name {names!r}"


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but those that every attempt appends to, by path."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_file() and not _ATTEMPTS.search(name):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def run(folder: Path, stage: str, overrides: tuple[str, ...]) -> Done:
    """Run a stage in ``folder`` as ``python -m llm2rec.<stage>`` does."""
    start, said = time.perf_counter(), folder.parent / "said.txt"
    process = os.fork()
    if process == 0:
        _become(folder, stage, overrides, said)
    _, status = os.waitpid(process, 0)
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return Done(os.waitstatus_to_exitcode(status), lines, time.perf_counter() - start)


def _become(folder: Path, stage: str, overrides: tuple[str, ...], said: Path) -> None:
    """Turn this forked process into the stage; never returns."""
    signal.alarm(SECONDS)  # what goes on is not refused
    os.chdir(folder)
    with open(said, "w", buffering=1, encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [stage, *overrides]
        del sys.modules[f"llm2rec.{stage}.__main__"]  # runpy warns of modules that are there before they run
        code = 0
        try:
            runpy.run_module(f"llm2rec.{stage}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
