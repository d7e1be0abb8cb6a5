"""Our side of `student_vs_recbole.py`: the student stage as users launch it, with a clock around its phases.

    python benchmarks/our_side.py JOB.json

Writes the same file as `recbole_side.py`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from stage_clock import Clock

from llm2rec.core.files import read_json, write_json
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.metrics import target_ranks
from llm2rec.data import load
from llm2rec.student.__main__ import main as student_stage
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import load_student


@torch.inference_mode()
def test_ranks(run: Path, data: Path) -> np.ndarray:
    """Rank the targets of the test rows with the best weights."""
    model, prepared = load_student(run / "student"), load(data)
    rows, ranks = Rows.of(prepared, "test", model.max_length), []
    for chunk in np.array_split(np.arange(len(rows)), -(-len(rows) // 512)):
        batch = rows.batch(chunk)
        ranks.append(target_ranks(model.score(model(batch.history, batch.lengths)), batch.targets))
    return torch.cat(ranks).numpy()


def main() -> None:
    """Run the stage, rank the test rows, and write everything into the job's folder."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    os.chdir(out)
    clock = Clock()
    clock.install()
    sys.argv[1:] = [*job["overrides"], "logging.tensorboard=true"]  # RecBole writes TensorBoard events too
    student_stage()
    run = max(out.glob("result/result_*"))
    epochs = [each["ndcg@10"] for each in clock.history]
    result = {
        "history": clock.history,
        "best_epoch": epochs.index(max(epochs)) + 1,
        "test_ranks": test_ranks(run, Path(job["prepared"])).tolist(),
        "n_items": load(Path(job["prepared"])).n_items,
        "parameters": read_json(run / "run.json")["parameters"],
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "commit": git_state(),
    }
    write_json(out / "result.json", result)


if __name__ == "__main__":
    main()
