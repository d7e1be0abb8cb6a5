"""Train a student on its own task and on what the teacher wrote down (DLLM2Rec)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.batching import OptimizerStep
from llm2rec.core.engine import Engine
from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.record import TrainingRecord
from llm2rec.core.stepper import MicroBatches
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.distill.evidence import StudentNow
from llm2rec.distill.kd_losses import (
    confidence_weights,
    consistency_weights,
    importance_weights,
    listwise_loss,
    listwise_loss_of,
    negative_term,
    pairwise_loss,
    position_weights,
    ranking_loss,
    robust_term,
    row_confidence_weights,
    stand_in_catalogue,
)
from llm2rec.distill.selection import Selection
from llm2rec.distill.selection_policy import SelectionPolicy
from llm2rec.distill.settings import DistillSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.catalogue import catalogue_logsumexp, fits_in_a_tile, scores_of
from llm2rec.student.datamodule import NegativeSampler, SeenItems, SequenceBatch, SequenceData, TrainingData
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import cross_entropy, dros, popularity_propensity, sampled_bce
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.own_loss import OwnLoss, ScoredNegatives
from llm2rec.student.settings import LossSettings

__all__ = ["distillation_losses", "objective", "train_distilled"]


def train_distilled(
    model: DistilledStudent,
    train: TrainingData,
    teacher: TeacherOutputs,
    validation: SequenceData,
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
        loss: The student's own task where ``settings.own_loss`` leaves it to the student; None for cross-entropy.
        item_optimizer: ``adamw`` or ``rowwise``; see `student_optimizer`.
        select_on: Validation metric that decides.
        seen: Items to leave out of the validation rankings; None ranks all items.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.

    Raises:
        ConfigError: If losses about a whole optimizer step are asked for and a step is divided, if a catalogue is too
            small for the negatives that are asked for, if DROS is asked for twice, if the catalogue is to be estimated
            from negatives that the student's own loss does not draw, or DeepSpeed is to update rows.
        TeacherOutputsError: If the policy needs rows that the teacher has not labelled.
    """
    row_losses = _RowLosses(model, train, teacher, engine, settings, loss or LossSettings())
    training, record = engine.training, TrainingRecord(engine, select_on)

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
        train: TrainingData,
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
    model: DistilledStudent, loss: LossSettings, train: TrainingData, engine: Engine, settings: DistillSettings
) -> OwnLoss | None:
    """The student's own task, or None where the recipe has one."""
    if settings.ranking.samples and (settings.own_loss != "student" or loss.name == "cross_entropy"):
        own = f"student.loss.name is {loss.name!r}"
        raise ConfigError(
            "distill.ranking.over is 'sampled', which needs the negatives of the student's own loss, but "
            f"{own if settings.own_loss == 'student' else f'distill.own_loss is {settings.own_loss!r}'}, which has "
            "none of them; use `student.loss.name=sampled_softmax`, or `distill.ranking.over=catalogue`."
        )
    if settings.own_loss != "student":
        return None
    if loss.dros.weight > 0 and settings.dros.weight > 0:
        raise ConfigError(
            f"student.loss.dros.weight is {loss.dros.weight} and distill.dros.weight is {settings.dros.weight}, which "
            "would count DROS twice; set one of them to 0."
        )
    return OwnLoss(model.student, loss, train.targets, engine.seed)


