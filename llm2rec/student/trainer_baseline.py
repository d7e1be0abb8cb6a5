"""Train a student without distillation: the baseline."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.batching import MicroBatch, OptimizerStep, TrainingUnits
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import Validation, fit
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

__all__ = ["TaskObjective", "train_baseline"]


class TaskObjective:
    """Objective of a baseline student: predict the next item of each training row.

    Args:
        model: The student, not wrapped.
        train: Training rows.
        validation: Rows for early stopping.
        engine: Splits the validation rows among processes.
        loss: Task loss.
        seen: Items to exclude from the validation rankings; None ranks all items.

    Raises:
        ConfigError: If the catalogue is too small for the negatives.
    """

    def __init__(
        self,
        model: SequentialRecommender,
        train: Rows,
        validation: Rows,
        engine: Engine,
        loss: LossSettings,
        seen: SeenItems | None = None,
    ) -> None:
        self.model, self.train, self.validation, self.engine, self.seen = model, train, validation, engine, seen
        self.units = TrainingUnits(train.units, train.sizes)
        self._task_loss = TaskLoss(model, loss, train.targets, engine.seed)

    def begin_step(self, step: OptimizerStep) -> Collection[str]:
        """See `Objective.begin_step`."""
        return ()

    @contextmanager
    def losses(self, model: nn.Module, micro: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """See `Objective.losses`."""
        batch = self.train.batch(micro.units, self.engine.device)
        users = model(*batch.inputs)  # (B, D)
        yield self._task_loss(users, batch.targets, batch.rows, epoch=micro.epoch, step=micro.step)

    def example_ids(self, micro: MicroBatch) -> NDArray[np.int64]:
        """See `Objective.example_ids`."""
        return self.train.batch(micro.units).rows

    def validate(self, step: int) -> Validation:
        """See `Objective.validate`."""
        return Validation(ranking_metrics(rank_targets(self.model, self.validation, self.engine, seen=self.seen)))


def train_baseline(
    model: SequentialRecommender,
    train: Rows,
    validation: Rows,
    engine: Engine,
    *,
    loss: LossSettings | None = None,
    item_optimizer: str = "adamw",
    select_on: str = "ndcg@10",
    seen: SeenItems | None = None,
) -> SequentialRecommender:
    """Train on the task loss and keep the weights that validate best; see `llm2rec.core.train.loop.fit`.

    Args:
        model: Freshly initialised student.
        train: Training rows.
        validation: Rows for early stopping; the test split is never used here.
        engine: Processes and run folder.
        loss: Task loss; full-softmax cross-entropy if None.
        item_optimizer: ``adamw`` or ``rowwise``; see `student_optimizer`.
        select_on: Validation metric that selects the weights.
        seen: Items to exclude from the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.

    Raises:
        ConfigError: If the catalogue is too small for the negatives, or ``item_optimizer`` is ``rowwise`` with
            DeepSpeed.
    """
    objective = TaskObjective(model, train, validation, engine, loss or LossSettings(), seen)
    optimizer = student_optimizer(model, engine, item_optimizer)
    fit(model, objective, engine, optimizer, description="student", select_on=select_on)
    return model
