r"""Seconds of a distillation epoch on MovieLens 100K: ours, and the released DLLM2Rec program's in the same minutes.

    .venv/bin/python benchmarks/distill_epoch.py --raw-dir ML-100K --released-program CLONE \
        --json benchmarks/results/distill_epoch.json

CLONE is a checkout of github.com/istarryn/DLLM2Rec, whose main.py runs unchanged on what our export command writes for
it. Both sides train SASRec (one block, one head, width 64, histories of 10, batch 256) on the program's objective: BCE,
DROS and ranking distillation of 10 candidates and embedding distillation from vectors of width 4096; and, as the plain
epoch, on BCE alone. Ours encodes one history per row, as the program does (`windows`), or one segment of a sequence for
many rows, with as many rows per step (`sequences`, whose positions count from the oldest). The teacher outputs are
random, which changes no time. The sides take turns, round after round. Ours is timed from the first batch to the last
optimizer step; the program prints its seconds for the same.

Headline: ``seconds_plain_epoch`` and ``seconds_distil_epoch`` (ours, `windows`), ``rows``, and the median of each side.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import command_line, existing, spread, write_result
from student_vs_recbole import prepared

from llm2rec.core.files import read_json
from llm2rec.data import RecData

ROOT = Path(__file__).resolve().parents[1]
TOP_K, TEACHER_WIDTH = 10, 4096

OURS = {
    "plain": ("llm2rec.student", ["student.loss.name=bce", "student.model.tie_items=false"]),
    "distil": ("llm2rec.distill", ["distill=dllm2rec_code"]),
}
EXAMPLES = {
    "windows": [],
    "sequences": ["student.examples=sequences", "student.model.positions=oldest"],
}
STUDENT = [
    *("student=sasrec", "student.model.width=64", "student.model.n_blocks=1", "student.model.n_heads=1"),
    *("student.model.dropout=0.1", "student.training.batch_size=256", "student.training.micro_batch_size=256"),
    *("student.training.learning_rate=1e-3", "logging.progress=false", "logging.tensorboard=false"),
]
RELEASED = {
    "plain": ["--alpha", "0", "--lam", "0", "--ed_weight", "0"],
    "distil": ["--alpha", "0.5", "--lam", "0.7", "--ed_weight", "0.3"],  # of its README
}


def main() -> None:
    """Time both sides and write the JSON file."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        seconds: dict[str, list[float]] = {}
        for number in range(options.rounds):
            for name, run in bench.sides(first=number):
                seconds.setdefault(name, []).append(run())
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    headline: dict[str, Any] = {name: statistics.median(each) for name, each in seconds.items()}
    headline |= {f"seconds_{kind}_epoch": headline[f"windows {kind}"] for kind in OURS}
    headline["rows"] = len(bench.data.splits["train"])
    for kind in RELEASED if options.released_program else ():
        for examples in EXAMPLES:
            speedup = ratio(seconds[f"released {kind}"], seconds[f"{examples} {kind}"])
            headline[f"{examples} {kind}: speedup"] = speedup
    about = {"released_program": options.released_commit, "threads": options.threads}
    write_result(options, headline, {"seconds": seconds, **about})


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of the ratios taken round by round."""
    return spread(theirs, ours)["median"] if len(ours) > 1 else theirs[0] / ours[0]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--raw-dir", type=existing, help="folder or zip with MovieLens 100K in GroupLens' layout")
    parser.add_argument(
        "--released-program", type=existing, help="checkout of DLLM2Rec; without it ours alone is timed"
    )
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each of our runs; their median counts")
    options = parser.parse_args()
    if not options.quick and not options.raw_dir:
        parser.error("--raw-dir is needed, or --quick")
    if options.released_program and not (options.released_program / "main.py").is_file():
        parser.error(f"--released-program {options.released_program} has no main.py; pass a checkout of DLLM2Rec")
    options.released_commit = released_commit(options.released_program)
    options.device, options.threads = "cpu", options.threads or os.cpu_count()
    options.rounds = 1 if options.quick else options.rounds
    return options


def released_commit(folder: Path | None) -> str | None:
    """Commit of the released program; None without one, or where its folder has no git history of its own."""
    if folder is None or not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


class Bench:
    """Runs the sides on one dataset and one teacher's outputs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        raw = () if options.quick else (f"dataset.raw_dir={Path(options.raw_dir).resolve()}",)
        self.dataset = ("dataset=toy" if options.quick else "dataset=movielens", *raw, "dataset.history_length=10")
        self.data: RecData = prepared(self.dataset, folder)
        write_teacher(self.data, folder / "teacher")
        if options.released_program:
            self._launch(["-m", "llm2rec.distill.export_dllm2rec", "distill=dllm2rec_code", *self._settings()])

    def sides(self, first: int) -> list[tuple[str, Any]]:
        """What is timed, by name, beginning with another one each round."""
        found = [
            (f"{examples} {kind}", lambda kind=kind, examples=examples: self.ours(kind, examples))
            for kind in OURS
            for examples in EXAMPLES
        ]
        if self.options.released_program:
            found += [(f"released {kind}", lambda kind=kind: self.released(kind)) for kind in RELEASED]
        first %= len(found)
        return found[first:] + found[:first]

    def ours(self, kind: str, examples: str) -> float:
        """Median seconds of our epochs."""
        stage, overrides = OURS[kind]
        epochs = self.options.epochs
        limits = [f"student.training.epochs={epochs}", f"student.training.patience={epochs}"]
        out = self.folder / "history.json"
        script = str(ROOT / "benchmarks" / "stage_clock.py")
        self._launch([script, str(out), stage, *STUDENT, *EXAMPLES[examples], *limits, *self._settings(), *overrides])
        return statistics.median(each["pass_seconds"] for each in read_json(out))

    def released(self, kind: str) -> float:
        """Seconds of the released program's epoch, as it prints them."""
        program = self.options.released_program.resolve() / "main.py"
        arguments = ["--data", self.data.name, "--epoch", "1", *RELEASED[kind]]
        printed = self._launch([str(program), *arguments], self.folder / "data" / "dllm2rec")
        return float(re.findall(r"train this epoch cost ([0-9.]+) s", printed)[-1])

    def _settings(self) -> list[str]:
        return [*self.dataset, f"distill.teacher_outputs={self.folder / 'teacher'}", f"paths.root={self.folder}"]

    def _launch(self, arguments: list[str], cwd: Path | None = None) -> str:
        threads = str(self.options.threads)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        run = subprocess.run(
            [sys.executable, *arguments], cwd=cwd or self.folder, env=environment, capture_output=True, text=True
        )
        if run.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{(run.stdout + run.stderr)[-4000:]}")
        return run.stdout


def write_teacher(data: RecData, folder: Path) -> None:
    """Write random teacher outputs as the released program does, without a manifest."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), len(data.splits["train"])
    ranking = rng.random((rows, data.n_items), np.float32).argpartition(TOP_K, axis=1)[:, :TOP_K]
    np.savetxt(folder / "myrank_train.txt", ranking, fmt="%d")
    np.savetxt(folder / "confidence_train.txt", np.sort(rng.random((rows, TOP_K)), axis=1), fmt="%.6f")
    torch.save(
        torch.from_numpy(rng.normal(size=(data.n_items, TEACHER_WIDTH)).astype(np.float32)),
        folder / "all_embeddings.pt",
    )


if __name__ == "__main__":
    main()