def distillation_losses(
    model: DistilledStudent,
    users: Tensor,
    batch: SequenceBatch,
    told: TeacherBatch,
    distilled: Tensor,
    settings: DistillSettings,
    *,
    own: Callable[..., dict[str, Tensor]] | None = None,
    negatives: Tensor | None = None,
    sampled: ScoredNegatives | None = None,
    propensity: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of some rows, by name; ``loss`` is their weighted total.

    Args:
        model: Student.
        users: Its user vectors, shape ``(B, D)``.
        batch: The rows.
        told: What the teacher says of them.
        distilled: Weight of each row's distillation losses, shape ``(B,)``.
        settings: Weights of the losses.
        own: `OwnLoss` of these rows, still to be told the logits; None computes what ``settings.own_loss`` names,
            cross-entropy where that is ``student``.
        negatives: One sampled item per row, shape ``(B,)``; needed if ``settings.needs_negatives``.
        sampled: Negatives of the student's own loss; needed if ``settings.ranking.samples``.
        propensity: Of each item, shape ``(N,)``; needed if ``settings.dros.weight`` is not 0.

    Returns:
        ``loss`` and ``loss_student``, and ``loss_dros``, ``loss_ranking`` and ``loss_alignment`` where they are asked
        for, each of shape ``(B,)``.
    """
    ranking, table = settings.ranking, model.student.output_items
    in_tiles = ranking.over_catalogue and not fits_in_a_tile(len(users), table.n_items, users.device)
    if own is not None and settings.dros.weight == 0 and (in_tiles or not ranking.needs_logits):
        log_total = None
        if in_tiles:
            log_total = catalogue_logsumexp(users / ranking.temperature, table.with_padding(), table.n_items)
        losses = _named(own(log_total=log_total if ranking.temperature == 1 else None))
        if ranking.weight > 0:
            losses["loss_ranking"] = distilled * order_loss_of_few(
                model, users, told, ranking, negatives, sampled, log_total
            )
            losses["loss"] = losses["loss"] + ranking.weight * losses["loss_ranking"]
    else:
        logits = model.score(users)  # (B, N)
        weighs = ranking.weight > 0 and ranking.loss == "weighted_bce"
        again = weighs and ranking.gamma_consistency > 0 and not ranking.consistency_dropout
        losses = objective(
            logits,
            batch.targets,
            told,
            distilled,
            settings,
            own=own and own(logits=logits),
            negatives=negatives,
            propensity=propensity,
            compared=model.logits_without_dropout(*batch.inputs) if again else logits,
        )
    if settings.embedding.alignment_weight > 0:
        embedding = settings.embedding
        aligned = model.alignment(batch.targets, embedding.alignment, embedding.alignment_temperature)
        losses["loss_alignment"] = distilled * aligned
        losses["loss"] = losses["loss"] + settings.embedding.alignment_weight * losses["loss_alignment"]
    return losses


def objective(
    logits: Tensor,
    targets: Tensor,
    told: TeacherBatch,
    distilled: Tensor,
    settings: DistillSettings,
    *,
    own: dict[str, Tensor] | None = None,
    negatives: Tensor | None = None,
    propensity: Tensor | None = None,
    compared: Tensor | None = None,
) -> dict[str, Tensor]:
    """What of `distillation_losses` is a function of the logits: ``L_student + α L_dros + λ_d L_ranking``.

    Args:
        logits: Shape ``(B, N)``.
        targets: Shape ``(B,)``.
        told: What the teacher says of the rows.
        distilled: Weight of each row's ranking loss, shape ``(B,)``.
        settings: Weights and kinds of the losses.
        own: What `OwnLoss` gave; None as in `distillation_losses`.
        negatives: As in `distillation_losses`.
        propensity: As in `distillation_losses`.
        compared: Logits that the student's own top K is read off, shape ``(B, N)``; ``logits`` if None.

    Returns:
        Losses by name, ``loss`` their total, each of shape ``(B,)``.
    """
    ranking, alpha = settings.ranking, settings.dros.weight
    if settings.own_loss == "sampled_bce":
        assert negatives is not None
        own = {"loss": sampled_bce(logits, targets, negatives)}
    losses = _named(own or {"loss": cross_entropy(logits, targets)})
    total = losses.pop("loss")
    if alpha > 0:
        assert propensity is not None
        asked = torch.cat([targets.unsqueeze(1), *([told.ranking] if settings.robust_ranking else [])], dim=1)
        robust = dros(logits, asked, propensity, settings.dros.beta)  # (B, 1 or 1 + K), the target's first
        losses["loss_dros"] = robust[:, 0]
        total = total + alpha * losses["loss_dros"]
    if ranking.weight > 0 and ranking.loss != "weighted_bce":
        losses["loss_ranking"] = distilled * order_loss(logits, told, ranking, negatives)
        total = total + ranking.weight * losses["loss_ranking"]
    elif ranking.weight > 0:
        weights = candidate_weights(logits if compared is None else compared, told, ranking)  # (B, K)
        raised = ranking_loss(logits, told.ranking, weights)  # (B,)
        if ranking.negative != "none":
            assert negatives is not None
            raised = raised + negative_term(logits, negatives, weights, ranking.negative)
        if settings.robust_ranking:
            raised = raised + alpha * robust_term(robust[:, 1:], weights, settings.dros.in_ranking, distilled)
        losses["loss_ranking"] = distilled * raised
        total = total + ranking.weight * losses["loss_ranking"]
    return {"loss": total, **losses}


def _named(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's own losses under the names they have beside others."""
    return {"loss": own["loss"], "loss_student": own["loss"], **own}


def order_loss(logits: Tensor, told: TeacherBatch, settings: RankingSettings, negatives: Tensor | None) -> Tensor:
    """The ranking losses that are not the paper's, as the settings say; returns shape ``(B,)``."""
    if settings.loss == "listwise":
        over = "candidates" if settings.over == "candidates" else "catalogue"  # no sample where all scores are there
        return listwise_loss(logits, told.ranking, told.distance, temperature=settings.temperature, over=over)
    below = negatives if settings.negative == "ranked_last" else None
    return pairwise_loss(logits, told.ranking, settings.loss, margin=settings.margin, negatives=below)


def order_loss_of_few(
    model: DistilledStudent,
    users: Tensor,
    told: TeacherBatch,
    settings: RankingSettings,
    negatives: Tensor | None,
    sampled: ScoredNegatives | None,
    log_total: Tensor | None = None,
) -> Tensor:
    """`order_loss` without the scores of the catalogue: only candidates and negatives are scored; shape ``(B,)``.

    Over the catalogue it takes ``log_total``, the logarithm of its sum at the settings' temperature, shape ``(B,)``.
    """
    asked = told.ranking
    if log_total is not None:
        scores = scores_of(users, model.student.output_items, asked) / settings.temperature
        return listwise_loss_of(scores, log_total, told.distance, settings.temperature)
    if settings.negative == "ranked_last":
        assert negatives is not None
        asked = torch.cat([asked, negatives.unsqueeze(1)], dim=1)
    scores = torch.einsum("bd,bkd->bk", users, model.student.output_items(asked))  # (B, K), or (B, K + 1)
    if settings.samples:
        assert sampled is not None
        scores = stand_in_catalogue(
            scores, asked, sampled.scores, sampled.items, sampled.log_expected, settings.temperature
        )
    # The same loss of a small catalogue, in which candidate k is item k and a negative comes after them.
    places = torch.arange(told.ranking.shape[1], device=users.device).expand_as(told.ranking)
    below = None if negatives is None else torch.full_like(negatives, told.ranking.shape[1])
    return order_loss(scores, replace(told, ranking=places), settings, below)


def candidate_weights(logits: Tensor, told: TeacherBatch, settings: RankingSettings) -> Tensor:
    """Weigh the teacher's candidates as the settings say; returns shape ``(B, K)``."""
    n_candidates, floor = told.ranking.shape[1], settings.weight_floor
    if settings.confidence == "per_row":
        assert told.target_distance is not None
        confidence = row_confidence_weights(told.target_distance, n_candidates)
    else:
        confidence = confidence_weights(told.distance, floor)
    return importance_weights(
        position_weights(n_candidates, settings.beta).to(logits.device),
        confidence,
        consistency_weights(
            logits, told.ranking, settings.top_k, floor=floor, normalise=settings.normalise_consistency
        ),
        gamma_position=settings.gamma_position,
        gamma_confidence=settings.gamma_confidence,
        gamma_consistency=settings.gamma_consistency,
        renormalise=settings.renormalise,
    )
