"""Kill every stage at random moments, resume it, and compare what it ends with with what an unkilled run ends with.

    python benchmarks/chaos.py --json benchmarks/results/chaos.json [--quick] [--kills N] [--seed S]

The chain runs once unkilled, on a tiny generated dataset: data preparation, teacher (training, then export), student,
distillation, evaluation. Each kill then starts a stage in a copy of the folder it began in, sends SIGKILL to its whole
process group at a uniformly random moment of the unkilled duration, and gives the same command again with
`resume=<run>`; a process that was killed before it made a run folder is started again as it was. Stages are forked from
a process that has imported all libraries and done nothing else: kills fall on their work, not on seconds of imports.

kills    how many processes were killed while they ran
lost     after how many the command could not be brought to its end, or a result was missing
unequal  after how many a result differed: weights, rankings and tables byte by byte, JSON files by their values

What is no result is left out: times (`metrics/time.json`, milliseconds an answer), logs, TensorBoard events, and
which run, commit and overrides a file says that it came from.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # read once by the libraries below; a fork takes no threads along, so there must be none
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import harness

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")
TOY = ["dataset.n_users=60", "dataset.n_items=60", "dataset.n_worlds=5"]
STUDENT = ["student.training.epochs=8", "student.training.batch_size=37", "student.training.checkpoint_every_steps=5"]
COMMANDS = {
    "data": ["data", *TOY],
    "teacher": [
        "teacher",
        *TOY,
        "llm.width=32",
        "teacher.training.epochs=2",
        "teacher.training.batch_size=36",
        "teacher.training.micro_batch_size=12",
        "teacher.training.checkpoint_every_steps=2",
        "teacher.export.block_rows=5",
    ],
    "student": ["student", *TOY, *STUDENT],
    "distill": ["distill", *TOY, *STUDENT],
    "evaluate": ["evaluate", *TOY],
}
PARTS = {"data": "data", "teacher": "teacher", "export": "teacher"} | {
    stage: stage for stage in ("student", "distill", "evaluate")
}
"""What is killed, and the command it belongs to."""
RESULTS = {
    "data": ["data/processed/*/**/*.arrow", "data/processed/*/*.json"],
    "teacher": ["data/teacher_outputs/**/*", "RUN/teacher/**/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "student": ["RUN/student/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "distill": ["RUN/student/*", "RUN/best.safetensors", "RUN/metrics/validation.json"],
    "evaluate": ["RUN/comparison.json", "RUN/comparison.png", "result/*/metrics/test*"],
}
ABOUT = {"run", "commit", "dirty", "git", "overrides", "milliseconds"}
SECONDS_AT_MOST = 600


@dataclass(frozen=True)
class Whole:
    """What the unkilled chain leaves, by stage.

    Attributes:
        before: Folders as they were when a stage began.
        spans: Seconds after the start in which a part runs.
        results: Hashes of the results, by their names.
    """

    before: dict[str, Path]
    spans: dict[str, tuple[float, float]]
    results: dict[str, dict[str, str]]


def main() -> None:
    """Kill and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="data preparation and student only, 2 kills")
    parser.add_argument("--kills", type=int, help="how many processes to kill; 50 by default")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="results are equal bit by bit on a CPU")
    options = parser.parse_args()
    parts = ["data", "student"] if options.quick else list(PARTS)
    n_kills = options.kills or (2 if options.quick else 50)

    import_all(sorted({PARTS[part] for part in parts}))
    generator, samples = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        whole = run_whole(Path(name), [stage for stage in COMMANDS if stage in parts])
        for part in itertools.islice(itertools.cycle(parts), n_kills):
            samples.append(kill_once(part, whole, generator, Path(name) / "work"))
            print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    headline = {
        "kills": len(samples),
        "lost": sum(bool(sample["lost"]) for sample in samples),
        "unequal": sum(bool(sample["unequal"]) for sample in samples),
        **{f"kills_{part}": count for part, count in collections.Counter(each["part"] for each in samples).items()},
    }
    harness.write_result(options, headline, {"spans": whole.spans, "kills": samples})


