"""The training loop of all stages: `fit` trains a student, a distilled student or a teacher through its `Objective`."""

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.train.batching import MicroBatch, OptimizerStep, TrainingUnits
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.state import TrainingState, Validation
from llm2rec.core.train.stepper import Attempt

__all__ = ["Objective", "Validation", "fit", "train_step"]

logger = logging.getLogger(__name__)


class Objective(Protocol):
    """Training objective of a model: rows, losses and validation.

    Attributes:
        units: The training rows, as an epoch shuffles them.
    """

    units: TrainingUnits

    def begin_step(self, step: OptimizerStep) -> Collection[str]:
        """Prepare a step; returns the names of the parameter groups that are frozen in it. A collective."""

    def losses(self, model: nn.Module, micro: MicroBatch) -> AbstractContextManager[dict[str, Tensor]]:
        """Losses of a micro-batch by name, each of shape ``(B,)``; ``loss`` is minimised.

        The context stays open during the backward pass, so that its resources, such as gates, are available there.

        Args:
            model: The model as `Engine.prepare` wrapped it.
            micro: The micro-batch, B rows.
        """

    def example_ids(self, micro: MicroBatch) -> NDArray[np.int64]:
        """Row numbers of a micro-batch in the training split, shape ``(B,)``, for error messages."""

    def validate(self, step: int) -> Validation:
        """Evaluate after ``step`` optimizer steps, on the validation split; a collective."""


def fit(
    model: nn.Module,
    objective: Objective,
    engine: Engine,
    optimizer: Any,
    *,
    description: str,
    select_on: str = "ndcg@10",
) -> None:
    """Train a model for all its steps or until early stopping, and load the weights that validate best.

    The run resumes from its newest checkpoint, if it has one. The model ends in evaluation mode.

    Args:
        model: The model, not wrapped.
        objective: What to minimise and how to validate.
        engine: Processes and run folder; the folder gets checkpoints, best weights and ``metrics/validation.json``.
        optimizer: Optimizer of the model's trained parameters.
        description: Name of the training in progress lines.
        select_on: Validation metric that selects the weights; larger is better.

    Raises:
        CheckpointError: If a run is to finish with what it has trained, which is nothing.
        NonFiniteError: If a loss or gradient is not finite and the step may not be skipped.
        OutOfMemoryError: If a step does not fit into memory with any micro-batch size.
        Interrupted: On SIGTERM or Ctrl-C, after a checkpoint.
    """
    settings, units = engine.training, objective.units
    n_rows, n_steps = units.n_rows, engine.max_steps(units.n_rows)
    wrapped, optimizer = engine.prepare(model, optimizer)
    state = TrainingState(engine, select_on)
    state.resume(model, optimizer)
    if engine.finish:
        state.end_early(n_steps)
    _log_summary(model, engine, description, n_rows, n_steps, state.step)

    wrapped.train()
    steps = engine.steps(units, start=state.step)
    for step in engine.progress(steps, description, n_steps, initial=state.step, at_most=True):
        if state.should_stop:
            break
        with engine.timed(step):
            losses = train_step(wrapped, objective, engine, optimizer, step, n_steps)
        state.finish_step(step, losses)

        if settings.evaluation_is_due(state.step, n_rows):
            engine.average_buffers(model)
            state.evaluated(model, objective.validate(state.step))
        if engine.checkpoint_is_due(state.step, n_rows):
            engine.save_checkpoint(model, optimizer, state.to_dict())
    if state.step and not state.has_validated:  # ended before its first evaluation
        state.evaluated(model, objective.validate(state.step))
    state.finish(model)
    model.eval()


def train_step(
    wrapped: nn.Module, objective: Objective, engine: Engine, optimizer: Any, step: OptimizerStep, n_steps: int
) -> dict[str, Tensor] | None:
    """Take one optimizer step along the gradient of the mean loss over all rows of the step; a collective.

    Args:
        wrapped: The model as `Engine.prepare` returned it, in training mode.
        objective: Training objective.
        engine: Processes, accumulation, clipping.
        optimizer: The optimizer as `Engine.prepare` returned it.
        step: The effective batch.
        n_steps: Steps of the whole training, for the learning-rate schedule.

    Returns:
        Sums of the losses over this process's rows by name, on the device; None if the step was skipped.
    """
    stepper = engine.stepper
    frozen = objective.begin_step(step)
    engine.begin_step(step.number, n_steps, optimizer, frozen)  # seeds dropout, sets learning rates
    for attempt in stepper.attempts(step, objective, frozen):  # a single one, unless memory runs out
        with attempt:
            for micro in attempt.micro_batches:
                _forward_backward(wrapped, objective, engine, attempt, micro)
    stepper.clip_gradients()
    if not stepper.is_finite():  # raises, or skips the step
        return None
    stepper.keep_frozen_groups()
    optimizer.step()
    optimizer.zero_grad()
    return stepper.losses


def _forward_backward(
    wrapped: nn.Module, objective: Objective, engine: Engine, attempt: Attempt, micro: MicroBatch
) -> None:
    """Add the gradient of a micro-batch; a separate function, so that a failed pass keeps no tensors alive."""
    with attempt.accumulate(wrapped), objective.losses(wrapped, micro) as losses:
        # Accelerate and DeepSpeed divide by the number of micro-batches and average over processes; `scale` turns that
        # into the mean over all rows of the step.
        loss = attempt.sum_over_rows(micro, losses)
        engine.accelerator.backward(loss * attempt.scale)


def _log_summary(model: nn.Module, engine: Engine, description: str, n_rows: int, n_steps: int, step: int) -> None:
    """Log batch sizes, steps and parameters before training starts."""
    settings, n_micro = engine.training, engine.n_micro_batches
    trainable, total = engine.parameter_counts(model)
    logger.info(
        "%s: %d rows, effective batch %d (micro-batch %d x accumulation %d x processes %d), %d optimizer steps in at "
        "most %d epochs, %s of %s parameters trainable%s",
        description, n_rows, settings.batch_size, min(settings.micro_batch_size, settings.batch_size), n_micro,
        engine.n_processes, n_steps, settings.epochs, f"{trainable:,}", f"{total:,}",
        f", resuming at step {step}" if step else "",
    )  # fmt: skip
