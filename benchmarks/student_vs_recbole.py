r"""Our students against RecBole's: same interactions, split, architecture and settings; quality beside time.

    .venv/bin/python benchmarks/student_vs_recbole.py --recbole-python VENV/bin/python \
        --raw-dir ML-100K --games-dir AMAZON-GAMES --work FOLDER --json benchmarks/results/student_vs_recbole.json

RecBole is no dependency: it runs in an environment of its own, made once with Python 3.11 or newer by

    pip install torch pyyaml tqdm colorlog==4.7.2 colorama==0.4.4 "numpy<2" "scipy<1.12" "pandas<2.2" scikit-learn \
        tensorboard thop tabulate plotly texttable psutil && pip install --no-deps recbole==1.2.1

Training to the best validation score takes hours and its quality does not depend on what else the machine does, so that
it is kept in ``--work`` and not done again: ``--pieces quality`` does no more than that. Seconds are measured by short
runs that alternate between the sides, round after round, on a machine that should be quiet: ``--pieces timing`` does
those and takes the qualities that are there. Seconds to the best are epochs to the best, times the median seconds of a
pass and of an evaluation. RecBole reads its data from a file written from our prepared dataset; every one of its runs
gives back the rows it trained, validated and tested on, and the script stops unless they are ours, in our order.
Metrics of both sides are computed from ranks by our code, RecBole's own number is reported beside it.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import command_line, existing, spread, write_result
from hydra import compose, initialize_config_dir

from llm2rec.config import register
from llm2rec.core.files import read_json, write_json
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.paths import conf_folder
from llm2rec.data import DatasetSpec, RecData, prepare
from llm2rec.stage import build
from llm2rec.student.datamodule import Rows

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
MEASURED = ("pass_seconds", "evaluation_seconds")

RECBOLE_MODEL = {"sasrec": "SASRec", "gru4rec": "GRU4Rec"}


def sasrec(n_blocks: int, dropout: float, learning_rate: float, batch_size: int) -> tuple[dict[str, Any], list[str]]:
    """Settings of a SASRec of width 64 with two heads, in RecBole's words and in ours (4 x 64 inside)."""
    theirs = {"n_layers": n_blocks, "n_heads": 2, "hidden_size": 64, "inner_size": 256}
    theirs |= {"hidden_dropout_prob": dropout, "attn_dropout_prob": dropout}
    ours = ["model.width=64", f"model.n_blocks={n_blocks}", "model.n_heads=2", f"model.dropout={dropout}"]
    return trained_with(theirs, ours, learning_rate, batch_size)


