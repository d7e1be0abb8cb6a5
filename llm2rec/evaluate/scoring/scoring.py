"""Score finished runs on the test split: once each, kept in the run's folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import read_object, replaced_file, write_json
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.ranking import Pairs
from llm2rec.core.run import read_record
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.evaluate.scoring.candidates import CANDIDATES_HR, candidates_hr, rank_among
from llm2rec.evaluate.scoring.finished import FinishedEnsemble, FinishedModel, FinishedStudent
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.negatives import CandidateSampler

__all__ = ["Protocol", "Scored", "find_runs", "popularity", "popularity_ranks", "score_popularity", "score_run"]

_BATCH_ROWS = 512
_WITH_A_MODEL = ("student", "teacher", "ensemble", "distill")  # stages whose runs can be measured
_OF_A_MODEL = ("dataset", "label", "seed", "parameters")  # what the run.json of a finished model holds


@dataclass(frozen=True)
class Protocol:
    """How runs are measured.

    Attributes:
        ks: Cut-offs.
        mask_seen: Whether items the user had before the target are taken out of the ranking.
        n_candidates: Items among which HR@1 is measured besides, the target included; 0 leaves that out.
        candidates_seed: Seed of those candidates.
    """

    ks: tuple[int, ...]
    mask_seen: bool
    n_candidates: int = 0
    candidates_seed: int = 0


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
        intervals: 95 % bootstrap intervals over test rows, by metric, of those that have one.
        n_titles: Candidates whose titles a `title` teacher chose among; 0 for all other runs.
    """

    label: str
    run: str
    metrics: dict[str, float]
    parameters: int
    milliseconds: float | None
    seed: int | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    n_titles: int = 0


def find_runs(result_dir: Path, fingerprint: str) -> list[Path]:
    """The newest finished run of each kind (label and seed) on a dataset, oldest first.

    Args:
        result_dir: Where runs are kept.
        fingerprint: The dataset's fingerprint.

    Returns:
        Run folders of students, teachers, ensembles and distilled students.
    """
    newest: dict[tuple[str, Any], Path] = {}
    # A multirun keeps its runs one folder deeper.
    for file in sorted([*result_dir.glob("result_*/run.json"), *result_dir.glob("result_*/*/run.json")]):
        folder, record = file.parent, read_record(file.parent)
        same = record.get("dataset", {}).get("fingerprint") == fingerprint
        if same and record["status"] == "finished" and record["stage"] in _WITH_A_MODEL:
            record = read_record(folder, *_OF_A_MODEL)
            newest[(record["label"], record["seed"])] = folder
    return sorted(newest.values())


def score_run(folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path) -> Scored:
    """Score one finished run on the test split, or read the scores it already has.

    The full ranking and the candidates are kept apart, so that asking for candidates ranks nothing again.

    Args:
        folder: Run folder.
        data: The dataset.
        engine: Divides rows among processes.
        protocol: How to measure.
        gate_dir: Where the gate inputs of teachers are cached.

    Raises:
        CheckpointError: If the run is not finished, holds no model, or is of another dataset.
        ConfigError: If the catalogue is too small for the candidates asked for.
    """
    with _naming(folder):
        return _score(folder, data, engine, protocol, gate_dir)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say which run it is that stops an evaluation, and how to do without it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder.name} cannot be evaluated: {error} Or leave it out, by naming the runs to compare: "
            "`runs=[result/result_..., ...]`."
        ) from error


