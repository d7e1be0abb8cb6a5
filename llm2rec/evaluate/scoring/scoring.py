"""Score finished runs on the test split. Scores are stored in the run folder and computed once per protocol."""

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
from llm2rec.core.run import described, read_record
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.evaluate.scoring.candidates import CANDIDATES_HR, candidates_hr, rank_among
from llm2rec.evaluate.scoring.finished import FinishedEnsemble, FinishedModel, FinishedStudent
from llm2rec.evaluate.scoring.slices import slice_metrics, slices
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.negatives import CandidateSampler

__all__ = [
    "WITH_A_MODEL",
    "Protocol",
    "Scored",
    "popularity",
    "popularity_ranks",
    "score_popularity",
    "score_run",
]

_BATCH_ROWS = 512
WITH_A_MODEL = ("student", "teacher", "ensemble", "distill")  # stages whose runs can be scored
_OF_A_MODEL = ("dataset", "label", "seed", "parameters")  # what the run.json of a finished model holds


@dataclass(frozen=True)
class Protocol:
    """How runs are scored.

    Attributes:
        ks: Cut-offs.
        mask_seen: Whether items in the user's past are removed from the ranking.
        n_candidates: Candidates for an additional HR@1, the target included; 0 skips it.
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
        label: Label of the model.
        run: Name of the run folder, or empty.
        metrics: Test metrics by name.
        parameters: Parameters used at inference; None without a model.
        milliseconds: Median time to rank the catalogue for one user, on the machine the run was scored on.
        seed: Seed of the run, or None.
        intervals: 95 % bootstrap intervals over test rows, for some metrics.
        n_titles: Candidate titles that a title teacher chose among; 0 for all other runs.
        slices: HR and NDCG of slices of the test rows, by name.
    """

    label: str
    run: str
    metrics: dict[str, float]
    parameters: int | None
    milliseconds: float | None
    seed: int | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    n_titles: int = 0
    slices: dict[str, dict[str, float]] = field(default_factory=dict)


def score_run(folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path) -> Scored:
    """Score one finished run on the test split, or read the scores it already has.

    Scores of the full ranking and of candidates are stored separately: adding candidates does not rank again.

    Args:
        folder: Run folder.
        data: The dataset.
        engine: Splits rows among processes.
        protocol: How to score.
        gate_dir: Where the gate inputs of teachers are cached.

    Raises:
        CheckpointError: If the run is not finished, holds no model, or is of another dataset.
        ConfigError: If the catalogue has too few items for the candidates.
    """
    with _name_in_errors(folder):
        return _score(folder, data, engine, protocol, gate_dir)


