"""A stage as users launch it, with a clock around the phases of its training.

    python benchmarks/stage_clock.py OUT.json llm2rec.student [OVERRIDE ...]

The stage runs in the folder it is launched from; OUT.json gets one entry an epoch.
"""

import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2rec.core.files import write_json
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.state import TrainingState, Validation

__all__ = ["Clock"]


class Clock:
    """Reads the time when a pass over the data begins and ends, and when its evaluation has ended.

    A pass begins when the model is ready or the last pass's checkpoint has been written, and ends with its last step;
    what lies between that and `TrainingState.evaluated` is the evaluation. RecBole's passes are cut alike.
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
        self._around(TrainingState, "finish_step", after=self.step)
        self._around(TrainingState, "evaluated", before=self.evaluated)

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

    def evaluated(self, state: TrainingState, _: Any, validation: Validation) -> None:
        """The evaluation of a pass has ended."""
        passed, processor = (end - start for start, end in zip(self._began, self._stepped, strict=True))
        evaluation = self.now()[0] - self._stepped[0]
        own = {"ndcg@10": validation.metrics[state.select_on]}
        self.history.append(
            {"pass_seconds": passed, "pass_processor_seconds": processor, "evaluation_seconds": evaluation, **own}
        )


def main() -> None:
    """Run the stage and write down when its phases began and ended."""
    out, stage, *sys.argv[1:] = sys.argv[1:]
    clock = Clock()
    clock.install()
    importlib.import_module(f"{stage}.__main__").main()
    write_json(Path(out), clock.history)


if __name__ == "__main__":
    main()
