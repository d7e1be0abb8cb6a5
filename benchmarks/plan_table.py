"""The table of `docs/plan.md`: 7B, 13B and 70B on 1, 8 and 64 GPUs, planned by `llm2rec.plan`.

    .venv/bin/python benchmarks/plan_table.py --json benchmarks/results/plan_table.json

It prints the table; no GPU is needed, and no weights. ``--quick`` plans one of its rows.
"""

import itertools
import json
import tempfile
from typing import Any

import harness

from llm2rec import run
from llm2rec.plan.table import format_seconds

SHARED = (
    "teacher.objective=title", "teacher.train_rows=1000000", "teacher.training.epochs=1",
    "teacher.training.micro_batch_size=16", "teacher.gradient_checkpointing=true", "plan.n_items=10000000",
    "plan.n_rows=1000000000", "plan.prompt_tokens=200", "plan.card=a100_80gb",
)  # fmt: skip
ROWS_PER_STEP = {1: 128, 8: 128, 64: 1024}
MODELS = {"7B": "llama2_7b", "13B": "llama2_13b", "70B": "llama2_70b"}
GIB = 2**30
COLUMNS = (
    "model", "GPUs", "weights", "launch", "GiB", "with checkpointing", "rows", "tokens/s", "training", "titles",
    "gate inputs, all rows", "export, all rows",
)  # fmt: skip


def overrides(model: str, gpus: int, precision: str, launch: str) -> list[str]:
    """What to plan for one row."""
    return [
        f"llm={MODELS[model]}", f"gpus={gpus}", f"teacher.precision={precision}", f"plan.launch={launch}",
        f"teacher.training.batch_size={ROWS_PER_STEP[gpus]}", *SHARED,
    ]  # fmt: skip


def launches(model: str, gpus: int, precision: str) -> list[str]:
    """Ways worth a row: those that shard the weights where a card does not hold them."""
    if gpus == 1:
        return ["ddp"]
    return ["fsdp2", "zero3"] if (model, precision) == ("70B", "bfloat16") else ["ddp"]


def row(model: str, gpus: int, precision: str, launch: str, planned: dict[str, Any]) -> list[str]:
    """A row of the table."""
    totals = [planned["memory"][kind] for kind in ("without_checkpointing", "with_checkpointing")]
    gibs = [("" if each["fits"] else "**no** ") + f"{each['total'] / GIB:.0f}" for each in totals]
    seconds = planned["seconds"]
    hours = [format_seconds(seconds[name]) for name in ("training", "titles", "gate_inputs", "export")]
    how = {"ddp": "DDP" if gpus > 1 else "-", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}[launch]
    weights = {"bfloat16": "bf16"}.get(precision, precision)
    tokens = f"{planned['tokens_per_second']:,.0f}"
    return [model, str(gpus), weights, how, *gibs, str(totals[1]["largest"]), tokens, *hours]


def main() -> None:
    """Plan every row and print the table."""
    options = harness.command_line(__doc__, rounds=1).parse_args()
    cases = [
        (model, gpus, precision, launch)
        for model, gpus, precision in itertools.product(MODELS, ROWS_PER_STEP, ("bfloat16", "int8"))
        for launch in launches(model, gpus, precision)
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases[:1] if options.quick else cases:
            finished = run("plan", *overrides(*case), folder=folder, quiet=True)
            planned = json.loads((finished / "metrics" / "plan.json").read_text())
            kept = ("memory", "export_memory", "seconds", "tokens_per_second", "student", "disk_bytes", "advice")
            found.append({"row": row(*case, planned), "overrides": overrides(*case)} | {n: planned[n] for n in kept})
    for line in (COLUMNS, ["---"] * len(COLUMNS), *(each["row"] for each in found)):
        print("| " + " | ".join(line) + " |")
    first = found[0]
    headline = {
        "gib_7b_1_gpu": round(first["memory"]["with_checkpointing"]["total"] / GIB, 1),
        "tokens_per_second_7b_1_gpu": round(first["tokens_per_second"]),
    }
    harness.write_result(options, headline, found)


if __name__ == "__main__":
    main()
