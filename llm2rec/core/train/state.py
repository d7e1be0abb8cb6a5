"""Training state: losses since the last evaluation, validation history, early stopping."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import replaced_file
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.checkpoint import load_weights, save_tensors, trainable_weights
from llm2rec.core.train.engine import Engine

__all__ = ["EarlyStopping", "TrainingState", "Validation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """Result of an evaluation on the validation split.

    Attributes:
        metrics: Validation metrics by name.
        scalars: Other values to log under ``train/``.
        uses_patience: Whether early stopping counts this evaluation if it does not improve.
    """

    metrics: dict[str, float]
    scalars: dict[str, float] = field(default_factory=dict)
    uses_patience: bool = True


@dataclass
class EarlyStopping:
    """Early stopping on a validation value; larger is better.

    Attributes:
        patience: Evaluations without improvement after which training stops.
        best: Best value so far, or None before the first.
        best_step: Step of the best value.
        waited: Evaluations since the best value.
    """

    patience: int
    best: float | None = None
    best_step: int = -1
    waited: int = 0

    def update(self, value: float, step: int, *, uses_patience: bool = True) -> bool:
        """Add a value and return whether it is the best so far; NaN never is.

        Args:
            value: Validation value.
            step: Step of the value.
            uses_patience: Whether a value without improvement counts against the patience.
        """
        if value == value and (self.best is None or value > self.best):
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += uses_patience
        return False

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.waited >= self.patience

    def to_dict(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `to_dict`."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


class TrainingState:
    """Training state: finished steps, losses since the last evaluation, evaluation history, early stopping.

    Losses stay on the device until they are logged.

    Args:
        engine: Processes and run folder; the folder gets ``best.safetensors`` and ``metrics/validation.json``,
            which is written after every evaluation.
        select_on: Validation metric that selects the weights; larger is better.

    Attributes:
        step: Finished optimizer steps.
    """

    def __init__(self, engine: Engine, select_on: str) -> None:
        self.engine, self.select_on = engine, select_on
        self.stopping = EarlyStopping(engine.training.patience)
        self.step, self._history = 0, list[dict[str, float]]()
        self._sums, self._n_rows = dict[str, Tensor | float](), 0
        self._best_file = engine.run.folder / "best.safetensors"

    @property
    def should_stop(self) -> bool:
        """Whether early stopping or the user ends the training."""
        return self.engine.finish or self.stopping.should_stop

    @property
    def has_validated(self) -> bool:
        """Whether there was an evaluation."""
        return bool(self._history)

    def end_early(self, n_steps: int) -> None:
        """Record that a run is finished with what it has trained so far; a collective.

        Args:
            n_steps: Steps of the whole training.

        Raises:
            CheckpointError: If it has trained nothing.
        """
        if self.step == 0 and n_steps > 0:
            raise CheckpointError(
                f"`finish` is true, but {self.engine.run.folder.name} has no checkpoint to finish with; resume it "
                "without `finish`."
            )
        if self.step < n_steps and not self.stopping.should_stop:
            logger.info("ending at step %d of %d with the best weights so far", self.step, n_steps)
            self.engine.run.note(ended_early=True)

    def finish_step(self, step: OptimizerStep, losses: Mapping[str, Tensor] | None) -> None:
        """Record a finished step.

        Args:
            step: The step.
            losses: Sums of its losses over this process's rows, by name; None for a skipped step.
        """
        self.step = step.number + 1
        if losses is None:
            return
        self._n_rows += step.n_rows
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def evaluated(self, model: nn.Module, validation: Validation) -> None:
        """Log losses and validation metrics; store the trained weights if they are the best so far. A collective.

        Losses are means over the rows since the last evaluation.

        Args:
            model: The model, not wrapped.
            validation: Metrics, ``select_on`` among them, and other values to log.
        """
        metrics = validation.metrics
        losses = {name: value / self._n_rows for name, value in self.engine.sum_over_processes(self._sums).items()}
        scalars = losses | {"learning_rate": self.engine.learning_rate} | validation.scalars
        values = {f"train/{k}": v for k, v in scalars.items()} | {f"val/{k}": v for k, v in metrics.items()}
        self.engine.log(values, self.step)
        self.engine.log_steps(self.step)
        self._history.append({"step": self.step, **values})
        best = self.stopping.update(metrics[self.select_on], self.step, uses_patience=validation.uses_patience)
        text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        note = " (best so far)" if best else ""
        logger.info("step %d: %s, val/%s %.4f%s", self.step, text, self.select_on, metrics[self.select_on], note)
        if best and self.engine.is_main:
            with replaced_file(self._best_file) as aside:
                save_tensors(trainable_weights(model), aside)
        self._sums, self._n_rows = {}, 0
        self._write()

    def to_dict(self) -> dict[str, Any]:
        """State for checkpoints; a collective."""
        return {
            "step": self.step,
            "losses": self.engine.sum_over_processes(self._sums) if self._sums else {},
            "n_rows": self._n_rows,
            "history": self._history,
            "stopping": self.stopping.to_dict(),
        }

    def resume(self, model: nn.Module, optimizer: Any) -> None:
        """Restore model, optimizer and state from the run's newest checkpoint, if there is one."""
        state = self.engine.load_checkpoint(model, optimizer)
        if state is not None:
            self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `to_dict`."""
        self.step, self._n_rows, self._history = state["step"], state["n_rows"], state["history"]
        self._sums = dict(state["losses"]) if self.engine.is_main else dict.fromkeys(state["losses"], 0.0)
        self.stopping.restore(state["stopping"])

    def finish(self, model: nn.Module) -> None:
        """Load the best weights into ``model`` (not wrapped) and write the history; a collective.

        Without an evaluation the model keeps its weights.
        """
        self._write()
        self.engine.wait()
        if self.stopping.best is not None:
            load_weights(model, self._best_file)

    def _write(self) -> None:
        """Write the history, after every evaluation, so that a search can stop a run that validates badly."""
        self.engine.run.write_metrics(
            "validation",
            {
                "select_on": self.select_on,
                "mask_seen": self.engine.run.masks_seen,
                "best_step": self.stopping.best_step,
                "best": self.stopping.best,
                "steps": self.step,
                "history": self._history,
            },
        )
