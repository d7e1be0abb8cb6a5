"""What a blend that is served directly reaches and costs: popularity, neighbours, SASRec, and SASRec with neighbours.

    python benchmarks/serving_blend.py --raw-dir FOLDER --json benchmarks/results/serving_blend.json

Nothing is distilled: the blend is ``(1 - share) * softmax(SASRec) + share * neighbours`` at every request. Accuracy is
measured on validation rows; there the share of a row is chosen on the rows of the other half of the users, and SASRec,
which was stopped on the same rows, is as optimistic alone as in the blend. ``--split test --open-test`` chooses the
share on validation and opens the test split. ``--overrides dataset.split=global_time`` measures on a split by time,
where a user has several rows, which intervals take as independent: they are too narrow.

Every request is one history of the split, one thread, and ends with the 10 best items:

    popularity   the counts of items
    neighbours   the similarities of the history's items, added up
    sasrec       a forward pass, and the product with all item vectors
    blend        both of them, normalised and mixed
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import torch
from ml100k import Stages
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.files import read_json
from llm2rec.core.metrics import target_ranks
from llm2rec.core.statistics import estimate, paired_difference, row_values
from llm2rec.data import RecData, load, masks_seen
from llm2rec.ensemble.neighbours import FORGETTING, Neighbours, sharpened, training_sequences
from llm2rec.evaluate.scoring.scoring import popularity
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import SequentialRecommender, load_student

METRICS, CHOSEN_ON = ("ndcg@10", "ndcg@20", "hr@20"), "ndcg@20"
SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
K, BATCH_ROWS = 10, 256
# The configuration that `distillation_study.py` chose on validation for SASRec on MovieLens 100K.
TUNED = [
    *("student.examples=sequences", "student.model.positions=oldest", "student.model.dropout=0.26"),
    *("student.training.batch_size=512", "student.training.learning_rate=0.0014"),
    *("student.training.weight_decay=0.03", "student.training.patience=5", "student.training.epochs=60"),
]
Scorer = Callable[[NDArray[np.int64]], Tensor]


def main() -> None:
    """Train SASRec for each seed, measure the four ways to serve, and write the JSON file."""
    options = parse()
    torch.set_num_threads(1)
    source = ["dataset=toy"] if options.quick else [f"dataset={'movielens' if options.raw_dir else 'csv'}"]
    stages = Stages(options, [*source, *options.overrides, "metrics.select_on=ndcg@20"], paths(options))
    stages.run("data", [])
    students = [["student=sasrec", *options.student, f"seed={seed}"] for seed in options.seeds]
    stages.run_many("student", students)
    data, models = prepared(stages), [model_of(stages, each) for each in students]
    neighbours = Neighbours(training_sequences(data), data.n_items)
    found = accuracy(data, models, neighbours, options.split)
    served = serving(data, models[0], neighbours, options)
    rows = {name: {**found["rows"][name], **served[name]} for name in served}
    headline = {"blend_share": found["share"]}
    for name, row in rows.items():
        headline |= {f"{name}_ndcg20": row["ndcg@20"]["mean"], f"{name}_ms": row["milliseconds"]["median"]}
        headline |= {f"{name}_bytes": row["bytes"]}
    about = {"dataset": data.name, "split": data.manifest["settings"]["split"], "rows_of": options.split}
    about |= {"mask_seen": masks_seen(data, None), "seeds": options.seeds, "fingerprint": data.fingerprint}
    samples = {**about, "rows": rows, **{k: v for k, v in found.items() if k != "rows"}, "stages": stages.records}
    harness.write_result(options, headline, samples)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.command_line(__doc__ or "", rounds=300)
    parser.add_argument("--raw-dir", type=harness.existing, help="folder or zip with MovieLens 100K")
    parser.add_argument("--interactions", type=harness.existing, help="table of interactions, in place of MovieLens")
    parser.add_argument("--items", type=harness.existing, help="table of items and titles")
    parser.add_argument("--overrides", nargs="*", default=[], help="overrides of all stages, such as dataset options")
    parser.add_argument("--student", nargs="*", help="overrides of SASRec (default: tuned on MovieLens)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3], help="seeds of SASRec")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="rows to measure on")
    parser.add_argument("--open-test", action="store_true", help="confirm that the test split is to be read")
    parser.add_argument("--work", default="result/serving_blend", help="folder for data and runs, which are kept")
    parser.add_argument("--jobs", type=int, default=1, help="students trained at once")
    options = parser.parse_args()
    if (options.split == "test") != options.open_test:
        parser.error("the test split is read with both of --split test and --open-test")
    if not options.quick and (options.raw_dir is None) == (options.interactions is None):
        parser.error("give --raw-dir, or --interactions and --items, or --quick")
    if (options.interactions is None) != (options.items is None):
        parser.error("--interactions and --items belong together")
    if options.student is None:
        options.student = ["student.training.epochs=5"] if options.quick else TUNED
    if options.quick:
        options.seeds, options.rounds = options.seeds[:1], min(options.rounds, 30)
    return options


def paths(options: argparse.Namespace) -> list[str]:
    """Overrides with places on this machine."""
    names = {"dataset.raw_dir": options.raw_dir, "dataset.interactions": options.interactions}
    names["dataset.items"] = options.items
    return [] if options.quick else [f"{name}={path.resolve()}" for name, path in names.items() if path is not None]


def prepared(stages: Stages) -> RecData:
    """The dataset of these stages; others may lie in the same folder."""
    fingerprint = read_json(run_of(stages, "data", []) / "run.json")["dataset"]["fingerprint"]
    files = (stages.folder / "data" / "processed").glob("*/manifest.json")
    return load(next(file.parent for file in files if read_json(file)["fingerprint"] == fingerprint))


def model_of(stages: Stages, overrides: Sequence[str]) -> SequentialRecommender:
    """The student of a finished run."""
    return load_student(run_of(stages, "student", overrides)).eval()


def run_of(stages: Stages, stage: str, overrides: Sequence[str]) -> Path:
    """The folder of a finished run."""
    wanted = [*stages.common, *overrides]
    (run,) = (each["run"] for each in stages.records if each["stage"] == stage and each["overrides"] == wanted)
    return stages.folder / "result" / run


# Accuracy ------------------------------------------------------------------------------------------------------------


def accuracy(
    data: RecData, models: Sequence[SequentialRecommender], neighbours: Neighbours, split: str
) -> dict[str, Any]:
    """Metrics of each way to serve on the rows of a split, and the share of the neighbours in the blend.

    Args:
        data: The dataset.
        models: Students that differ in their seed.
        neighbours: Neighbours of the training split.
        split: ``validation`` or ``test``.

    Returns:
        ``rows``: mean, interval over rows and values over seeds of each metric, by way and metric; ``share``, and what
        each share reaches on validation; and the paired difference of blend and SASRec.
    """
    ranks = ranks_of(data, models, neighbours, split)
    chosen_on = ranks if split == "validation" else ranks_of(data, models, neighbours, "validation")
    by_share = np.stack([values(chosen_on[f"blend {share}"], CHOSEN_ON).mean(axis=0) for share in SHARES])
    share = SHARES[int(by_share.mean(axis=1).argmax())]
    shares = np.full(len(ranks["popularity"][0]), share)
    if split == "validation":  # users of one half have the share that is best for the other half
        users = Rows.of(data, split).users
        is_odd = users[np.arange(len(shares))] % 2 == 1
        best = [SHARES[int(by_share[:, half].mean(axis=1).argmax())] for half in (~is_odd, is_odd)]
        shares = np.where(is_odd, best[0], best[1])
    blends = np.stack([ranks[f"blend {each}"] for each in SHARES])  # (shares, runs, M)
    ranks["blend"] = np.take_along_axis(blends, np.searchsorted(SHARES, shares)[None, None], axis=0)[0]
    ways = ("popularity", "neighbours", "sasrec", "blend")
    found = {way: {metric: vars(estimate(values(ranks[way], metric))) for metric in METRICS} for way in ways}
    of_seeds = [values(ranks[way], CHOSEN_ON) for way in ("blend", "sasrec")]
    return {
        "rows": found,
        "share": share,
        "shares_of_halves": sorted(set(shares.tolist())),
        "validation_by_share": dict(zip(map(str, SHARES), by_share.mean(axis=1).tolist(), strict=True)),
        "blend_minus_sasrec": {CHOSEN_ON: vars(paired_difference(*of_seeds))},
        "n_rows": len(shares),
    }


def values(ranks: NDArray[np.int64], metric: str) -> NDArray[np.float64]:
    """Values of a metric for ranks ``(runs, M)``, in the same shape."""
    return np.stack([row_values(each, metric) for each in ranks])


def ranks_of(
    data: RecData, models: Sequence[SequentialRecommender], neighbours: Neighbours, split: str
) -> dict[str, NDArray[np.int64]]:
    """Ranks ``(runs, M)`` of the targets of a split by each way to serve, without the items of a user's past."""
    rows = Rows.of(data, split, models[0].max_length)
    seen = SeenItems(rows) if masks_seen(data, None) else None
    counts = torch.from_numpy(popularity(data))

    def ranked(score: Scorer) -> NDArray[np.int64]:
        found = []
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // BATCH_ROWS)):
            scores, targets = score(part), rows.targets.long()[part]
            found.append(target_ranks(scores if seen is None else seen.mask(scores, part, targets), targets))
        return torch.cat(found).numpy()

    def known(part: NDArray[np.int64]) -> Tensor:
        batch = rows.batch(part)
        return sharpened(neighbours.scores(batch.history, batch.lengths).double())

    ranks = {
        "popularity": ranked(lambda part: counts.expand(len(part), -1).clone())[None],
        "neighbours": ranked(known)[None],
        "sasrec": np.stack([ranked(lambda part, m=model: scores_of(m, rows, part)) for model in models]),
    }
    for share in SHARES:
        ranks[f"blend {share}"] = np.stack(
            [ranked(lambda part, m=m, s=share: mixed(scores_of(m, rows, part), known(part), s)) for m in models]
        )
    return ranks


