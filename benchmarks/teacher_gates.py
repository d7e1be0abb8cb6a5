r"""What the gates do for a teacher: one plain LoRA against mixtures with several gates and rates, on MovieLens 100K.

    .venv/bin/python benchmarks/teacher_gates.py --jobs 2 --raw-dir FOLDER --llm-path FOLDER \
        --json benchmarks/results/teacher_gates.json

Each variant trains all-MiniLM-L6-v2 on the same 10,000 rows once, with everything but the adapter's mixture the same,
and is scored on the 943 validation rows; the test split stays closed. `information` is the mutual information of
instance and expert in nats (0: all instances share one mixture, which is a plain LoRA; log 4 = 1.386 at most). Finished
variants in ``--work`` are not run again. ``--quick`` shows the same on generated data and a tiny random model.
"""

import statistics
from typing import Any

from harness import write_result
from ml100k import TEACHER, Stages, parse

from llm2rec.core.files import read_json

PER_EXPERT = "teacher.adapter.scaling=per_expert"
ONE, TEN = "teacher.gate_learning_rate_ratio=1", "teacher.gate_learning_rate_ratio=10"
VARIANTS = {
    "plain LoRA": ["teacher.adapter.num_experts=1"],
    # With alpha / R the uniform mixture of E experts has an E-th of the scale of a plain LoRA; with alpha / (R / E) it
    # is a plain LoRA.
    "linear, alpha / R": [ONE],
    "linear": [PER_EXPERT, ONE],
    "linear, rate x10": [PER_EXPERT, TEN],
    "linear, rate x100": [PER_EXPERT, "teacher.gate_learning_rate_ratio=100"],
    "linear per layer, rate x10": [PER_EXPERT, TEN, "teacher.adapter.gate_per_layer=true"],
}
SEEDS = (1,)


def main() -> None:
    """Train every variant and write the JSON file."""
    options = parse(__doc__)
    stages = Stages(options)
    stages.run("data", [])
    common = ["teacher.training.epochs=1"] if options.quick else TEACHER
    runs = [
        (name, [*common, *overrides, "teacher.export.enabled=false", f"seed={seed}"])
        for seed in (SEEDS[:1] if options.quick else SEEDS)
        for name, overrides in VARIANTS.items()
    ]
    stages.run_many("teacher", [overrides for _, overrides in runs])
    samples = [{"variant": name, **finished(stages, overrides)} for name, overrides in runs]
    write_result(options, headline(samples), samples)


def finished(stages: Stages, overrides: list[str]) -> dict[str, Any]:
    """What a finished run says of itself."""
    record = next(record for record in stages.records if record["overrides"][len(stages.common) :] == overrides)
    validation = read_json(stages.folder / "result" / record["run"] / "metrics" / "validation.json")
    last = validation["history"][-1]
    return {
        **record,
        "validation_ndcg@10": last["val/ndcg@10"],
        "validation_mrr": last["val/mrr"],
        "train_loss_second_half": last["train/loss"],
        "information": last["train/gate_information"],
        "entropy": last["train/gate_entropy"],
        "history": validation["history"],
    }


def headline(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, by variant."""
    names = ("validation_ndcg@10", "validation_mrr", "train_loss_second_half", "information")
    return {
        f"{variant}: {name}": statistics.mean(s[name] for s in samples if s["variant"] == variant)
        for variant in VARIANTS
        for name in names
    }


if __name__ == "__main__":
    main()
