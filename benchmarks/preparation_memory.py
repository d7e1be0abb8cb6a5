"""Memory and time of preparing a csv file beside the number of its interactions.

    .venv/bin/python benchmarks/preparation_memory.py --json benchmarks/results/preparation_memory.json

Synthetic interactions of 20,000 users with 20,000 items: users and items are the same at every size, and so are the
names and titles that are kept in memory for them. Each size has a process of its own, and another one with two
processes to write. Its peak is the largest resident set (``ru_maxrss``) of the process, or of the largest of its
children, less that of the moment where all is imported and nothing is read. Nothing is mapped into memory until all is
written: ``written_peak_bytes`` is the peak up to there. The last step opens the finished tables, mapped, and looks at
the head of each record batch; ``peak_bytes`` counts the pages around these too, which the system takes back when it
needs them.

Headline: ``written_growth_1e5_to_1e7`` and ``peak_growth_1e5_to_1e7``, the peaks at 10^7 interactions divided by those
at 10^5, with one process;
``peak_mebibytes_*`` and ``interactions_per_second_*`` of each size. Example rows and histories are written for every
interaction but the first of each user.
"""

import argparse
import json
import logging
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

from llm2rec.data import CsvTables, prepare

USERS, ITEMS = 20_000, 20_000
ROWS_AT_ONCE = 10**5


def main() -> None:
    """Prepare every size in a process of its own and write the JSON file."""
    parser = harness.command_line(__doc__, rounds=1)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of interactions")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes that write")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.processes[0])))
        return
    sizes = options.sizes or ([10**5] if options.quick else [10**5, 10**6, 10**7])
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            write_tables(Path(folder), size)
            samples += [{"interactions": size, **in_a_process(Path(folder), n)} for n in options.processes]
            print(json.dumps(samples[-len(options.processes) :]), flush=True)
    harness.write_result(options, headline(samples), samples)


def write_tables(folder: Path, n_rows: int) -> None:
    """Write interactions in the order of time, and the items' titles."""
    generator = np.random.default_rng(0)
    with open(folder / "interactions.csv", "w", encoding="utf-8") as file:
        file.write("user_id,item_id,timestamp\n")
        for start in range(0, n_rows, ROWS_AT_ONCE):
            users, items = generator.integers(USERS, size=ROWS_AT_ONCE), generator.integers(ITEMS, size=ROWS_AT_ONCE)
            rows = enumerate(zip(users.tolist(), items.tolist(), strict=True), 1_600_000_000 + start)
            file.write("".join(f"user{user},item{item},{at}\n" for at, (user, item) in rows))
    titles = (f"item{item},The title of item number {item}\n" for item in range(ITEMS))
    (folder / "items.csv").write_text("item_id,title\n" + "".join(titles), encoding="utf-8")


def in_a_process(folder: Path, n_processes: int) -> dict[str, Any]:
    """Measure one preparation where nothing was allocated before."""
    command = [sys.executable, __file__, "--case", str(folder), "--processes", str(n_processes), "--json", os.devnull]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sample: dict[str, Any] = json.loads(done.stdout)
    return sample


class AtWriting(logging.Handler):
    """Notes the peak at the moment where preparation says that all is written."""

    peak = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Note it."""
        if "written" in record.getMessage():
            self.peak = peak_bytes()


def peak_bytes() -> int:
    """Largest resident set so far of this process or of a child of it."""
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usage) * 1024  # Linux counts in KiB


def measure(folder: Path, n_processes: int) -> dict[str, Any]:
    """Prepare the tables in this process and say what it took."""
    before, at_writing = peak_bytes(), AtWriting()
    logging.getLogger("llm2rec.data.prepare").addHandler(at_writing)
    logging.getLogger("llm2rec.data.prepare").setLevel(logging.INFO)
    spec = CsvTables(
        interactions=str(folder / "interactions.csv"), items=str(folder / "items.csv"), k_core=2, num_proc=n_processes
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as processed:
        data = prepare(spec, Path(processed))
        seconds = time.perf_counter() - start
    return {
        "processes": n_processes,
        "written_peak_bytes": at_writing.peak - before,
        "peak_bytes": peak_bytes() - before,
        "seconds": seconds,
        "users": data.statistics["users"],
        "items": data.statistics["items"],
        "rows": data.statistics["rows"],
        "fingerprint": data.fingerprint,
    }


def headline(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Give the numbers that others read; those of sizes that were not run are left out."""
    values = {}
    plain = {each["interactions"]: each for each in samples if each["processes"] == 1}
    for size, sample in plain.items():
        name = f"1e{round(math.log10(size))}"
        values[f"written_peak_mebibytes_{name}"] = sample["written_peak_bytes"] / 2**20
        values[f"peak_mebibytes_{name}"] = sample["peak_bytes"] / 2**20
        values[f"interactions_per_second_{name}"] = size / sample["seconds"]
    if {10**5, 10**7} <= plain.keys():
        for name in ("written_peak", "peak"):
            growth = plain[10**7][f"{name}_bytes"] / plain[10**5][f"{name}_bytes"]
            values[f"{name.removesuffix('_peak')}_growth_1e5_to_1e7"] = growth
    return values


if __name__ == "__main__":
    main()