@torch.inference_mode()
def scores_of(model: SequentialRecommender, rows: Rows, part: NDArray[np.int64]) -> Tensor:
    """Scores ``(B, N)`` of a student, float64."""
    return model.score(model(*rows.batch(part).inputs)).double()


def mixed(scores: Tensor, known: Tensor, share: float) -> Tensor:
    """The blend of a student's scores and the neighbours' distribution, both ``(B, N)``."""
    of_student = torch.where((known > 0).any(dim=1, keepdim=True), 1 - share, 1.0)  # all of it without neighbours
    return of_student * scores.softmax(dim=1) + share * known


# Serving -------------------------------------------------------------------------------------------------------------


class Lookup:
    """Neighbours for single requests: the similarities from each item, 8 bytes a pair.

    Args:
        neighbours: The counted neighbours.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        near = neighbours._near  # (N, N): to, from
        to, source = near.indices().numpy()
        order = np.argsort(source, kind="stable")
        self.to, self.near = to[order].astype(np.int32), near.values().numpy()[order].astype(np.float32)
        self.starts = np.searchsorted(source[order], np.arange(near.shape[0] + 1))

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return self.to.nbytes + self.near.nbytes + self.starts.nbytes

    def scores(self, history: Sequence[int]) -> NDArray[np.float32]:
        """Scores ``(N,)`` after one history, oldest first; as `Neighbours.scores`."""
        scores = np.zeros(len(self.starts) - 1, np.float32)
        for age, item in enumerate(reversed(history)):
            pairs = slice(self.starts[item], self.starts[item + 1])
            scores[self.to[pairs]] += np.float32(FORGETTING**age) * self.near[pairs]  # no target comes twice
        return scores


@torch.inference_mode()
def serving(
    data: RecData, model: SequentialRecommender, neighbours: Neighbours, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Milliseconds for one request, and the bytes that it needs in memory, of each way to serve."""
    rows = Rows.of(data, "validation", model.max_length)
    histories = [history[:n].tolist() for history, n in zip(*rows.histories(np.arange(len(rows))), strict=True)]
    turns, lookup = itertools.cycle(histories), Lookup(neighbours)
    counts, vectors = torch.from_numpy(popularity(data)).float(), model.output_items.vectors().detach()

    def best(history: list[int], scores: Tensor) -> list[int]:
        scores[history] = -torch.inf
        return scores.topk(min(K, len(scores))).indices.tolist()

    def student(history: list[int]) -> Tensor:
        user = model(torch.tensor([history]), torch.tensor([len(history)]))[0]
        return vectors @ user

    def known(history: list[int]) -> Tensor:
        return torch.from_numpy(lookup.scores(history))

    def blend(history: list[int]) -> Tensor:
        return mixed(student(history)[None], sharpened(known(history)[None]), 0.5)[0]

    ways: dict[str, Callable[[list[int]], Tensor]] = {
        "popularity": lambda history: counts.clone(),
        "neighbours": known,
        "sasrec": student,
        "blend": blend,
    }

    def request(score: Callable[[list[int]], Tensor]) -> harness.Step:
        def step() -> list[int]:
            history = next(turns)
            return best(history, score(history))

        return step

    seconds = harness.seconds_by_round({name: request(way) for name, way in ways.items()}, options.rounds, warm_up=5)
    held = {"popularity": counts.nbytes, "neighbours": lookup.bytes}
    held["sasrec"] = sum(each.nbytes for each in model.weights_to_serve().values())
    held["blend"] = held["sasrec"] + held["neighbours"]
    return {name: {"milliseconds": milliseconds(seconds[name]), "bytes": held[name]} for name in ways}


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    median, late = np.quantile(1000 * np.array(seconds), [0.5, 0.99])
    return {"median": float(median), "p99": float(late)}


if __name__ == "__main__":
    main()
