"""Kill every stage at random moments, resume it, and compare its results with those of a run that was not killed.

    .venv/bin/python -m pytest tests/integration/test_chaos.py -m slow --kills 9 --json benchmarks/results/chaos.json

The chain runs once without a kill, on a tiny generated dataset: data preparation, teacher (training, then export),
student, distillation, evaluation. Each kill then starts a stage in a copy of the folder it began in, sends SIGKILL to
its whole process group at a uniformly random moment of the whole run's duration, and gives the same command again with
`resume=<run>`; a process that was killed before it made a run folder is started again without.

What is no result is left out of the comparison: times (`metrics/time.json`, milliseconds per request), logs,
TensorBoard events, and which run, commit and overrides a file says it comes from.

Headline of the JSON file: ``kills``, how many processes were killed while they ran; ``lost``, after how many the
command could not be finished or a result was missing; ``unequal``, after how many a result differed (weights, rankings
and tables byte by byte, JSON files by their values); and ``kills_<part>``.
"""

import hashlib
import json
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import forked_stages
import pytest

TOY = ["dataset.n_users=60", "dataset.n_items=60", "dataset.n_worlds=5"]
STUDENT = ["student.training.epochs=8", "student.training.batch_size=37", "student.training.checkpoint_every_steps=5"]
OVERRIDES = {
    "data": TOY,
    "teacher": [
        *TOY,
        "llm.width=32",
        "teacher.training.epochs=2",
        "teacher.training.batch_size=36",
        "teacher.training.micro_batch_size=12",
        "teacher.training.checkpoint_every_steps=2",
        "teacher.export.block_rows=5",
    ],
    "student": [*TOY, *STUDENT],
    "distill": [*TOY, *STUDENT],
    "evaluate": TOY,
}
# What is killed, and the stage it belongs to.
PARTS = {"data": "data", "teacher": "teacher", "export": "teacher"} | {
    stage: stage for stage in ("student", "distill", "evaluate")
}
RESULTS = {
    "data": ["data/processed/*/**/*.arrow", "data/processed/*/*.json"],
    "teacher": ["data/teacher_outputs/**/*", "RUN/teacher/**/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "student": ["RUN/student/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "distill": ["RUN/student/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "evaluate": ["RUN/comparison.json", "RUN/comparison.png", "result/*/metrics/test*"],
}
PROVENANCE = {"run", "commit", "dirty", "git", "overrides", "milliseconds"}


@dataclass(frozen=True)
class WholeChain:
    """What the chain without a kill leaves, by stage.

    Attributes:
        folder: Where all of this lies; kills happen in its `work`, since some results name the language model's folder.
        before: Folders as they were when a stage began.
        spans: Seconds after the start in which a part runs.
        results: Hashes of the results, by their names.
    """

    folder: Path
    before: dict[str, Path]
    spans: dict[str, tuple[float, float]]
    results: dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The chain, run once without a kill, with a copy of the folder from before each stage."""
    folder = tmp_path_factory.mktemp("chaos")
    work, whole = folder / "work", WholeChain(folder, {}, {}, {})
    work.mkdir()
    for stage, overrides in OVERRIDES.items():
        whole.before[stage] = folder / f"before_{stage}"
        shutil.copytree(work, whole.before[stage])
        began, export = time.monotonic(), None
        process = forked_stages.start(work, stage, overrides, folder / "stderr.txt")
        while process.exitcode is None:
            process.join(0.01)
            if export is None and any(work.glob("result/*/export")):
                export = time.monotonic() - began
        seconds = time.monotonic() - began
        assert process.exitcode == 0, f"{stage} failed without a kill:\n{(folder / 'stderr.txt').read_text()}"
        whole.spans[stage] = (0.0, seconds)
        if export is not None:
            whole.spans.update({"teacher": (0.0, export), "export": (export, seconds)})
        whole.results[stage] = results(work, stage, new_run(work, whole.before[stage]))
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_killed_stage_ends_as_if_it_had_not_been_killed(part, kill, whole, record_property):
    stage, work, stderr = PARTS[part], whole.folder / "work", whole.folder / "stderr.txt"
    before, generator = whole.before[stage], random.Random(f"{part} {kill}")
    killed = False
    while not killed:  # a moment after the stage's end is drawn again
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        moment = generator.uniform(*whole.spans[part])
        process = forked_stages.start(work, stage, OVERRIDES[stage], stderr)
        process.join(moment)
        if process.exitcode is None:
            forked_stages.kill(process)
            killed = process.exitcode == -signal.SIGKILL
    run = new_run(work, before)
    left = state_of(run)
    resume = [] if run is None else [f"resume={run.relative_to(work)}"]
    code, lines = forked_stages.run(work, stage, [*OVERRIDES[stage], *resume], stderr)
    found, expected = results(work, stage, new_run(work, before)) if code == 0 else {}, whole.results[stage]
    lost = sorted(expected.keys() - found.keys())
    unequal = sorted(name for name in found if found[name] != expected.get(name))
    sample = {"part": part, "second": round(moment, 3), "left": left, "lost": lost, "unequal": unequal}
    record_property("kill", sample | {"span": whole.spans[part]})
    assert (lost, unequal) == ([], []), f"killed after {moment:.3f} s with {left}:\n" + "\n".join(lines)


def test_a_result_that_differs_or_is_missing_is_seen(tmp_path):
    run = tmp_path / "result" / "result_1"
    for name, text in (
        ("best.safetensors", "a"),
        ("metrics/validation.json", '{"best": 1, "run": "x"}'),
        ("student/config.json", "{}"),
        ("student/.hidden", "h"),
        ("log.txt", "l"),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    before = results(tmp_path, "student", run)
    names = {f"result/RUN/{name}" for name in ("best.safetensors", "metrics/validation.json", "student/config.json")}
    assert before.keys() == names
    (run / "metrics" / "validation.json").write_text('{"run": "y",  "best": 1}')
    assert results(tmp_path, "student", run) == before
    (run / "metrics" / "validation.json").write_text('{"best": 2}')
    (run / "best.safetensors").write_text("b")
    after = results(tmp_path, "student", run)
    assert {name for name in names if after[name] != before[name]} == names - {"result/RUN/student/config.json"}
    (run / "best.safetensors").unlink()
    assert results(tmp_path, "student", run).keys() == names - {"result/RUN/best.safetensors"}
    assert results(tmp_path, "student", None) == {}


def new_run(work, before):
    """The run folder that was not there before; None if there is none."""
    known = {run.name for run in before.glob("result/result_*")}
    return next((run for run in sorted(work.glob("result/result_*")) if run.name not in known), None)


def state_of(run):
    """How far a killed run had come, for the reader."""
    if run is None:
        return "no run folder"
    if not (run / "run.json").is_file():
        return "no run.json"
    if json.loads((run / "run.json").read_text())["status"] == "finished":
        return "finished"
    blocks, steps = len(list(run.glob("export/block_*"))), sorted(run.glob("checkpoints/step_*"))
    return f"{blocks} blocks" if blocks else steps[-1].name if steps else "no checkpoint"


def results(work, stage, run):
    """Hashes of a stage's results by name."""
    if run is None:
        return {}
    found = {}
    for pattern in RESULTS[stage]:
        for file in sorted(work.glob(pattern.replace("RUN", str(run.relative_to(work))))):
            name = str(file.relative_to(work)).replace(run.name, "RUN")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(work).parts):
                found[name] = hashlib.sha256(content(file)).hexdigest()
    return found


def content(file):
    """A file's bytes; of a JSON file its values, without provenance and durations."""
    if file.suffix != ".json":
        return file.read_bytes()
    return json.dumps(without_provenance(json.loads(file.read_text())), sort_keys=True).encode()


def without_provenance(value):
    if isinstance(value, dict):
        return {key: without_provenance(each) for key, each in value.items() if key not in PROVENANCE}
    return [without_provenance(each) for each in value] if isinstance(value, list) else value
