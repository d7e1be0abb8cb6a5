"""Score finished runs on the test split: once each, kept in the run's folder."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2rec.core.engine import Engine
from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import read_json, write_json
from llm2rec.core.metrics import ranking_metrics, target_ranks
from llm2rec.data import RecData
from llm2rec.student.datamodule import SeenItems, SequenceData
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.store import load_student
from llm2rec.teacher.factory import load_teacher
from llm2rec.teacher.gate_cache import GateCache
from llm2rec.teacher.trainer import rank_targets as rank_teacher_targets

__all__ = ["Protocol", "Scored", "find_runs", "score_popularity", "score_run"]

_LATENCY_REPEATS = 50


@dataclass(frozen=True)
class Protocol:
    """How runs are measured.

    Attributes:
        ks: Cut-offs.
        mask_seen: Whether items the user had before the target are taken out of the ranking.
    """

    ks: tuple[int, ...]
    mask_seen: bool


@dataclass(frozen=True)
class Scored:
    """One row of the table.

    Attributes:
        label: What it is.
        run: Name of the run folder, or empty.
        metrics: Test metrics by name.
        parameters: Parameters that answering needs.
        milliseconds: Median time to rank the catalogue for one user, on the machine the run was scored on.
        seed: Seed of the run, or None.
    """

    label: str
    run: str
    metrics: dict[str, float]
    parameters: int
    milliseconds: float | None
    seed: int | None = None


def find_runs(result_dir: Path, fingerprint: str) -> list[Path]:
    """The newest finished run of each kind (label and seed) on a dataset, oldest first.

    Args:
        result_dir: Where runs are kept.
        fingerprint: The dataset's fingerprint.

    Returns:
        Run folders of students, teachers and distilled students.
    """
    newest: dict[tuple[str, Any], Path] = {}
    # A multirun keeps its runs one folder deeper.
    for file in sorted([*result_dir.glob("result_*/run.json"), *result_dir.glob("result_*/*/run.json")]):
        folder, record = file.parent, read_json(file)
        same = record.get("dataset", {}).get("fingerprint") == fingerprint
        if same and record["status"] == "finished" and record["stage"] in ("student", "teacher", "distill"):
            newest[(record["label"], record["seed"])] = folder
    return sorted(newest.values())


def score_run(folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path) -> Scored:
    """Score one finished run on the test split, or read the scores it already has.

    Args:
        folder: Run folder.
        data: The dataset.
        engine: Divides rows among processes.
        protocol: How to measure.
        gate_dir: Where the gate inputs of teachers are cached.

    Raises:
        CheckpointError: If the run is not finished, holds no model, or is of another dataset.
    """
    record = _checked_record(folder, data)
    stored = folder / "metrics" / "test.json"
    key = {"ks": list(protocol.ks), "mask_seen": protocol.mask_seen, "rows": len(data.splits["test"])}
    if stored.is_file() and (scores := read_json(stored))["protocol"] == key:
        metrics, milliseconds = scores["metrics"], scores["milliseconds"]
    else:
        score = _score_teacher if record["stage"] == "teacher" else _score_student
        ranks, milliseconds = score(folder, data, engine, protocol, gate_dir)
        metrics = ranking_metrics(ranks, protocol.ks)
        if engine.is_main:
            write_json(stored, {"protocol": key, "metrics": metrics, "milliseconds": milliseconds})
            np.save(folder / "metrics" / "test_ranks.npy", ranks.numpy(), allow_pickle=False)
    return Scored(record["label"], folder.name, metrics, record["parameters"], milliseconds, record["seed"])


def _checked_record(folder: Path, data: RecData) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} is no run folder (it holds no run.json); give `runs=[result/result_...]`.")
    record: dict[str, Any] = read_json(folder / "run.json")
    if record["stage"] not in ("student", "teacher", "distill") or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is a {record['status']} run of stage {record['stage']!r}; only finished runs of student, "
            "teacher and distill can be evaluated. Resume it, or leave it out of `runs`."
        )
    if record["dataset"]["fingerprint"] != data.fingerprint:
        raise CheckpointError(
            f"{folder.name} was trained on dataset {record['dataset']['name']!r} (fingerprint "
            f"{record['dataset']['fingerprint'][:12]}), this one is {data.name!r} ({data.fingerprint[:12]}); give the "
            "same dataset overrides as in training."
        )
    return record


def _score_student(
    folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path
) -> tuple[Tensor, float]:
    model = load_student(folder / "student").to(engine.device)
    split = data.splits["test"]
    test = SequenceData.of(split, data.n_items, model.max_length)
    seen = SeenItems.of(split, data.sequences) if protocol.mask_seen else None
    ranks = rank_targets(model, test, engine, seen=seen)
    k = min(max(protocol.ks), data.n_items)

    def answer() -> None:
        batch = test.batch(np.zeros(1, np.int64), engine.device)
        model.score(model(batch.history, batch.lengths)).topk(k)

    return ranks, _milliseconds(answer, engine.device)


def _score_teacher(
    folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path
) -> tuple[Tensor, float]:
    model, recipe = load_teacher(folder / "teacher", data, engine.device)
    split = data.splits["test"]
    test = SequenceData.of(split, data.n_items, data.history_length)
    cache = GateCache(model, recipe.identity, engine, gate_dir)
    seen = SeenItems.of(split, data.sequences) if protocol.mask_seen else None
    ranks = rank_teacher_targets(model, cache.rows(test, np.arange(len(test))), engine, seen=seen)
    history, lengths, k = test.history[:1].numpy(), test.lengths[:1].numpy(), min(max(protocol.ks), data.n_items)
    return ranks, _milliseconds(lambda: model.log_probs(history, lengths).topk(k), engine.device)


def _milliseconds(answer: Callable[[], object], device: torch.device) -> float:
    """Median time of one answer."""
    seconds = []
    with torch.inference_mode():
        for _ in range(_LATENCY_REPEATS + 5):  # the first few warm up
            start = time.perf_counter()
            answer()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return round(1000 * float(np.median(seconds[5:])), 4)


def score_popularity(data: RecData, protocol: Protocol) -> Scored:
    """The same ranking for everybody: items by how often they occur in the training split's targets and histories.

    Args:
        data: The dataset.
        protocol: How to measure.
    """
    train = SequenceData.of(data.splits["train"], data.n_items, 1)
    first = data.splits["train"].with_format("numpy")["position"][:] == 1  # a user's very first item is nobody's target
    counts = np.bincount(train.targets.numpy(), minlength=data.n_items).astype(np.float64)
    counts += np.bincount(train.history.numpy()[first, 0], minlength=data.n_items)
    split = data.splits["test"]
    test = SequenceData.of(split, data.n_items, data.history_length)
    scores = torch.from_numpy(counts).expand(len(test), -1).clone()
    rows, targets = np.arange(len(test)), test.targets.long()
    if protocol.mask_seen:
        scores = SeenItems.of(split, data.sequences).mask(scores, rows, targets)
    return Scored("popularity", "", ranking_metrics(target_ranks(scores, targets), protocol.ks), data.n_items, None)