def _score(folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path) -> Scored:
    record = _checked_record(folder, data)
    model, n_rows = _kind(folder, record)(folder, data, engine, gate_dir), len(data.splits["test"])

    def rank() -> tuple[Tensor, dict[str, Any]]:
        seen = SeenItems(Rows.of(data, "test")) if protocol.mask_seen else None
        ranks = model.ranks(seen, max(protocol.ks))
        metrics, k = ranking_metrics(ranks, protocol.ks), min(max(protocol.ks), data.n_items)
        if not model.ranks_all:
            del metrics["mrr"]  # without cut-off it would need the ranks beyond
        gates = model.gates()
        if gates is not None and engine.is_main:  # for the report, which loads no language model
            _keep(folder / "metrics" / "test_gates.npy", gates)
        return ranks, {"metrics": metrics, "milliseconds": model.milliseconds(k)}

    key = {"ks": list(protocol.ks), "mask_seen": protocol.mask_seen, "rows": n_rows}
    scores = _once(folder / "metrics", "test", key, engine, rank)
    n_titles = model.n_titles(protocol.n_candidates)
    among = _among_candidates(model, folder, data, engine, protocol, n_titles)
    return Scored(
        record["label"],
        folder.name,
        scores["metrics"] | among["metrics"],
        record["parameters"],
        scores["milliseconds"],
        record["seed"],
        {name: (low, high) for name, (low, high) in among["intervals"].items()},
        n_titles,
    )


def _among_candidates(
    model: FinishedModel, folder: Path, data: RecData, engine: Engine, protocol: Protocol, n_titles: int
) -> dict[str, Any]:
    """Metrics and intervals among candidates, as far as they are asked for; title teachers always give theirs."""
    if not (n_candidates := n_titles or protocol.n_candidates):
        return {"metrics": {}, "intervals": {}}
    key = {
        "n_candidates": n_candidates,
        "candidates_seed": protocol.candidates_seed,
        "rows": len(data.splits["test"]),
    }
    candidates = _candidates(data, protocol, n_candidates)

    def rank_candidates() -> tuple[Tensor, dict[str, Any]]:
        ranks = model.candidate_ranks(candidates)
        return ranks, _candidate_scores(ranks)

    if n_titles:
        choose = partial(model.choose_titles, candidates, protocol.ks)
        return _once(folder / "metrics", "test_titles", key | {"ks": list(protocol.ks)}, engine, choose)
    return _once(folder / "metrics", "test_candidates", key, engine, rank_candidates)


def _kind(folder: Path, record: dict[str, Any]) -> type[FinishedModel]:
    """What measures the model of a run."""
    if record["stage"] == "ensemble":
        return FinishedEnsemble
    if record["stage"] != "teacher":
        return FinishedStudent
    recipe = folder / "teacher" / "config.json"  # where it is missing, loading the teacher tells
    writes = recipe.is_file() and _read(recipe).get("objective") == "title"
    # With PEFT, which takes seconds to import: a table of students does not wait for it.
    from llm2rec.evaluate.scoring.teacher_runs import FinishedTeacher
    from llm2rec.evaluate.scoring.title_runs import FinishedTitleTeacher

    return FinishedTitleTeacher if writes else FinishedTeacher


def _once(
    folder: Path, name: str, key: dict[str, Any], engine: Engine, compute: Callable[[], tuple[Tensor, dict[str, Any]]]
) -> dict[str, Any]:
    """Read the scores of a protocol, or compute and keep them: ``<name>.json`` and ``<name>_ranks.npy``."""
    stored = folder / f"{name}.json"
    if stored.is_file() and (scores := _read(stored, "protocol"))["protocol"] == key:
        return dict(scores)
    ranks, values = compute()
    if engine.is_main:
        _keep(folder / f"{name}_ranks.npy", ranks)
        write_json(stored, {"protocol": key, **values})  # last: it says that all is there
    return values


def _keep(file: Path, values: Tensor) -> None:
    with replaced_file(file) as aside, open(aside, "wb") as opened:
        np.save(opened, values.numpy(), allow_pickle=False)


def _read(file: Path, *keys: str) -> dict[str, Any]:
    """Read a file of a run."""
    try:
        return read_object(file, *keys)
    except DataError as error:
        raise CheckpointError(f"{error} Scores may also be deleted: they are then computed again.") from error


def _candidates(data: RecData, protocol: Protocol, n_candidates: int) -> CandidateSampler:
    """The same candidates for every run: histories are cut as the dataset cuts them, not as a model does."""
    test = Rows.of(data, "test")
    return CandidateSampler(test, protocol.candidates_seed, n_candidates, split="test")