def trained_with(
    theirs: dict[str, Any], ours: list[str], learning_rate: float, batch_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Add how a model is trained, on both sides."""
    rows = [f"training.{each}={batch_size}" for each in ("batch_size", "micro_batch_size")]
    theirs = {**theirs, "learning_rate": learning_rate, "train_batch_size": batch_size}
    return theirs, [*ours, f"training.learning_rate={learning_rate}", *rows]


# Overrides of both sides: our defaults, which were chosen on validation, and RecBole's defaults at a batch of 256.
GRU = {"num_layers": 1, "embedding_size": 64, "hidden_size": 128, "dropout_prob": 0.3}
OUR_GRU = ["model.width=64", "model.n_layers=1", "model.hidden_width=128", "model.dropout=0.3"]
SETTINGS: dict[str, tuple[str, tuple[dict[str, Any], list[str]]]] = {
    "sasrec": ("sasrec", sasrec(1, 0.2, 2e-3, 512)),
    "sasrec of RecBole's settings": ("sasrec", sasrec(2, 0.5, 1e-3, 256)),
    "gru4rec": ("gru4rec", trained_with(GRU, OUR_GRU, 1e-3, 256)),
}
# RecBole reads a window of history for every row, as `windows` does; `sequences` answers the same rows by fewer passes.
VARIANTS = {"sequences": ["examples=sequences"], "windows": ["examples=windows"]}
POSITIONS = {"sasrec": {"sequences": ["model.positions=oldest"]}}
# Seeds trained to their best, by settings; a pass of RecBole's takes minutes.
ML100K_SEEDS = {"sasrec": (1, 2, 3), "sasrec of RecBole's settings": (1,), "gru4rec": (1,)}
HEADLINE_CASE, HEADLINE_VARIANT = "ml100k sasrec", "sequences"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: Begins the names of its headline numbers.
        dataset: Overrides that choose the data.
        model: Name of the student.
        seeds: Seeds trained to their best.
        epochs: Epochs at most.
        patience: Epochs without a better validation score after which both sides stop.
        timed_epochs: Epochs of each timed run.
        recbole: RecBole's settings of the model, its batch size and learning rate.
        variants: Ours.
    """

    name: str
    dataset: tuple[str, ...]
    model: str
    seeds: tuple[int, ...]
    epochs: int
    patience: int
    timed_epochs: int
    recbole: Mapping[str, Any]
    variants: Mapping[str, list[str]]


def cases(options: argparse.Namespace) -> list[Case]:
    """What to compare."""
    if options.quick:
        toy = ("dataset=toy", "dataset.history_length=10")
        return [case("toy sasrec", toy, "sasrec", seeds=(1,), epochs=4, patience=2, timed_epochs=2)]
    length, chosen = "dataset.history_length=50", []
    if options.raw_dir:
        dataset = ("dataset=movielens", f"dataset.raw_dir={Path(options.raw_dir).resolve()}", length)
        chosen += [("ml100k", dataset, settings, seeds, 2) for settings, seeds in ML100K_SEEDS.items()]
    if options.games_dir:
        files = {name: Path(options.games_dir).resolve() / f"{name}.csv" for name in ("interactions", "items")}
        dataset = ("dataset=csv", "dataset.name=games", *(f"dataset.{k}={file}" for k, file in files.items()), length)
        chosen += [("games", dataset, settings, (), 1) for settings in ("sasrec", "gru4rec")]
    return [
        case(f"{name} {settings}", dataset, settings, seeds=seeds, timed_epochs=timed_epochs)
        for name, dataset, settings, seeds, timed_epochs in chosen
        if not options.only or f"{name} {settings}" in options.only
    ]


def case(
    name: str,
    dataset: tuple[str, ...],
    settings: str,
    *,
    seeds: tuple[int, ...],
    epochs: int = 300,
    patience: int = 5,
    timed_epochs: int,
) -> Case:
    """Make a case of `SETTINGS`; see `Case`."""
    model, (recbole, ours) = SETTINGS[settings]
    variants = {
        name: [f"student.{each}" for each in (*ours, *examples, *POSITIONS.get(model, {}).get(name, []))]
        for name, examples in VARIANTS.items()
    }
    return Case(name, dataset, model, seeds, epochs, patience, timed_epochs, recbole, variants)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__, rounds=3)
    parser.add_argument(
        "--recbole-python", required=True, type=existing, help="the Python of the environment with RecBole"
    )
    parser.add_argument("--raw-dir", type=existing, help="folder or zip with MovieLens 100K in GroupLens' layout")
    parser.add_argument("--games-dir", type=existing, help="folder with interactions.csv and items.csv of Amazon games")
    parser.add_argument("--work", default="result/student_vs_recbole", help="folder for data and what has been trained")
    parser.add_argument("--pieces", default="all", choices=("all", "quality", "timing"), help="see above")
    parser.add_argument("--only", action="append", metavar="CASE", help='such as "ml100k sasrec"; may be repeated')
    options = parser.parse_args()
    if not options.quick and not (options.raw_dir or options.games_dir):
        parser.error("--raw-dir or --games-dir is needed, or --quick")
    if subprocess.run([options.recbole_python, "-c", "import recbole"], capture_output=True).returncode != 0:
        parser.error(f"--recbole-python {options.recbole_python} cannot import recbole")
    options.device, options.threads = "cpu", options.threads or os.cpu_count()
    return options


def main() -> None:
    """Run the comparison and write the JSON file."""
    options = parse()
    torch.set_num_threads(options.threads)  # reported in the result; other processes do the work
    rounds = 2 if options.quick else options.rounds
    headline, samples = {}, {}
    for each in cases(options):
        bench = Bench(each, options, prepared(each.dataset, Path(options.work).resolve()))
        quality = bench.quality(train=options.pieces != "timing")
        timing = {} if options.pieces == "quality" else bench.timing(rounds)
        numbers = case_headline(timing, quality)
        headline |= {f"{each.name} {variant}: {k}": v for (variant, k), v in numbers.items()}
        if each.name == HEADLINE_CASE or options.quick:
            headline |= {k: v for (variant, k), v in numbers.items() if variant == HEADLINE_VARIANT}
        samples[each.name] = {**bench.about(), "quality": quality, "timing": timing}
        write_result(options, headline, samples)  # after each case, for whoever cannot wait for the last


# Data ----------------------------------------------------------------------------------------------------------------


