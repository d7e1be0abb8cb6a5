"""Every one of many bad inputs ends in one clear error, and changes nothing that was there before.

    .venv/bin/python -m pytest tests/integration/test_bad_inputs.py -m slow --json benchmarks/results/bad_inputs.json

A small workshop is made first: a toy dataset, a student, a teacher with its outputs, and a distilled student, all
finished. Each case (`bad_input_cases.py`, `bad_input_distill_cases.py`) gets a copy of it, spoils something there, and
runs a stage as ``python -m`` does. A case is clear if

- the process exits with status 1,
- its standard error ends with one error, the last line, of a type in ``llm2rec.core.errors``, or holds Hydra's own
  message about an option or a file of the configuration, in at most 16 lines,
- that error names the value or the file,
- there is no traceback, and
- no file that was there before is changed or gone. What attempts append to a run's ``log.txt``, ``.hydra`` and
  ``metrics/time.json`` is not counted.

Headline of the JSON file: ``tried`` and ``unclear``. Samples: one row a case.
"""

import hashlib
import re
import shutil
import time

import bad_input_workshop as workshops
import forked_stages
import pytest
from bad_input_cases import DATA, STUDENTS, TEACHERS
from bad_input_distill_cases import DISTILLED, OTHERS

from llm2rec.core import errors

CASES = (*DATA, *STUDENTS, *TEACHERS, *DISTILLED, *OTHERS)
LINES_OF_HYDRA = 16
OURS = tuple(name for name in errors.__all__ if name.endswith("Error"))
_TYPED = re.compile(rf"^(?:\d\d:\d\d:\d\d )?(?:{'|'.join(OURS)}): ")
_STAMPED = re.compile(r"^\d\d:\d\d:\d\d ")
_ATTEMPTS = re.compile(r"(^|/)(log\.txt|\.hydra/[^/]*|metrics/time\.json)$")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A workshop to copy from, and the folder where it was made: copies go there, since runs remember their folder."""
    base = tmp_path_factory.mktemp("bad_inputs")
    kept, folder = base / "kept", base / "workshop"
    folder.mkdir()
    for stage, overrides in workshops.WORKSHOP:
        code, lines = forked_stages.run(folder, stage, overrides, base / "stderr.txt")
        assert code == 0, f"{stage} failed in the workshop:\n" + "\n".join(lines)
        time.sleep(1.1)  # runs are named after the second they start in
    workshops.finish_workshop(folder)
    folder.rename(kept)
    return kept, folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.stage}: {case.name}")
def test_bad_input_ends_in_one_clear_error(case, workshop, record_property):
    kept, folder = workshop
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder, symlinks=True)
    case.spoil(folder)
    before, start = contents(folder), time.perf_counter()
    code, lines = forked_stages.run(folder, case.stage, case.overrides, folder.parent / "stderr.txt")
    seconds, after = time.perf_counter() - start, contents(folder)
    changed = sorted(name for name, value in before.items() if after.get(name) != value)
    why = why_unclear(code, lines, case.names, changed)
    error = next((line for line in reversed(lines) if _TYPED.match(line)), " ".join(lines[:2]))
    error = _STAMPED.sub("", error).replace(str(folder), ".").replace(str(forked_stages.ROOT), "<checkout>")
    sample = {"stage": case.stage, "input": case.name, "exit_code": code, "error": error}
    record_property("bad_input", {**sample, "seconds": round(seconds, 2), "why_unclear": why})
    assert why is None, "\n".join(lines)


def why_unclear(code, lines, names, changed):
    """What is not clear about an error; None if all is."""
    typed = [line for line in lines if _TYPED.match(line)]
    if any(line.startswith("Traceback") for line in lines):
        return "there is a traceback"
    if code != 1:
        return f"the exit status is {code}"
    if changed:
        return f"changed: {', '.join(changed)}"
    if typed:
        if len(typed) > 1 or not _TYPED.match(lines[-1]):
            return "the error is not one last line"
        return None if names in typed[0] else f"the error does not name {names!r}"
    if len(lines) > LINES_OF_HYDRA or any(_STAMPED.match(line) for line in lines):
        return "there is no error of ours"
    return None if names in "\n".join(lines) else f"Hydra does not name {names!r}"


def contents(folder):
    """Hashes of all files but those that every attempt appends to, by path."""
    found = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.is_file() and not _ATTEMPTS.search(name):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found