def _candidate_scores(ranks: Tensor) -> dict[str, Any]:
    rate, interval = candidates_hr(ranks)
    return {"metrics": {CANDIDATES_HR: rate}, "intervals": {CANDIDATES_HR: interval}}


def _checked_record(folder: Path, data: RecData) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} is no run folder (it holds no run.json); give `runs=[result/result_...]`.")
    record = read_record(folder)
    if record["stage"] not in _WITH_A_MODEL or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is a {record['status']} run of stage {record['stage']!r}; only finished runs of "
            f"{', '.join(_WITH_A_MODEL)} can be evaluated. Resume it, or leave it out of `runs`."
        )
    record = read_record(folder, *_OF_A_MODEL)
    if record["dataset"]["fingerprint"] != data.fingerprint:
        raise CheckpointError(
            f"{folder.name} was trained on dataset {record['dataset']['name']!r} (fingerprint "
            f"{record['dataset']['fingerprint'][:12]}), this one is {data.name!r} ({data.fingerprint[:12]}); give the "
            "same dataset overrides as in training."
        )
    return record


def popularity(data: RecData) -> NDArray[np.float64]:
    """How often each item occurs in the training split's targets and histories, shape ``(N,)``."""
    train = Rows.of(data, "train", 1)
    first = train.positions[np.arange(len(train))] == 1  # a user's very first item is nobody's target
    counts = np.bincount(train.targets.numpy(), minlength=data.n_items).astype(np.float64)
    return counts + np.bincount(train.histories(np.flatnonzero(first))[0][:, 0], minlength=data.n_items)


def popularity_ranks(data: RecData, counts: NDArray[np.float64], *, mask_seen: bool) -> Tensor:
    """0-based ranks of the test targets where everybody is given the same ranking, by ``counts``; shape ``(M,)``."""
    test = Rows.of(data, "test")
    targets, seen = test.targets.long(), SeenItems(test) if mask_seen else None
    ranks = []
    for start in range(0, len(targets), _BATCH_ROWS):
        own, rows = targets[start : start + _BATCH_ROWS], np.arange(start, min(start + _BATCH_ROWS, len(targets)))
        ranks.append(_ranks_by_count(counts, own.numpy(), None if seen is None else seen.pairs(rows)))
    return torch.cat(ranks)


def score_popularity(data: RecData, protocol: Protocol) -> Scored:
    """The same ranking for everybody: items by how often they occur in the training split's targets and histories.

    Args:
        data: The dataset.
        protocol: How to measure.

    Raises:
        ConfigError: If the catalogue is too small for the candidates asked for.
    """
    counts = popularity(data)
    metrics = ranking_metrics(popularity_ranks(data, counts, mask_seen=protocol.mask_seen), protocol.ks)
    intervals: dict[str, tuple[float, float]] = {}
    if protocol.n_candidates:
        candidates, among = _candidates(data, protocol, protocol.n_candidates), []
        targets = Rows.of(data, "test", 1).targets.long()
        for start in range(0, len(targets), _BATCH_ROWS):
            own, rows = targets[start : start + _BATCH_ROWS], np.arange(start, min(start + _BATCH_ROWS, len(targets)))
            among.append(rank_among(torch.from_numpy(counts).expand(len(own), -1), candidates.draw(rows), own))
        scored = _candidate_scores(torch.cat(among))
        metrics, intervals = metrics | scored["metrics"], scored["intervals"]
    return Scored("popularity", "", metrics, data.n_items, None, intervals=intervals)


def _ranks_by_count(counts: NDArray[np.float64], targets: NDArray[np.int64], seen: Pairs | None) -> Tensor:
    """Ranks of targets ``(B,)`` where all rows score items by ``counts``, shape ``(N,)``; no matrix of scores."""
    own = counts[targets]
    ranks = len(counts) - np.searchsorted(np.sort(counts), own) - 1
    if seen is not None:
        row, item = np.divmod(np.unique(seen[0].numpy() * len(counts) + seen[1].numpy()), len(counts))
        beaten = row[(item != targets[row]) & (counts[item] >= own[row])]
        ranks -= np.bincount(beaten, minlength=len(targets))
    return torch.from_numpy(ranks)