@contextmanager
def _name_in_errors(folder: Path) -> Iterator[None]:
    """Name the run in the error, and say how to leave it out."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder.name} cannot be evaluated: {error} To leave it out, name the runs to compare: "
            "`runs=[result/result_..., ...]`."
        ) from error


def _score(folder: Path, data: RecData, engine: Engine, protocol: Protocol, gate_dir: Path) -> Scored:
    record = _checked_record(folder, data)
    model, n_rows = _model_class(folder, record)(folder, data, engine, gate_dir), len(data.splits["test"])

    def rank() -> tuple[Tensor, dict[str, Any]]:
        seen = SeenItems(Rows.of(data, "test")) if protocol.mask_seen else None
        ranks = model.ranks(seen, max(protocol.ks))
        metrics, k = ranking_metrics(ranks, protocol.ks), min(max(protocol.ks), data.n_items)
        if not model.ranks_all:
            del metrics["mrr"]  # needs exact ranks beyond the cut-off
        gates = model.gates()
        if gates is not None and engine.is_main:  # for the report, which loads no language model
            _save_array(folder / "metrics" / "test_gates.npy", gates)
        return ranks, {"metrics": metrics, "milliseconds": model.milliseconds(k)}

    key = {"ks": list(protocol.ks), "mask_seen": protocol.mask_seen, "rows": n_rows}
    scores = _cached(folder / "metrics", "test", key, engine, rank)
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
    """Metrics and intervals among candidates, if the protocol has any or the model is a title teacher."""
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
        return _cached(folder / "metrics", "test_titles", key | {"ks": list(protocol.ks)}, engine, choose)
    return _cached(folder / "metrics", "test_candidates", key, engine, rank_candidates)


def _model_class(folder: Path, record: dict[str, Any]) -> type[FinishedModel]:
    """The class for the model of a run."""
    if record["stage"] == "ensemble":
        return FinishedEnsemble
    if record["stage"] != "teacher":
        return FinishedStudent
    recipe = folder / "teacher" / "config.json"  # if it is missing, loading the teacher raises
    is_title = recipe.is_file() and _read(recipe).get("objective") == "title"
    # Imports PEFT, which takes seconds: a comparison of students does not need it.
    from llm2rec.evaluate.scoring.teachers import FinishedItemTeacher, FinishedTitleTeacher

    return FinishedTitleTeacher if is_title else FinishedItemTeacher


def _cached(
    folder: Path, name: str, key: dict[str, Any], engine: Engine, compute: Callable[[], tuple[Tensor, dict[str, Any]]]
) -> dict[str, Any]:
    """Read the scores of a protocol, or compute and store them: ``<name>.json`` and ``<name>_ranks.npy``."""
    stored = folder / f"{name}.json"
    if stored.is_file() and (scores := _read(stored, "protocol"))["protocol"] == key:
        return dict(scores)
    ranks, values = compute()
    if engine.is_main:
        _save_array(folder / f"{name}_ranks.npy", ranks)
        write_json(stored, {"protocol": key, **values})  # last, as it marks the scores as complete
    return values


def _save_array(file: Path, values: Tensor) -> None:
    with replaced_file(file) as aside, open(aside, "wb") as opened:
        np.save(opened, values.numpy(), allow_pickle=False)


def _read(file: Path, *keys: str) -> dict[str, Any]:
    """Read a file of a run."""
    try:
        return read_object(file, *keys)
    except DataError as error:
        raise CheckpointError(f"{error} Or delete the scores: they are then computed again.") from error


def _candidates(data: RecData, protocol: Protocol, n_candidates: int) -> CandidateSampler:
    """The same candidates for every run: histories have the dataset's length, not a model's."""
    test = Rows.of(data, "test")
    return CandidateSampler(test, protocol.candidates_seed, n_candidates, split="test")


def _candidate_scores(ranks: Tensor) -> dict[str, Any]:
    rate, interval = candidates_hr(ranks)
    return {"metrics": {CANDIDATES_HR: rate}, "intervals": {CANDIDATES_HR: interval}}


def _checked_record(folder: Path, data: RecData) -> dict[str, Any]:
    if not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} is not a run folder (no run.json); expected `runs=[result/result_...]`.")
    record = read_record(folder)
    if record["stage"] not in WITH_A_MODEL or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is {described(record)}; only finished runs of "
            f"{', '.join(WITH_A_MODEL)} can be evaluated. Resume it, or leave it out of `runs`."
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
    first = train.positions[np.arange(len(train))] == 1  # a user's first item is never a target
    counts = np.bincount(train.targets.numpy(), minlength=data.n_items).astype(np.float64)
    return counts + np.bincount(train.histories(np.flatnonzero(first))[0][:, 0], minlength=data.n_items)


def popularity_ranks(data: RecData, counts: NDArray[np.float64], *, mask_seen: bool) -> Tensor:
    """0-based ranks of the test targets if all items are ranked by ``counts``; shape ``(M,)``."""
    test = Rows.of(data, "test")
    targets, seen = test.targets.long(), SeenItems(test) if mask_seen else None
    ranks = []
    for start in range(0, len(targets), _BATCH_ROWS):
        own, rows = targets[start : start + _BATCH_ROWS], np.arange(start, min(start + _BATCH_ROWS, len(targets)))
        ranks.append(_ranks_by_count(counts, own.numpy(), None if seen is None else seen.pairs(rows)))
    return torch.cat(ranks)


def score_popularity(data: RecData, protocol: Protocol) -> Scored:
    """Score the popularity ranking: items by how often they occur in the training split's targets and histories.

    Args:
        data: The dataset.
        protocol: How to score.

    Raises:
        ConfigError: If the catalogue has too few items for the candidates.
    """
    counts = popularity(data)
    ranks = popularity_ranks(data, counts, mask_seen=protocol.mask_seen)
    metrics, apart = ranking_metrics(ranks, protocol.ks), slice_metrics(ranks, slices(data), protocol.ks)
    intervals: dict[str, tuple[float, float]] = {}
    if protocol.n_candidates:
        candidates, among = _candidates(data, protocol, protocol.n_candidates), []
        targets = Rows.of(data, "test", 1).targets.long()
        for start in range(0, len(targets), _BATCH_ROWS):
            own, rows = targets[start : start + _BATCH_ROWS], np.arange(start, min(start + _BATCH_ROWS, len(targets)))
            among.append(rank_among(torch.from_numpy(counts).expand(len(own), -1), candidates.draw(rows), own))
        scored = _candidate_scores(torch.cat(among))
        metrics, intervals = metrics | scored["metrics"], scored["intervals"]
    return Scored("popularity", "", metrics, None, None, intervals=intervals, slices=apart)


def _ranks_by_count(counts: NDArray[np.float64], targets: NDArray[np.int64], seen: Pairs | None) -> Tensor:
    """Ranks of targets ``(B,)`` by ``counts``, shape ``(N,)``, without a matrix of scores."""
    own = counts[targets]
    ranks = len(counts) - np.searchsorted(np.sort(counts), own) - 1
    if seen is not None:
        row, item = np.divmod(np.unique(seen[0].numpy() * len(counts) + seen[1].numpy()), len(counts))
        beaten = row[(item != targets[row]) & (counts[item] >= own[row])]
        ranks -= np.bincount(beaten, minlength=len(targets))
    return torch.from_numpy(ranks)