def prepared(overrides: tuple[str, ...], folder: Path) -> RecData:
    """Prepare a dataset as the student stage will."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, f"paths.root={folder}"])
    return prepare(build(cfg.dataset, DatasetSpec), folder / "processed")


def write_atomic_file(data: RecData, folder: Path) -> Path:
    """Write all interactions in RecBole's form, ``<folder>/<name>/<name>.inter``, in our order.

    Ids are ours plus one, since RecBole's file may hold any token but its own padding is 0, and the time is the
    position in the user's sequence: equal times cannot be ordered otherwise than here.
    """
    lists = data.sequences.with_format("arrow")[:].column("items").combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    users = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(users)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    file = folder / data.name / f"{data.name}.inter"
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = np.column_stack([users + 1, lists.values.to_numpy() + 1, positions])
    header = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(file, columns, fmt="%d", delimiter="\t", header=header, comments="")
    return file


def our_rows(data: RecData) -> dict[str, np.ndarray]:
    """Users, targets, lengths and histories of every split, in the form and the ids of the file RecBole reads."""
    rows = {}
    for name, split in data.splits.items():
        own = Rows.of(data, name)
        history, lengths = own.histories()
        padded = history + 1
        rows[f"{name}_users"] = split.with_format("numpy")["user_index"][:].astype(np.int32) + 1
        rows[f"{name}_targets"] = own.targets.numpy() + 1
        rows[f"{name}_lengths"] = lengths
        rows[f"{name}_history"] = np.where(padded > data.n_items, 0, padded)
    return rows


def check_rows(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    """Stop unless both sides train, validate and test on the same rows in the same order.

    Raises:
        SystemExit: Naming what differs.
    """
    for name, mine in ours.items():
        other = theirs[name]
        if mine.shape != other.shape:
            raise SystemExit(f"RecBole's {name} have shape {other.shape}, ours {mine.shape}")
        if not np.array_equal(mine, other):
            row = int(np.argmax((mine != other).reshape(len(mine), -1).any(axis=1)))
            raise SystemExit(f"RecBole's {name} differ from ours, first in row {row}: {other[row]} for {mine[row]}")


# Runs ----------------------------------------------------------------------------------------------------------------


class Bench:
    """Runs both sides of one case."""

    def __init__(self, case: Case, options: argparse.Namespace, data: RecData) -> None:
        self.case, self.options, self.data = case, options, data
        self.work = Path(options.work).resolve()
        self.rows = our_rows(self.data)
        self.atomic = self.work / "atomic" / self.data.fingerprint[:12]
        write_atomic_file(self.data, self.atomic)

    @property
    def sides(self) -> list[str]:
        """RecBole, then ours."""
        return ["recbole", *self.case.variants]

    def about(self) -> dict[str, Any]:
        """What is compared."""
        return {
            "fingerprint": self.data.fingerprint,
            "n_items": self.data.n_items,
            "rows": {name: len(split) for name, split in self.data.splits.items()},
            "recbole": dict(self.case.recbole),
            "ours": dict(self.case.variants),
            "epochs": self.case.epochs,
            "patience": self.case.patience,
        }

    def job(self, side: str, seed: int, epochs: int, patience: int) -> dict[str, Any]:
        """Settings of a side, without paths."""
        case = self.case
        common = {"side": side, "fingerprint": self.data.fingerprint, "seed": seed}
        if side == "recbole":
            recbole = {"model": RECBOLE_MODEL[case.model], "max_length": self.data.history_length}
            return common | recbole | {"epochs": epochs, "patience": patience, "settings": dict(case.recbole)}
        limits = [f"student.training.epochs={epochs}", f"student.training.patience={patience}", f"seed={seed}"]
        ranked = "metrics.mask_seen=false"  # RecBole ranks the items of a history too
        return common | {"overrides": [f"student={case.model}", *case.variants[side], *limits, ranked]}

    def run(self, job: dict[str, Any], out: Path) -> dict[str, Any]:
        """Run a side in a process of its own and check what it gives back.

        RecBole's side goes on where it was killed, from what lies in ``out``; ours is fast enough to begin again.
        """
        out.mkdir(parents=True, exist_ok=True)
        full = {**job, "out": str(out)}
        if job["side"] == "recbole":
            python, script = self.options.recbole_python, "recbole_side.py"
            full |= {"data_path": str(self.atomic), "dataset": self.data.name}
        else:
            python, script = sys.executable, "our_side.py"
            places = [f"paths.processed_dir={self.work / 'processed'}", "logging.progress=false"]
            full |= {"prepared": str(self.data.folder), "overrides": [*self.case.dataset, *job["overrides"], *places]}
        write_json(out / "job.json", full)
        print(f">>> {self.case.name}, {job['side']}, seed {job['seed']}", flush=True)
        threads = str(self.options.threads)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with open(out / "log.txt", "a") as log:
            command = [str(python), str(HERE / script), str(out / "job.json")]
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{(out / 'log.txt').read_text()[-4000:]}")
        result = read_json(out / "result.json")
        if result["n_items"] != self.data.n_items or len(result["test_ranks"]) != len(self.data.splits["test"]):
            raise SystemExit(f"{job['side']} ranked {len(result['test_ranks'])} rows among {result['n_items']} items")
        if job["side"] == "recbole":
            with np.load(out / "rows.npz") as theirs:
                check_rows(self.rows, theirs)
            (out / "rows.npz").unlink()
        return result

    def quality(self, train: bool) -> dict[str, list[dict[str, Any]]]:
        """Runs to the best of each side, one a seed; see `trained`. Those that are not there are left out."""
        found = {side: [self.trained(side, seed, train) for seed in self.case.seeds] for side in self.sides}
        return {side: kept for side, runs in found.items() if (kept := [run for run in runs if run])}

    def trained(self, side: str, seed: int, train: bool = True) -> dict[str, Any] | None:
        """Train one side to its best validation score, or take what has been trained before.

        Args:
            side: One of `sides`.
            seed: Seed of the run.
            train: Whether to train where nothing has been.
        """
        job = self.job(side, seed, self.case.epochs, self.case.patience)
        key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]
        out = self.work / "quality" / f"{self.case.name} {side} seed {seed} {key}".replace(" ", "_")
        if train and not (out / "quality.json").is_file():
            # Written last: a folder without it has not been checked.
            write_json(out / "quality.json", {"seed": seed, **summary(self.run(job, out))})
        return read_json(out / "quality.json") if (out / "quality.json").is_file() else None

    def timing(self, rounds: int) -> dict[str, list[dict[str, Any]]]:
        """Time a few epochs of each side, in turn; who goes first changes from round to round. By side, per round."""
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides}
        for number in range(rounds):
            first = number % len(self.sides)
            for side in self.sides[first:] + self.sides[:first]:
                epochs, out = self.case.timed_epochs, self.work / "timing"
                shutil.rmtree(out, ignore_errors=True)
                history = self.run(self.job(side, 1, epochs, epochs), out)["history"]
                columns = {name: [each[name] for each in history] for name in (*MEASURED, "pass_processor_seconds")}
                found[side].append({"medians": {k: statistics.median(v) for k, v in columns.items()}, **columns})
        return found


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run to the best."""
    metrics = ranking_metrics(torch.tensor(result["test_ranks"]))
    kept = {k: v for k, v in result.items() if k != "test_ranks"}
    return {"test_metrics": metrics, "epochs": len(result["history"]), **kept}


