"""What a training loop has seen so far, so that it can be told, stored and taken up again."""

import logging
from collections.abc import Mapping
from typing import Any

from llm2rec.core.files import replaced_file
from llm2rec.core.train.checkpoint import load_weights, save_tensors, trainable_weights
from llm2rec.core.train.early_stopping import EarlyStopping
from llm2rec.core.train.engine import Engine

__all__ = ["TrainingState"]

logger = logging.getLogger(__name__)


class TrainingState:
    """Losses since the last evaluation, the history of evaluations, and when to stop.

    Args:
        engine: Runs the loop; its run folder gets ``best.safetensors`` and ``metrics/validation.json``.
        select_on: Validation metric that decides which weights are kept; larger is better.
    """

    def __init__(self, engine: Engine, select_on: str) -> None:
        self.engine, self.select_on = engine, select_on
        self.stopping = EarlyStopping(engine.training.patience)
        self.step, self._history, self._sums, self._n_rows = 0, list[dict[str, float]](), dict[str, float](), 0
        self._best_file = engine.run.folder / "best.safetensors"

    def finish_step(self, step: int, n_rows: int, sums: Mapping[str, float] | None) -> None:
        """Note that step number ``step`` has been done.

        Args:
            step: Global step, from 0.
            n_rows: Its rows over all processes.
            sums: This process's loss sums by name; None for a step that was skipped.
        """
        self.step = step + 1
        if sums is None:
            return
        self._n_rows += n_rows
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def evaluated(self, model: Any, metrics: dict[str, float], *, waits: bool = True, **scalars: float) -> None:
        """Log losses and validation metrics of now; keep the trained weights if they are the best so far.

        A collective. Losses are means over the rows since the last evaluation.

        Args:
            model: Unwrapped model.
            metrics: Validation metrics, ``select_on`` among them.
            waits: Whether an evaluation that is not the best takes from the patience.
            scalars: Other values to log under ``train/``.
        """
        losses = {name: value / self._n_rows for name, value in self.engine.sum_over_processes(self._sums).items()}
        values = {f"train/{k}": v for k, v in (losses | scalars).items()} | {f"val/{k}": v for k, v in metrics.items()}
        self.engine.log(values, self.step)
        self.engine.log_steps(self.step)
        self._history.append({"step": self.step, **values})
        improved = self.stopping.update(metrics[self.select_on], self.step, waits=waits)
        told = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        best = " (best so far)" if improved else ""
        logger.info("step %d: %s, val/%s %.4f%s", self.step, told, self.select_on, metrics[self.select_on], best)
        if improved and self.engine.is_main:
            with replaced_file(self._best_file) as aside:
                save_tensors(trainable_weights(model), aside)
        self._sums, self._n_rows = {}, 0

    def state(self) -> dict[str, Any]:
        """What to store in a checkpoint; a collective."""
        return {
            "step": self.step,
            "losses": self.engine.sum_over_processes(self._sums) if self._sums else {},
            "n_rows": self._n_rows,
            "history": self._history,
            "stopping": self.stopping.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.step, self._n_rows, self._history = state["step"], state["n_rows"], state["history"]
        self._sums = dict(state["losses"]) if self.engine.is_main else dict.fromkeys(state["losses"], 0.0)
        self.stopping.restore(state["stopping"])

    def finish(self, model: Any) -> None:
        """Put the best weights back into ``model`` (unwrapped) and write the history; a collective.

        Without any evaluation the model stays as it is.
        """
        self.engine.run.write_metrics(
            "validation",
            {
                "select_on": self.select_on,
                "best_step": self.stopping.best_step,
                "best": self.stopping.best,
                "steps": self.step,
                "history": self._history,
            },
        )
        self.engine.wait()
        if self.stopping.best is not None:
            load_weights(model, self._best_file)
