r"""A teacher that is given a trained SASRec, beside that SASRec: MovieLens 100K, all-MiniLM-L6-v2, one seed.

    .venv/bin/python benchmarks/hybrid_teacher.py --jobs 2 --raw-dir FOLDER --llm-path FOLDER \
        --json benchmarks/results/hybrid_teacher.json

Each variant trains on the same rows once, and is chosen on validation. The test split is scored twice: as it is, and
without the items that a user had before. Teachers leave out the history they were shown and the student does not, which
alone is worth a third on movies that nobody watches twice, so only the second is like for like. `minus sasrec` is the
mean of the paired differences of NDCG@10 over the test rows, with its standard error. Finished stages in
``--work`` are not run again. ``--quick`` shows the same on generated data and a tiny random model.
"""

from pathlib import Path
from typing import Any

import numpy as np
from harness import write_result
from ml100k import Stages, parse

from llm2rec.core.files import read_json, write_json

SEED = "seed=1"
TEACHER = [
    "llm.prompt.max_items=6",
    "teacher.train_rows=10016",
    "teacher.training.epochs=1",
    "teacher.training.batch_size=32",
    "teacher.training.learning_rate=1e-3",
    "teacher.training.evaluate_every_steps=79",
    "teacher.training.patience=100",
]
VARIANTS = {
    "joined": ["teacher=ilora_hybrid", "teacher.head=joined", "teacher.logit_scale=20", "teacher.residual_dropout=0"],
    "residual": ["teacher=ilora_hybrid"],
}


def main() -> None:
    """Train the student, then the teachers that are given it, and write the JSON file."""
    options = parse(__doc__ or "")
    stages = Stages(options)
    stages.run("data", [])
    stages.run("student", ["student=sasrec", SEED, *(["student.training.epochs=5"] if options.quick else [])])
    given = f"teacher.recommender_run=result/{run_of(stages, 'student')}"
    common = ["teacher.training.epochs=1"] if options.quick else TEACHER
    teachers = [
        [*overrides, f"teacher.name={name}", given, "teacher.export.enabled=false", SEED, *common]
        for name, overrides in VARIANTS.items()
    ]
    stages.run_many("teacher", teachers)
    comparisons = {mask: compare(stages, mask) for mask in ("false", "true")}
    scores = {
        f"{row['label']}{': ' if mask == 'false' else ', seen items out: '}ndcg@10": row["metrics"]["ndcg@10"]
        for mask, comparison in comparisons.items()
        for row in comparison["rows_scored"]
    }
    differences = {
        f"{label} minus sasrec{'' if mask == 'false' else ', seen items out'}: ndcg@10 {name}": value
        for mask, comparison in comparisons.items()
        for label, difference in comparison["differences"].items()
        for name, value in difference.items()
    }
    validation = {record["run"]: history(stages, record) for record in stages.records if record["stage"] == "teacher"}
    write_result(
        options, scores | differences, {"test": comparisons, "validation": validation, "stages": stages.records}
    )


def run_of(stages: Stages, stage: str) -> str:
    """Name of the run of a stage that ran once."""
    return str(next(record["run"] for record in stages.records if record["stage"] == stage))


def history(stages: Stages, record: dict[str, Any]) -> Any:
    """Validation metrics of a teacher, evaluation by evaluation."""
    return read_json(stages.folder / "result" / record["run"] / "metrics" / "validation.json")["history"]


def compare(stages: Stages, mask_seen: str) -> dict[str, Any]:
    """Score all runs by one protocol, and each teacher against the student row by row."""
    stored = stages.folder / f"compared_{mask_seen}.json"  # a run keeps the ranks of one protocol only
    if stored.is_file():
        comparison: dict[str, Any] = read_json(stored)
        return comparison
    runs = {record["run"]: record["stage"] for record in stages.records if record["stage"] in ("student", "teacher")}
    overrides = [f"runs=[{','.join(f'result/{run}' for run in runs)}]", f"metrics.mask_seen={mask_seen}"]
    stages.run("evaluate", overrides)
    of = next(r for r in stages.records if r["stage"] == "evaluate" and r["overrides"][-2:] == overrides)
    comparison = read_json(stages.folder / "result" / of["run"] / "comparison.json")
    gains = {run: gain(stages.folder / "result" / run) for run in runs}
    student = next(gains[run] for run, stage in runs.items() if stage == "student")
    comparison["differences"] = {
        row["label"]: {"mean": float(apart.mean()), "standard_error": float(apart.std(ddof=1) / len(apart) ** 0.5)}
        for row in comparison["rows_scored"]
        if runs.get(row["run"]) == "teacher"
        for apart in [gains[row["run"]] - student]
    }
    comparison["overrides"] = [each for each in comparison["overrides"] if each not in stages.paths]
    write_json(stored, comparison)
    return comparison


def gain(run: Path) -> np.ndarray:
    """NDCG@10 of each test row, shape ``(M,)``, by the protocol that was scored last."""
    ranks = np.load(run / "metrics" / "test_ranks.npy", allow_pickle=False)
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0.0)


if __name__ == "__main__":
    main()
