"""Train a student on its own task and on what the teacher wrote down (DLLM2Rec)."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.state import TrainingState
from llm2rec.core.train.stepper import MicroBatches
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.distill.evidence import StudentNow
from llm2rec.distill.objective import distillation_losses, objective
from llm2rec.distill.selection import Selection
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll
from llm2rec.distill.settings import DistillSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.datamodule import Rows, SeenItems, SequenceBatch
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import popularity_propensity
from llm2rec.student.negatives import NegativeSampler
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

__all__ = ["train_distilled"]


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
    """Train with ``L = L_student + α L_dros + λ_d L_ranking + alignment_weight · L_alignment``; keep the best weights.

    Args:
        model: Freshly initialised student.
        train: Training rows.
        teacher: What the teacher wrote for these rows.
        validation: Rows for early stopping.
        policy: Which rows are distilled, with what weight.
        engine: Runs the loop; its run folder gets checkpoints, best weights and ``metrics/validation.json``.
        settings: Weights of the losses.
        loss: The student's own task where ``settings.task_loss`` leaves it to the student; None for cross-entropy.
        item_optimizer: ``adamw`` or ``rowwise``; see `student_optimizer`.
        select_on: Validation metric that decides.
        seen: Items to leave out of the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.

    Raises:
        ConfigError: If losses about a whole optimizer step are asked for and a step is divided, if a catalogue is too
            small for the negatives that are asked for, if DROS is asked for twice, or of the candidates with the weight
            of the other, if the catalogue is to be estimated from negatives that the student's own loss does not draw,
            if rows are selected and no loss weighs them, or DeepSpeed is to update rows.
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
    """
    _refuse_idle_selection(policy, settings)
    row_losses = _RowLosses(model, train, teacher, engine, settings, loss or LossSettings())
    training, record = engine.training, TrainingState(engine, select_on)

    def student_now(epoch: int) -> StudentNow:
        return StudentNow(model.student, train, validation, teacher, engine, partial(row_losses.ranking, epoch))

    kept, by_row = engine.run.folder / "selection", settings.ranking.weight > 0
    selection = Selection(policy, len(train), teacher, student_now, kept, needs_labels=by_row)
    wrapped, optimizer = engine.prepare(model, student_optimizer(model, engine, item_optimizer))
    if state := engine.load_checkpoint(model, optimizer):
        record.restore(state)

    def passes(step: int, row_weights: NDArray[np.float32], share: OptimizerStep) -> MicroBatches:
        for units in share.micro_batches:
            batch = train.batch(units, engine.device)
            users = wrapped(*batch.inputs)  # (B, D)
            yield batch.rows, row_losses(users, batch, row_weights, epoch=step // per_epoch, step=step)

    max_steps, steps = engine.max_steps(len(train)), engine.steps(train.units, record.step, sizes=train.sizes)
    per_epoch = training.steps_per_epoch(len(train))
    wrapped.train()
    for step, share in engine.progress(steps, "distil", max_steps, initial=record.step):
        if record.stopping.should_stop:
            break
        lr = engine.begin_step(step, max_steps, optimizer)
        sums = engine.train_step(step, share, partial(passes, step, selection.weights(step // per_epoch)))
        record.finish_step(step, share.n_rows, sums)

        if training.evaluation_is_due(record.step, len(train)):
            metrics = ranking_metrics(rank_targets(model.student, validation, engine, seen=seen))
            record.evaluated(model, metrics, learning_rate=lr)
        if engine.checkpoint_is_due(record.step, len(train)):
            engine.save_checkpoint(model, optimizer, record.state())
    record.finish(model)
    selection.close()
    return model.eval()


class _RowLosses:
    """Losses of rows on their own task and on what the teacher wrote of them; arguments as in `train_distilled`."""

    def __init__(
        self,
        model: DistilledStudent,
        train: Rows,
        teacher: TeacherOutputs,
        engine: Engine,
        settings: DistillSettings,
        loss: LossSettings,
    ) -> None:
        if settings.robust_ranking and settings.dros.in_ranking == "broadcast":
            _refuse_divided_steps(engine)
        self._model, self._train, self._teacher, self._settings = model, train, teacher, settings
        self._device = engine.device
        self._own = _own_loss(model, loss, train, engine, settings)
        self._sampler = NegativeSampler(train, engine.seed) if settings.needs_negatives else None
        propensity = popularity_propensity(train.targets, train.n_items, settings.dros.propensity_power)  # (N,)
        self._propensity = propensity.to(engine.device, torch.float32)

    def __call__(
        self, users: Tensor, batch: SequenceBatch, row_weights: NDArray[np.float32], *, epoch: int, step: int
    ) -> dict[str, Tensor]:
        """Losses of a batch by name, each of shape ``(B,)``; ``row_weights`` ``(M,)`` weigh what is distilled."""
        rows, settings = batch.rows, self._settings
        sampled = None
        if self._own and settings.ranking.samples:
            sampled = self._own.negatives(users, rows, epoch=epoch, step=step)
        targets = self._train.targets.numpy()[rows] if settings.ranking.confidence == "per_row" else None
        return distillation_losses(
            self._model,
            users,
            batch,
            self._teacher.batch(rows, settings.ranking.top_k, self._device, targets),
            torch.from_numpy(row_weights[rows]).to(self._device),
            settings,
            own=self._own and partial(self._own, users, batch.targets, rows, epoch=epoch, step=step, negatives=sampled),
            negatives=self._negatives(rows, epoch),
            sampled=sampled,
            propensity=self._propensity,
        )

    def ranking(
        self, epoch: int, logits: Tensor, rows: NDArray[np.int64], targets: Tensor, told: TeacherBatch
    ) -> Tensor:
        """The ranking losses of some rows, ``(B,)``, for policies that weigh rows by them."""
        settings = self._settings
        if settings.ranking.weight == 0:
            raise ConfigError(
                "the selection policy weighs rows by their ranking loss, but `distill.ranking.weight` is 0; give it a "
                "weight, or use another policy (`active=random`)."
            )
        losses = objective(
            logits,
            targets,
            told.first(settings.ranking.top_k),
            torch.ones(len(logits), device=logits.device),
            settings,
            negatives=self._negatives(rows, epoch),
            propensity=self._propensity,
        )
        return losses["loss_ranking"]

    def _negatives(self, rows: NDArray[np.int64], epoch: int) -> Tensor | None:
        return self._sampler.draw(rows, epoch).to(self._device) if self._sampler else None


def _refuse_idle_selection(policy: SelectionPolicy, settings: DistillSettings) -> None:
    if not (settings.weighs_rows or isinstance(policy, SelectionPolicyAll)):
        raise ConfigError(
            f"{type(policy).__name__} selects rows, but what is taken from the teacher is the same for all of them: "
            "`distill.ranking.weight` and `distill.embedding.alignment_weight` are 0; give one of them a value, or "
            "select nothing with `active=all`."
        )


def _refuse_divided_steps(engine: Engine) -> None:
    if engine.n_processes * engine.n_micro_batches > 1:
        raise ConfigError(
            "distill.dros.in_ranking is 'broadcast', whose mean over a whole batch needs each optimizer step on one "
            f"process in one piece, but {engine.n_processes} processes take {engine.n_micro_batches} micro-batches "
            "each; raise `student.training.micro_batch_size` to the batch size on one process, or use "
            "`distill.dros.in_ranking=per_row`."
        )
    engine.keep_undivided("distill.dros.in_ranking=broadcast")


def _own_loss(
    model: DistilledStudent, loss: LossSettings, train: Rows, engine: Engine, settings: DistillSettings
) -> TaskLoss | None:
    """The student's own task, or None where the recipe has one."""
    if settings.ranking.samples and (settings.task_loss != "student" or loss.name == "cross_entropy"):
        own = f"student.loss.name is {loss.name!r}"
        raise ConfigError(
            "distill.ranking.over is 'sampled', which needs the negatives of the student's own loss, but "
            f"{own if settings.task_loss == 'student' else f'distill.task_loss is {settings.task_loss!r}'}, which has "
            "none of them; use `student.loss.name=sampled_softmax`, or `distill.ranking.over=catalogue`."
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
            f"distill.dros.in_ranking is {settings.dros.in_ranking!r}, which `distill.dros.weight` weighs, and that is "
            f"0; give it the {loss.dros.weight} of `student.loss.dros.weight`, and that one 0."
        )
    return TaskLoss(model.student, loss, train.targets, engine.seed)
