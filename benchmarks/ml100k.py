"""The main job on real input: MovieLens 100K, a language model, SASRec and GRU4Rec, several seeds.

    .venv/bin/python benchmarks/ml100k.py --raw-dir FOLDER --llm-path FOLDER --json benchmarks/results/ml100k.json

Runs the stages as a user would, one after the other, and gathers their test metrics and seconds. Stages that have
finished in ``--work`` are not run again, so a killed run goes on where it stopped. ``--quick`` shows the same in about
a minute on generated data and a tiny random language model.
"""

import argparse
import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import existing, relative

from llm2rec.core.files import read_json, write_json
from llm2rec.core.git_info import git_state, library_versions

ROOT = Path(__file__).resolve().parents[1]

# Decided on validation, before the test split was opened. CPU means float32, and a subset of the rows for the teacher.
TEACHER = [
    "llm.prompt.max_items=4",
    "teacher.popularity_prior=1.0",
    "teacher.train_rows=10000",
    "teacher.training.epochs=1",
    "teacher.training.batch_size=64",
    "teacher.training.micro_batch_size=32",
    "teacher.training.learning_rate=2e-3",
    "teacher.training.evaluate_every_steps=79",
]
STUDENT = ["student.training.patience=5"]


def main() -> None:
    """Run the job and write the JSON file."""
    options = parse(__doc__)
    stages = Stages(options)
    plan = Plan(options)
    students = [
        [f"student={student}", f"seed={seed}", *plan.student] for seed in plan.seeds for student in plan.students
    ]
    stages.run("data", [])
    stages.run_many("student", students)
    first = f"seed={plan.seeds[0]}"
    untrained = ["teacher.name=untrained", "teacher.training.epochs=0", "teacher.export.enabled=false", first]
    stages.run("teacher", [*(each for each in plan.teacher if "epochs" not in each), *untrained])
    stages.run("teacher", [*plan.teacher, first])
    stages.run_many("distill", students)
    comparison = stages.evaluate()
    result = {
        "headline": headline(comparison["rows_scored"]),
        "samples": comparison,
        "stages": stages.records,
        "command": " ".join(["python", *map(relative, sys.argv)]),
        "commit": git_state(),
        "environment": {**library_versions(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
    }
    write_json(options.json, result)
    print(json.dumps(result["headline"], indent=2))


def command_line(description: str) -> argparse.ArgumentParser:
    """Give the options of a job that runs stages."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw-dir", type=existing, help="folder or zip with MovieLens 100K in GroupLens' layout")
    parser.add_argument("--llm-path", type=existing, help="folder with all-MiniLM-L6-v2")
    parser.add_argument("--json", required=True, type=Path, help="where to write the result")
    parser.add_argument("--work", default="result/ml100k", help="folder for data and runs; finished stages are kept")
    parser.add_argument("--jobs", type=int, default=1, help="students trained at once, each on its share of processors")
    parser.add_argument("--quick", action="store_true", help="generated data and a tiny model: about a minute")
    return parser


def parse(description: str) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(description)
    options = parser.parse_args()
    if not options.quick and not (options.raw_dir and options.llm_path):
        parser.error("--raw-dir and --llm-path are needed, or --quick")
    return options


class Plan:
    """What to run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.seeds = [1] if options.quick else [1, 2, 3]
        self.students = ["sasrec"] if options.quick else ["sasrec", "gru4rec"]
        self.teacher = ["teacher.training.epochs=1"] if options.quick else TEACHER
        self.student = ["student.training.epochs=5"] if options.quick else STUDENT


class Stages:
    """Runs stages in a folder of their own and remembers which have finished, with what and for how long.

    Args:
        options: The command line.
        common: Overrides of all stages; None for MovieLens and MiniLM, or for what ``--quick`` has in their place.
        paths: The same, with places on this machine, which are not remembered.
    """

    def __init__(
        self, options: argparse.Namespace, common: list[str] | None = None, paths: list[str] | None = None
    ) -> None:
        self.folder = Path(options.work).resolve() / ("quick" if options.quick else "full")
        self.folder.mkdir(parents=True, exist_ok=True)
        if common is None:
            common = ["dataset=toy", "llm=tiny_random"] if options.quick else ["dataset=movielens", "llm=minilm"]
        if paths is None and not options.quick:
            paths = [f"dataset.raw_dir={Path(options.raw_dir).resolve()}"]
            paths.append(f"llm.path={Path(options.llm_path).resolve()}")
        self.common, self.paths = common, paths or []
        self.jobs = options.jobs
        self.log = self.folder / "finished.json"
        self.records: list[dict[str, Any]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what has finished by now: another process may work in this folder too, on other runs."""
        self.records = read_json(self.log) if self.log.is_file() else []

    def run_many(self, stage: str, many: list[list[str]]) -> None:
        """Run a stage with several sets of overrides, as many at once as asked for."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda overrides: self.run(stage, overrides, self.jobs), many))

    def run(self, stage: str, overrides: list[str], at_once: int = 1) -> None:
        """Run one stage unless it has finished before; it gets its share of OMP_NUM_THREADS, or of the processors."""
        overrides = [*self.common, *overrides]
        self.refresh()
        if any(record["stage"] == stage and record["overrides"] == overrides for record in self.records):
            return
        print(f">>> llm2rec.{stage} {' '.join(overrides)}", flush=True)
        threads = str(max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // at_once))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-m", f"llm2rec.{stage}", *overrides, *self.paths, *self.begun(stage, overrides)]
        done = subprocess.run(command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        match = re.search(r"result/result_\d{8}_\d{6}", done.stderr)
        assert match, f"the stage logged no run folder:\n{done.stderr}"
        run = self.folder / match[0]
        record = {
            "stage": stage,
            "overrides": overrides,
            "run": run.name,
            "threads": int(threads),
            "seconds": read_json(run / "metrics" / "time.json"),
            "git": read_json(run / "run.json")["git"],
        }
        with open(self.log.with_suffix(".lock"), "w") as lock:  # released when it is closed
            fcntl.flock(lock, fcntl.LOCK_EX)  # against this study's other threads, and other studies in this folder
            self.refresh()
            self.records.append(record)
            write_json(self.log, self.records)

    def begun(self, stage: str, overrides: list[str]) -> list[str]:
        """What makes a stage go on where it was killed: nothing where it has not begun, or has no checkpoints."""
        for file in sorted((self.folder / "result").glob("result_*/run.json"), reverse=True):
            record = read_json(file)
            if record["stage"] == stage != "data" and record.get("overrides") == [*overrides, *self.paths]:
                return [f"resume=result/{file.parent.name}"]
        return []

    def evaluate(self) -> dict[str, Any]:
        """Score all finished runs on the test split."""
        runs = [
            f"result/{record['run']}" for record in self.records if record["stage"] in ("student", "teacher", "distill")
        ]
        self.run("evaluate", [f"runs=[{','.join(runs)}]"])
        folder = next(record["run"] for record in self.records if record["stage"] == "evaluate")
        return read_json(self.folder / "result" / folder / "comparison.json")


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over seeds of NDCG@10 and HR@10 for each label."""
    by_label: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["metrics"])
    return {
        f"{label} {name}": statistics.mean(metrics[name] for metrics in all_metrics)
        for label, all_metrics in by_label.items()
        for name in ("ndcg@10", "hr@10")
    }


if __name__ == "__main__":
    main()