def run_whole(folder: Path, stages: list[str]) -> Whole:
    """Run the chain without a kill; keep a copy of the folder from before each stage."""
    # In the folder that kills happen in later: some results name the folder of the language model.
    work, whole = folder / "work", Whole({}, {}, {})
    work.mkdir()
    for stage in stages:
        whole.before[stage] = folder / f"before_{stage}"
        shutil.copytree(work, whole.before[stage])
        began, export = time.monotonic(), None
        process = start(work, COMMANDS[stage])
        while process.exitcode is None:
            process.join(0.01)
            if export is None and any(work.glob("result/*/export")):
                export = time.monotonic() - began
        seconds = time.monotonic() - began
        if process.exitcode != 0:
            raise SystemExit(f"{stage} failed without being killed:\n{(work / 'output.txt').read_text()}")
        whole.spans[stage] = (0.0, seconds)
        if export is not None:
            whole.spans.update({"teacher": (0.0, export), "export": (export, seconds)})
        whole.results[stage] = results(work, stage, new_run(work, whole.before[stage]))
    return whole


def kill_once(part: str, whole: Whole, generator: random.Random, work: Path) -> dict[str, Any]:
    """Kill a part of a stage once, resume it, and compare; moments that come after its end are drawn again."""
    stage = PARTS[part]
    before = whole.before[stage]
    killed = False
    while not killed:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work)
        moment = generator.uniform(*whole.spans[part])
        killed = start_and_kill(work, COMMANDS[stage], moment)
    run = new_run(work, before)
    left = state_of(work, run)
    resume = [] if run is None else [f"resume={run.relative_to(work)}"]
    process = start(work, [*COMMANDS[stage], *resume])
    process.join(SECONDS_AT_MOST)
    found = results(work, stage, new_run(work, before)) if process.exitcode == 0 else {}
    expected = whole.results[stage]
    return {
        "part": part,
        "second": round(moment, 3),
        "left": left,
        "lost": sorted(expected.keys() - found.keys()),
        "unequal": sorted(name for name in found if found[name] != expected.get(name)),
        "error": last_line(work) if process.exitcode != 0 else None,
    }


def start(work: Path, command: list[str]) -> Any:
    """Start a stage in a process group of its own."""
    process = FORK.Process(target=_run, args=(work, command))
    process.start()
    return process


def _run(work: Path, command: list[str]) -> None:
    os.setsid()
    os.chdir(work)
    handle = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [f"llm2rec.{command[0]}", *command[1:]]
    importlib.import_module(f"llm2rec.{command[0]}.__main__").main()


def import_all(stages: list[str]) -> None:
    """Import what the stages would, late imports included."""
    for name in ("matplotlib.pyplot", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for stage in stages:
        importlib.import_module(f"llm2rec.{stage}.__main__")


def start_and_kill(work: Path, command: list[str], moment: float) -> bool:
    """Start a stage and kill it and all it has started after ``moment`` seconds; False if it had ended by then."""
    process = start(work, command)
    process.join(moment)
    if process.exitcode is not None:
        return False
    with contextlib.suppress(ProcessLookupError):  # so young that it has no group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    return bool(process.exitcode == -signal.SIGKILL)


def new_run(work: Path, before: Path) -> Path | None:
    """The run folder that was not there before."""
    known = {run.name for run in before.glob("result/result_*")}
    return next((run for run in sorted(work.glob("result/result_*")) if run.name not in known), None)


def state_of(work: Path, run: Path | None) -> str:
    """How far a killed run had come, for the reader."""
    if run is None:
        return "no run folder"
    if not (run / "run.json").is_file():
        return "no run.json"
    if json.loads((run / "run.json").read_text())["status"] == "finished":
        return "finished"
    blocks, steps = len(list(run.glob("export/block_*"))), sorted(run.glob("checkpoints/step_*"))
    return f"{blocks} blocks" if blocks else steps[-1].name if steps else "no checkpoint"


def results(work: Path, stage: str, run: Path | None) -> dict[str, str]:
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


def content(file: Path) -> bytes:
    """A file's bytes; of a JSON file its values, without what tells where they come from and how long it took."""
    if file.suffix != ".json":
        return file.read_bytes()
    return json.dumps(_without(json.loads(file.read_text())), sort_keys=True).encode()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(each) for key, each in value.items() if key not in ABOUT}
    return [_without(each) for each in value] if isinstance(value, list) else value


def last_line(work: Path) -> str:
    """The last line that a command wrote, without this machine's folders."""
    lines = (work / "output.txt").read_text().strip().splitlines()
    return (lines or [""])[-1].replace(str(work), ".").replace(str(ROOT), ".")


if __name__ == "__main__":
    main()
