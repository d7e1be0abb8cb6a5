"""Train a student on its task and on the teacher's outputs (DLLM2Rec, arXiv 2405.00338)."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.seed import derived_seed
from llm2rec.core.train.batching import MicroBatch, OptimizerStep, TrainingUnits
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import Validation, fit
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.distill.objective import distillation_losses, objective
from llm2rec.distill.selection import Selection
from llm2rec.distill.selection_evidence import StudentNow
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll
from llm2rec.distill.settings import DistillSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import popularity_propensity
from llm2rec.student.negatives import NegativeSampler
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

__all__ = ["DistillObjective", "train_distilled"]


class DistillObjective:
    """Objective of a distilled student: the task loss plus the distillation losses.

    ``L = L_task + α L_dros + λ_d L_ranking + alignment_weight · L_alignment``

    Args:
        model: Freshly initialised student.
        train: Training rows.
        teacher: The teacher's outputs for these rows.
        validation: Rows for early stopping.
        policy: Selects and weights the distilled rows.
        engine: Splits the validation rows among processes.
        settings: Distillation recipe.
        loss: Task loss if ``settings.task_loss`` is ``student``.
        seen: Items to exclude from the validation rankings; None ranks all items.

    Raises:
        ConfigError: See `train_distilled`.
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
    """

    def __init__(
        self,
        model: DistilledStudent,
        train: Rows,
        teacher: TeacherOutputs,
        validation: Rows,
        policy: SelectionPolicy,
        engine: Engine,
        settings: DistillSettings,
        loss: LossSettings,
        seen: SeenItems | None = None,
    ) -> None:
        _check_selection_is_used(policy, settings)
        if settings.robust_ranking and settings.dros.in_ranking == "broadcast":
            _require_whole_steps(engine)
        self.model, self.train, self.teacher, self.validation = model, train, teacher, validation
        self.engine, self.settings, self.seen = engine, settings, seen
        self.units = TrainingUnits(train.units, train.sizes)
        self._task_loss = _task_loss(model, loss, train, engine, settings)
        self._sampler = NegativeSampler(train, engine.seed) if settings.needs_negatives else None
        propensity = popularity_propensity(train.targets, train.n_items, settings.dros.propensity_power)  # (N,)
        self._propensity = propensity.to(engine.device, torch.float32)
        kept, by_row = engine.run.folder / "selection", settings.ranking.weight > 0
        self.selection = Selection(policy, len(train), teacher, self._student_now, kept, needs_labels=by_row)
        self._row_weights = np.empty(0, np.float32)

    def begin_step(self, step: OptimizerStep) -> Collection[str]:
        """See `Objective.begin_step`; calls the selection policy at the first step of an epoch."""
        self.model.drop_ids(derived_seed(self.engine.seed, "ids", step.number))
        self._row_weights = self.selection.weights(step.epoch)  # (M,)
        return ()

    @contextmanager
    def losses(self, model: nn.Module, micro: MicroBatch) -> Iterator[dict[str, Tensor]]:
        """See `Objective.losses`."""
        settings, device = self.settings, self.engine.device
        batch = self.train.batch(micro.units, device)
        rows = batch.rows
        users = model(*batch.inputs)  # (B, D)
        sampled, task_loss = None, None
        if self._task_loss and settings.ranking.samples:
            sampled = self._task_loss.negatives(users, rows, epoch=micro.epoch, step=micro.step)
        if self._task_loss:
            task_loss = partial(
                self._task_loss, users, batch.targets, rows, epoch=micro.epoch, step=micro.step, negatives=sampled
            )
        targets = self.train.targets.numpy()[rows] if settings.ranking.confidence == "per_row" else None
        yield distillation_losses(
            self.model,
            users,
            batch,
            self.teacher.batch(rows, settings.ranking.top_k, device, targets),
            torch.from_numpy(self._row_weights[rows]).to(device),
            settings,
            task_loss=task_loss,
            negatives=self._negatives(rows, micro.epoch),
            sampled=sampled,
            propensity=self._propensity,
        )

    def example_ids(self, micro: MicroBatch) -> NDArray[np.int64]:
        """See `Objective.example_ids`."""
        return self.train.batch(micro.units).rows

    def validate(self, step: int) -> Validation:
        """See `Objective.validate`."""
        ranks = rank_targets(self.model.student, self.validation, self.engine, seen=self.seen)
        return Validation(ranking_metrics(ranks))

    def ranking_losses(
        self, epoch: int, logits: Tensor, rows: NDArray[np.int64], targets: Tensor, teacher_batch: TeacherBatch
    ) -> Tensor:
        """Ranking losses of some rows, ``(B,)``, for policies that weight rows by them."""
        settings = self.settings
        if settings.ranking.weight == 0:
            raise ConfigError(
                "the selection policy weights rows by their ranking loss, but `distill.ranking.weight` is 0; set it, "
                "or use another policy (`active=random`)."
            )
        losses = objective(
            logits,
            targets,
            teacher_batch.first(settings.ranking.top_k),
            torch.ones(len(logits), device=logits.device),
            settings,
            negatives=self._negatives(rows, epoch),
            propensity=self._propensity,
        )
        return losses["loss_ranking"]

    def _student_now(self, epoch: int) -> StudentNow:
        """The student at the start of an epoch, for selection policies."""
        losses = partial(self.ranking_losses, epoch)
        return StudentNow(self.model.student, self.train, self.validation, self.teacher, self.engine, losses)

    def _negatives(self, rows: NDArray[np.int64], epoch: int) -> Tensor | None:
        return self._sampler.draw(rows, epoch).to(self.engine.device) if self._sampler else None


def train_distilled(
    model: DistilledStudent,
    train: Rows,
    teacher: TeacherOutputs,
    validation: Rows,
    policy: SelectionPolicy,
    engine: Engine,
    settings: DistillSettings,
    *,
    loss: LossSettings | None = None,
    item_optimizer: str = "adamw",
    select_on: str = "ndcg@10",
    seen: SeenItems | None = None,
) -> DistilledStudent:
    """Train on `DistillObjective` and keep the weights that validate best; see `llm2rec.core.train.loop.fit`.

    Args:
        model: Freshly initialised student.
        train: Training rows.
        teacher: The teacher's outputs for these rows.
        validation: Rows for early stopping; the test split is never used here.
        policy: Selects and weights the distilled rows.
        engine: Processes and run folder.
        settings: Distillation recipe.
        loss: Task loss if ``settings.task_loss`` is ``student``; None for cross-entropy.
        item_optimizer: ``adamw`` or ``rowwise``; see `student_optimizer`.
        select_on: Validation metric that selects the weights.
        seen: Items to exclude from the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.

    Raises:
        ConfigError: If ``in_ranking=broadcast`` and a step is split into micro-batches, the catalogue is too small for
            the negatives, DROS is configured twice or for the candidates without `distill.dros.weight`,
            ``over=sampled`` and the task loss draws no negatives, rows are selected and no loss uses row weights, or
            ``item_optimizer`` is ``rowwise`` with DeepSpeed.
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
    """
    distillation = DistillObjective(
        model, train, teacher, validation, policy, engine, settings, loss or LossSettings(), seen
    )
    optimizer = student_optimizer(model, engine, item_optimizer)
    fit(model, distillation, engine, optimizer, description="distil", select_on=select_on)
    distillation.selection.close()
    return model


def _check_selection_is_used(policy: SelectionPolicy, settings: DistillSettings) -> None:
    if not (settings.weighs_rows or isinstance(policy, SelectionPolicyAll)):
        raise ConfigError(
            f"{type(policy).__name__} selects rows, but no loss uses row weights: `distill.ranking.weight` and "
            "`distill.embedding.alignment_weight` are 0; set one of them, or use `active=all`."
        )


def _require_whole_steps(engine: Engine) -> None:
    if engine.n_processes * engine.n_micro_batches > 1:
        raise ConfigError(
            "distill.dros.in_ranking is 'broadcast', whose mean over the batch needs one micro-batch on one process "
            f"per optimizer step, but {engine.n_processes} processes use {engine.n_micro_batches} "
            "micro-batches each; raise `student.training.micro_batch_size` to the batch size on one process, or use "
            "`distill.dros.in_ranking=per_row`."
        )
    engine.stepper.whole_steps = "distill.dros.in_ranking=broadcast"


def _task_loss(
    model: DistilledStudent, loss: LossSettings, train: Rows, engine: Engine, settings: DistillSettings
) -> TaskLoss | None:
    """Task loss of the student, or None if the recipe sets another."""
    if settings.ranking.samples and (settings.task_loss != "student" or loss.name == "cross_entropy"):
        by_student = settings.task_loss == "student"
        cause = f"student.loss.name is {loss.name!r}" if by_student else f"distill.task_loss is {settings.task_loss!r}"
        raise ConfigError(
            f"distill.ranking.over is 'sampled', which needs the negatives of the student's task loss, but {cause}, "
            "which has none; use `student.loss.name=sampled_softmax`, or `distill.ranking.over=catalogue`."
        )
    if settings.task_loss != "student":
        return None
    if loss.dros.weight > 0 and settings.dros.weight > 0:
        raise ConfigError(
            f"student.loss.dros.weight is {loss.dros.weight} and distill.dros.weight is {settings.dros.weight}, which "
            "would count DROS twice; set one of them to 0."
        )
    if loss.dros.weight > 0 and settings.dros.in_ranking != "none":
        raise ConfigError(
            f"distill.dros.in_ranking is {settings.dros.in_ranking!r}, but `distill.dros.weight` is 0; set "
            f"`distill.dros.weight={loss.dros.weight}` and `student.loss.dros.weight=0`."
        )
    return TaskLoss(model.student, loss, train.targets, engine.seed)
