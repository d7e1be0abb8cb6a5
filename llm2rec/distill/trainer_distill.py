"""Train a student on its own task and on what the teacher wrote down (DLLM2Rec)."""

from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from llm2rec.core.engine import Engine
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.optimizer import adamw
from llm2rec.core.record import TrainingRecord
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.distill.kd_losses import (
    alignment_loss,
    confidence_weights,
    consistency_weights,
    importance_weights,
    position_weights,
    ranking_loss,
)
from llm2rec.distill.selection_policy import SelectionPolicy
from llm2rec.distill.settings import DistillSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.datamodule import SeenItems, SequenceBatch, SequenceData
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import cross_entropy

__all__ = ["distillation_losses", "train_distilled"]


def train_distilled(
    model: DistilledStudent,
    train: SequenceData,
    teacher: TeacherOutputs,
    validation: SequenceData,
    policy: SelectionPolicy,
    engine: Engine,
    settings: DistillSettings,
    *,
    select_on: str = "ndcg@10",
    seen: SeenItems | None = None,
) -> DistilledStudent:
    """Train with ``L = L_student + weight · L_ranking + alignment_weight · L_alignment``; keep the best weights.

    Args:
        model: Freshly initialised student.
        train: Training rows.
        teacher: What the teacher wrote for these rows.
        validation: Rows for early stopping.
        policy: Which rows are distilled.
        engine: Runs the loop; its run folder gets checkpoints, best weights and ``metrics/validation.json``.
        settings: Weights of the losses.
        select_on: Validation metric that decides.
        seen: Items to leave out of the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.
    """
    training, record = engine.training, TrainingRecord(engine, select_on)
    wrapped, optimizer = engine.prepare(model, adamw(model, training.learning_rate, training.weight_decay))
    if state := engine.load_checkpoint(model, optimizer):
        record.restore(state)

    rows, max_steps = np.arange(len(train)), engine.max_steps(len(train))
    per_epoch, weights_in = training.steps_per_epoch(len(train)), lru_cache(1)(partial(policy.weights, len(train)))
    wrapped.train()
    for step, share in engine.progress(engine.steps(rows, record.step), "distil", max_steps, initial=record.step):
        if record.stopping.should_stop:
            break
        lr = engine.begin_step(step, max_steps, optimizer)
        for micro_rows, weights in zip(share.micro_batches, share.weights, strict=True):
            batch = train.batch(micro_rows, engine.device)
            told = teacher.batch(micro_rows, settings.ranking.top_k, engine.device)
            distilled = torch.from_numpy(weights_in(step // per_epoch)[micro_rows]).to(engine.device)
            with engine.accumulate(wrapped):
                users = wrapped(batch.history, batch.lengths)  # (B, D)
                losses = distillation_losses(model, users, batch, told, distilled, settings)  # each (B,)
                counted = torch.from_numpy(weights).to(engine.device)
                sums = {name: (values * counted).sum() for name, values in losses.items()}
                engine.backward(sums["loss"], share.n_rows, step, micro_rows)
                engine.step(wrapped, optimizer)
            record.add_losses(sums)
        record.finish_step(step, share.n_rows)

        if training.evaluation_is_due(record.step, len(train)):
            metrics = ranking_metrics(rank_targets(model.student, validation, engine, seen=seen))
            record.evaluated(model, metrics, learning_rate=lr)
        if training.checkpoint_is_due(record.step, len(train)):
            engine.save_checkpoint(model, optimizer, record.state())
    record.finish(model)
    return model.eval()


def distillation_losses(
    model: DistilledStudent,
    users: Tensor,
    batch: SequenceBatch,
    told: TeacherBatch,
    distilled: Tensor,
    settings: DistillSettings,
) -> dict[str, Tensor]:
    """Losses of some rows, by name; ``loss`` is their weighted total.

    Args:
        model: Student.
        users: Its user vectors, shape ``(B, D)``.
        batch: The rows.
        told: What the teacher says of them.
        distilled: Weight of each row's distillation losses, shape ``(B,)``.
        settings: Weights of the losses.

    Returns:
        ``loss`` and ``loss_student``, and ``loss_ranking`` and ``loss_alignment`` where they are asked for, each of
        shape ``(B,)``.
    """
    logits = model.score(users)  # (B, N)
    losses = {"loss_student": cross_entropy(logits, batch.targets)}
    total = losses["loss_student"]
    if settings.ranking.weight > 0:
        weights = _candidate_weights(logits, told, settings.ranking)
        losses["loss_ranking"] = distilled * ranking_loss(logits, told.ranking, weights)
        total = total + settings.ranking.weight * losses["loss_ranking"]
    if settings.embedding.alignment_weight > 0:
        aligned = alignment_loss(
            model.projected(batch.targets), model.teacher_vectors[batch.targets], settings.embedding.alignment
        )
        losses["loss_alignment"] = distilled * aligned
        total = total + settings.embedding.alignment_weight * losses["loss_alignment"]
    return {"loss": total, **losses}


def _candidate_weights(logits: Tensor, told: TeacherBatch, settings: RankingSettings) -> Tensor:
    return importance_weights(
        position_weights(told.ranking.shape[1], settings.beta).to(logits.device),
        confidence_weights(told.distance),
        consistency_weights(logits, told.ranking, settings.top_k),
        gamma_position=settings.gamma_position,
        gamma_confidence=settings.gamma_confidence,
        gamma_consistency=settings.gamma_consistency,
    )
