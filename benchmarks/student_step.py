"""A student's pass over its training rows and its evaluation, beside what the machine could do: floor and profile.

    .venv/bin/python benchmarks/student_step.py --raw-dir ML-100K --json benchmarks/results/student_step.json

A SASRec of our defaults (one block, width 64, two heads, batches of 512 rows) with histories of up to 50 items; the toy
data with ``--quick``. Three ways to take the same rows, in turn, round after round:

    plain      a window of history for each row, logits of the whole catalogue, AdamW as torch takes it by default
    windows    the same through `Engine`: cross-entropy in tiles, fused AdamW
    sequences  the same with pieces of sequences, whose causal pass answers a row at each item

``floor`` is the multiplications and additions that a step does (as torch counts them), one exponential for each logit,
and the bytes of weights, gradients and averages that AdamW touches, each at the rate that this process measures
beforehand; a share is floor over time. The profile shows the share of each operation in a step's time, in percent.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from llm2rec.core.run import Run
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import train_step
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import MovieLens100K, RecData, Toy, prepare
from llm2rec.student.datamodule import Rows
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import SequentialRecommender, build_model
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import LossSettings
from llm2rec.student.trainer_baseline import TaskObjective

WIDTH, LENGTH, ROWS = 64, 50, 512
UPDATE_BYTES = 28  # AdamW reads weight, gradient and two averages, and writes all but the gradient
VARIANTS = ("plain", "windows", "sequences")


class Variant:
    """One way to train: a step at a time, always the next rows of an epoch.

    Args:
        name: One of `VARIANTS`.
        data: Prepared data.
        folder: For the engine's files.
    """

    def __init__(self, name: str, data: RecData, folder: Path) -> None:
        self.name = name
        training = TrainingSettings(epochs=10**6, batch_size=ROWS, micro_batch_size=ROWS, learning_rate=2e-3)
        self.engine = Engine(Run(folder / name, "student", {}), seed=0, training=training, tensorboard=False)
        positions = "oldest" if name == "sequences" else "recent"
        self.model = build_model(
            "sasrec", n_items=data.n_items, width=WIDTH, max_length=LENGTH, positions=positions
        ).train()
        self.train = Rows.of(data, "train", LENGTH, "windows" if name == "plain" else name)
        validation = Rows.of(data, "validation", LENGTH)
        self.objective = TaskObjective(self.model, self.train, validation, self.engine, LossSettings())
        if name == "plain":
            self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        else:
            self.wrapped, self.optimizer = self.engine.prepare(self.model, student_optimizer(self.model, self.engine))
        self.steps = self.engine.steps(self.objective.units)
        self.parameters = sum(each.numel() for each in self.model.parameters())

    def step(self) -> int:
        """Take a step; returns its rows."""
        step = next(self.steps)
        if self.name == "plain":
            self.plain_step(step)
        else:
            train_step(self.wrapped, self.objective, self.engine, self.optimizer, step, 10**6)
        return step.n_rows

    def plain_step(self, step: OptimizerStep) -> None:
        """The textbook step."""
        batch = self.train.batch(step.units)
        self.optimizer.zero_grad()
        cross_entropy(self.model.score(self.model(*batch.inputs)), batch.targets.long()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.engine.training.max_grad_norm)
        self.optimizer.step()


def evaluation(model: SequentialRecommender, rows: Rows, engine: Engine) -> None:
    """Rank the targets of all validation rows; the model is left as it was."""
    rank_targets(model.eval(), rows, engine)
    model.train()


def flops(step: Callable[[], object]) -> int:
    """Multiplications and additions of a step's products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def busiest(step: Callable[[], object], n_steps: int) -> dict[str, float]:
    """Percent of the time in the ten busiest operations, each without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(n_steps):
            step()
    operations = sorted(found.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in operations)
    return {each.key: round(100 * each.self_cpu_time_total / total, 1) for each in operations[:10]}


def measure(data: RecData, options: Any, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Headline and samples."""
    variants = {name: Variant(name, data, folder) for name in VARIANTS}
    n_rows = len(data.splits["train"])
    ranked = variants["windows"]
    validation = Rows.of(data, "validation", LENGTH)
    steps: dict[str, Callable[[], object]] = {name: each.step for name, each in variants.items()}
    steps["evaluation"] = partial(evaluation, ranked.model, validation, ranked.engine)
    seconds = harness.seconds_by_round(steps, options.rounds, warm_up=3)
    product, exponential, byte = harness.floor_rates(WIDTH)
    headline, floors = dict[str, float](), dict[str, Any]()
    for name in steps:
        trained = name != "evaluation"
        counted = max(flops(steps[name]) for _ in range(2))  # the last step of a pass has fewer rows
        floor = {
            "products": counted * product,
            "exponentials": ROWS * data.n_items * exponential if trained else 0.0,
            "optimizer": UPDATE_BYTES * variants[name].parameters * byte if trained else 0.0,
        }
        least, middle = sum(floor.values()), float(np.median(seconds[name]))
        floors[name] = {"floor_seconds": floor, "flops": counted, "seconds": middle}
        headline[f"{name}_share_of_floor"] = least / middle
        if trained:
            headline[f"{name}_pass_seconds"] = middle * n_rows / ROWS
    headline["sequences_vs_plain"] = harness.spread(seconds["plain"], seconds["sequences"])["median"]
    headline["windows_vs_plain"] = harness.spread(seconds["plain"], seconds["windows"])["median"]
    profiles = {name: busiest(steps[name], 3 if options.quick else 20) for name in VARIANTS}
    rates = {"flops_per_second": 1 / product, "exponentials_per_second": 1 / exponential, "bytes_per_second": 1 / byte}
    return headline, {"rates": rates, "floors": floors, "profiles": profiles, "seconds": seconds}


def main() -> None:
    """Measure, write what came out."""
    parser = harness.command_line(__doc__ or "", rounds=100)
    parser.add_argument(
        "--raw-dir", type=harness.existing, help="folder or zip with MovieLens 100K in GroupLens' layout"
    )
    options = parser.parse_args()
    if not (options.raw_dir or options.quick):
        parser.error("--raw-dir is needed, or --quick")
    options.device, options.rounds = "cpu", 5 if options.quick else options.rounds
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        spec = (
            MovieLens100K(history_length=LENGTH, raw_dir=options.raw_dir)
            if options.raw_dir
            else Toy(history_length=LENGTH)
        )
        headline, samples = measure(prepare(spec, Path(folder) / "processed"), options, Path(folder))
    harness.write_result(options, headline, samples)


if __name__ == "__main__":
    main()
