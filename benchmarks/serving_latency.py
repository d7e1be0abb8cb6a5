"""What answering costs: one user and 1,000 users, among 10^4 and 10^6 items, exactly and by an index.

    .venv/bin/python benchmarks/serving_latency.py --json benchmarks/results/serving_latency.json

A SASRec of width 64 with random weights answers random histories of 10 items by `Recommender.recommend`, from raw ids
to ids, titles and scores: 10 items each, without those of the history. Speed and memory are measured, no quality;
random vectors have no neighbourhoods, so that an index misses more of them than of trained ones.

    matvec       the product of the item vectors with one vector: what any exact answer has to do
    matvec_top   that, and `topk` of the scores
    one_user     `recommend_one`
    index        the same by an HNSW index (Faiss), if it is installed; its recall is taken over 1,000 users
    many_users   `recommend` of 1,000 histories at once
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import pyarrow as pa
import torch

from llm2rec.core.errors import ConfigError
from llm2rec.core.ranking import Catalogue
from llm2rec.recommend import Recommender
from llm2rec.recommend.names import ItemNames
from llm2rec.recommend.search import HnswSearch
from llm2rec.student.models import build_model

WIDTH, LENGTH, K, N_USERS = 64, 10, 10, 1000


def main() -> None:
    """Measure each catalogue, write what came out."""
    parser = harness.command_line(__doc__ or "", rounds=200)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, headline, samples = (1_000, 10_000) if options.quick else (10_000, 1_000_000), {}, {}
    for n_items in sizes:
        numbers, samples[str(n_items)] = measure(n_items, options)
        headline.update({f"{name}_{n_items}": number for name, number in numbers.items()})
        # The largest catalogue's, whatever its size: the names that others read.
        headline.update({name: numbers[name] for name in ("one_user_vs_matvec", "index_recall") if name in numbers})
    harness.write_result(options, headline, samples)


def measure(n_items: int, options: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers for the headline, and samples, of one catalogue."""
    torch.manual_seed(0)
    model = build_model("sasrec", n_items=n_items, width=WIDTH, max_length=LENGTH).to(options.device).eval()
    raw_ids = [f"i{number}" for number in range(n_items)]
    names = ItemNames(pa.table({"raw_id": raw_ids, "title": [f"Item {number}" for number in range(n_items)]}))
    exact, vectors = Recommender(model, names), model.output_items.vectors().detach()
    drawn = np.random.default_rng(0).integers(n_items, size=(N_USERS, LENGTH))
    histories = [[raw_ids[item] for item in row] for row in drawn.tolist()]
    user, turns = torch.randn(WIDTH, device=options.device), itertools.cycle(histories)
    single: dict[str, Callable[[], object]] = {
        "matvec": lambda: vectors @ user,
        "matvec_top": lambda: (vectors @ user).topk(K),
        "one_user": lambda: exact.recommend_one(next(turns), K),
    }
    samples: dict[str, Any] = {}
    numbers: dict[str, float] = {}
    if (index := indexed(model, names, samples)) is not None:
        single["index"] = lambda: index.recommend_one(next(turns), K)
        numbers["index_recall"] = index.recall(histories[: 100 if options.quick else N_USERS], K)
        numbers["index_build_seconds"] = samples["index_build_seconds"]
    seconds = harness.seconds_by_round(single, 30 if options.quick else options.rounds, warm_up=3)
    many = {"many_users": lambda: exact.recommend(histories, K)}
    seconds |= harness.seconds_by_round(many, 3 if options.quick else max(5, options.rounds // 10), warm_up=1)
    numbers.update(percentiles(seconds))
    ratios = {name: harness.spread(seconds[name], seconds["matvec"]) for name in single if name != "matvec"}
    numbers.update({f"{name}_vs_matvec": ratio["median"] for name, ratio in ratios.items()})
    device = torch.device(options.device)
    numbers["one_user_peak_mib"] = harness.peak_bytes(single["one_user"], device) / 2**20
    numbers["many_users_peak_mib"] = harness.peak_bytes(many["many_users"], device) / 2**20
    numbers["vectors_mib"] = vectors.numel() * vectors.element_size() / 2**20
    # All that is to be read is the vectors, once: the rate says how near the memory's own that comes.
    numbers["matvec_gb_per_second"] = vectors.numel() * vectors.element_size() / np.median(seconds["matvec"]) / 1e9
    return numbers, {**samples, "seconds": seconds, "ratios": ratios}


def indexed(model: Any, names: ItemNames, samples: dict[str, Any]) -> Recommender | None:
    """The same recommender with an index; None without Faiss."""
    start = time.perf_counter()
    try:
        search = HnswSearch.build(Catalogue(model.output_items.vectors()))
    except ConfigError as error:
        samples["index"] = str(error)
        return None
    samples["index_build_seconds"] = time.perf_counter() - start
    return Recommender(model, names, search)


def percentiles(seconds: dict[str, list[float]]) -> Iterator[tuple[str, float]]:
    """Median and 99th percentile of each step, in milliseconds."""
    for name, times in seconds.items():
        for percent in (50, 99):
            yield f"{name}_p{percent}_ms", 1000 * float(np.percentile(times, percent))


if __name__ == "__main__":
    main()