# Headline ------------------------------------------------------------------------------------------------------------


def case_headline(timing: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """Headline numbers of a case by variant and name; those that nothing was measured for are left out."""
    numbers = {}
    for variant in {**timing, **quality}:
        if variant != "recbole":
            numbers |= {(variant, k): v for k, v in against_recbole(timing, quality, variant)}
    return numbers


def against_recbole(timing: Mapping[str, Any], quality: Mapping[str, Any], variant: str) -> Iterator[tuple[str, float]]:
    """Ratios are taken round by round; seconds to the best, of medians over rounds and means over seeds."""
    timed, trained = ({"recbole", variant} <= each.keys() for each in (timing, quality))
    if timed:
        for name, measured in zip(("pass_speedup", "evaluation_speedup"), MEASURED, strict=True):
            theirs, ours = ([each["medians"][measured] for each in timing[side]] for side in ("recbole", variant))
            yield name, spread(theirs, ours)["median"] if len(ours) > 1 else theirs[0] / ours[0]
    if trained:
        for name, side in (("ndcg10_ours", variant), ("ndcg10_recbole", "recbole")):
            yield name, statistics.mean(each["test_metrics"]["ndcg@10"] for each in quality[side])
            yield name.replace("ndcg10", "epochs_to_best"), statistics.mean(e["best_epoch"] for e in quality[side])
    if timed and trained:
        theirs, ours = (seconds_to_best(timing[side], quality[side]) for side in ("recbole", variant))
        yield from (("time_to_best_speedup", theirs / ours), ("seconds_to_best_ours", ours))
        yield "seconds_to_best_recbole", theirs


def seconds_to_best(rounds: list[dict[str, Any]], trained: list[dict[str, Any]]) -> float:
    """Epochs to the best validation score, mean over seeds, times the seconds of a pass and its evaluation."""
    epoch = sum(statistics.median(each["medians"][name] for each in rounds) for name in MEASURED)
    return statistics.mean(each["best_epoch"] for each in trained) * epoch


if __name__ == "__main__":
    main()
