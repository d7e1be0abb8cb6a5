"""Our side of `student_vs_recbole.py`: the student stage as users launch it, with a clock around its phases.

    python benchmarks/our_side.py JOB.json

Writes the same file as `recbole_side.py`.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm2rec.core.engine import Engine
from llm2rec.core.files import read_json, write_json
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.metrics import target_ranks
from llm2rec.core.record import TrainingRecord
from llm2rec.data import load
from llm2rec.student.__main__ import main as student_stage
from llm2rec.student.datamodule import SequenceData
from llm2rec.student.store import load_student


class Clock:
    """Reads the time when a pass over the data begins and ends, and when its evaluation has ended.

    A pass begins when the model is ready or the last pass's checkpoint has been written, and ends with its last step;
    what lies between that and `TrainingRecord.evaluated` is the evaluation. RecBole's passes are cut alike.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self._began = self._stepped = (0.0, 0.0)  # by the wall, and summed over processors

    @staticmethod
    def now() -> tuple[float, float]:
        """Seconds by the wall, and of this process over all processors."""
        return time.perf_counter(), time.process_time()

    def install(self) -> None:
        """Put itself around the methods that mark the phases."""
        self._around(Engine, "prepare", after=self.begin)
        self._around(Engine, "save_checkpoint", after=self.begin)
        self._around(TrainingRecord, "finish_step", after=self.step)
        self._around(TrainingRecord, "evaluated", before=self.evaluated)

    @staticmethod
    def _around(kind: type, name: str, before: Callable = lambda *_: None, after: Callable = lambda *_: None) -> None:
        method = getattr(kind, name)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before(*args)
            result = method(*args, **kwargs)
            after(*args)
            return result

        setattr(kind, name, timed)

    def begin(self, *_: Any) -> None:
        """A pass begins."""
        self._began = self.now()

    def step(self, *_: Any) -> None:
        """A step has been done, maybe the last of its pass."""
        self._stepped = self.now()

    def evaluated(self, record: TrainingRecord, _: Any, metrics: dict[str, float]) -> None:
        """The evaluation of a pass has ended."""
        passed, processor = (end - start for start, end in zip(self._began, self._stepped, strict=True))
        evaluation = self.now()[0] - self._stepped[0]
        own = {"ndcg@10": metrics[record.select_on]}
        self.history.append(
            {"pass_seconds": passed, "pass_processor_seconds": processor, "evaluation_seconds": evaluation, **own}
        )


@torch.inference_mode()
def test_ranks(run: Path, data: Path) -> np.ndarray:
    """Rank the targets of the test rows with the best weights."""
    model, prepared = load_student(run / "student"), load(data)
    rows, ranks = SequenceData.of(prepared.splits["test"], prepared.n_items, model.max_length), []
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
