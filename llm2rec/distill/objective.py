"""Objective of a distilled student: ``L = L_task + α L_dros + λ_d L_ranking + alignment_weight · L_alignment``."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm2rec.distill.data_bridge import TeacherBatch
from llm2rec.distill.kd_losses import (
    confidence_weights,
    consistency_weights,
    importance_weights,
    listwise_loss,
    negative_term,
    pairwise_loss,
    position_weights,
    ranking_loss,
    robust_term,
    row_confidence_weights,
    sampled_catalogue,
)
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.catalogue import catalogue_logsumexp, fits_in_a_tile, scores_of
from llm2rec.student.datamodule import SequenceBatch
from llm2rec.student.items import ItemTable
from llm2rec.student.losses import at_least_float32, cross_entropy, dros, sampled_bce
from llm2rec.student.task_loss import ScoredNegatives

__all__ = ["CatalogueScores", "TableScores", "candidate_weights", "distillation_losses", "objective", "order_loss"]


@dataclass(frozen=True)
class CatalogueScores:
    """Scores of a batch as a ``(B, N)`` matrix.

    Attributes:
        logits: Shape ``(B, N)``.
    """

    logits: Tensor

    def of(self, items: Tensor) -> Tensor:
        """Scores of items ``(B, K)``, of that shape."""
        return self.logits.gather(1, items)

    def scaled(self, temperature: float) -> "CatalogueScores":
        """The scores divided by T, in float32 at least."""
        return CatalogueScores(at_least_float32(self.logits) / temperature)

    def log_total(self) -> Tensor:
        """``log Σ_j exp s_j`` over the catalogue, shape ``(B,)``."""
        return self.logits.logsumexp(dim=1)


@dataclass(frozen=True)
class TableScores:
    """Scores of a batch, computed on demand for selected items, without a ``(B, N)`` matrix.

    Attributes:
        users: User vectors, shape ``(B, D)``.
        table: Output vectors of the items.
        total: `log_total` of the scaled scores, shape ``(B,)``, if the ranking loss is over the catalogue.
        temperature: Divisor of the scores, T.
    """

    users: Tensor
    table: ItemTable
    total: Tensor | None = None
    temperature: float = 1.0

    def of(self, items: Tensor) -> Tensor:
        """See `CatalogueScores.of`."""
        if self.total is not None:  # in the precision of the sum over the catalogue
            return scores_of(self.users, self.table, items) / self.temperature
        return at_least_float32(torch.einsum("bd,bkd->bk", self.users, self.table(items))) / self.temperature

    def scaled(self, temperature: float) -> "TableScores":
        """See `CatalogueScores.scaled`."""
        return replace(self, temperature=temperature)

    def log_total(self) -> Tensor:
        """See `CatalogueScores.log_total`."""
        assert self.total is not None
        return self.total


def distillation_losses(
    model: DistilledStudent,
    users: Tensor,
    batch: SequenceBatch,
    teacher_batch: TeacherBatch,
    row_weights: Tensor,
    settings: DistillSettings,
    *,
    task_loss: Callable[..., dict[str, Tensor]] | None = None,
    negatives: Tensor | None = None,
    sampled: ScoredNegatives | None = None,
    propensity: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses of a batch by name; ``loss`` is their weighted total.

    Args:
        model: Student.
        users: Its user vectors, shape ``(B, D)``.
        batch: The rows.
        teacher_batch: Teacher outputs of the rows.
        row_weights: Weight of each row's distillation losses, shape ``(B,)``.
        settings: Distillation recipe.
        task_loss: `TaskLoss` of these rows, called with ``logits`` or ``log_total``; None computes the loss that
            ``settings.task_loss`` names, cross-entropy where that is ``student``.
        negatives: One sampled item per row, shape ``(B,)``; needed if ``settings.needs_negatives``.
        sampled: Negatives of the task loss; needed if ``settings.ranking.samples``.
        propensity: Propensity of each item, shape ``(N,)``; needed if ``settings.dros.weight`` is not 0.

    Returns:
        ``loss`` and ``loss_student``, and ``loss_dros``, ``loss_ranking`` and ``loss_alignment`` if they are enabled,
        each of shape ``(B,)``.
    """
    ranking, table = settings.ranking, model.student.output_items
    in_tiles = ranking.over_catalogue and not fits_in_a_tile(len(users), model.student.n_items, users.device)
    if task_loss is not None and settings.dros.weight == 0 and (in_tiles or not ranking.needs_logits):
        total = None
        if in_tiles:  # at temperature 1 the task loss and the ranking loss share one sum
            total = catalogue_logsumexp(users / ranking.temperature, table.with_padding(), table.n_items)  # (B,)
        losses = _with_task_names(task_loss(log_total=total if ranking.temperature == 1 else None))
        if ranking.weight > 0:
            scores = TableScores(users, table, total)
            _add_ranking(losses, row_weights * order_loss(scores, teacher_batch, ranking, negatives, sampled), ranking)
    else:
        logits = model.score(users)  # (B, N)
        weighs = ranking.weight > 0 and ranking.loss == "weighted_bce"
        again = weighs and ranking.gamma_consistency > 0 and not ranking.consistency_dropout
        losses = objective(
            logits,
            batch.targets,
            teacher_batch,
            row_weights,
            settings,
            task_losses=task_loss and task_loss(logits=logits),
            negatives=negatives,
            propensity=propensity,
            consistency_logits=model.logits_without_dropout(*batch.inputs) if again else logits,
        )
    if settings.embedding.alignment_weight > 0:
        _add_alignment(losses, row_weights, model, batch.targets, settings.embedding)
    return losses


def _add_alignment(
    losses: dict[str, Tensor],
    row_weights: Tensor,
    model: DistilledStudent,
    targets: Tensor,
    embedding: EmbeddingSettings,
) -> None:
    aligned = model.alignment(targets, embedding.alignment, embedding.alignment_temperature)
    losses["loss_alignment"] = row_weights * aligned
    losses["loss"] = losses["loss"] + embedding.alignment_weight * losses["loss_alignment"]


def objective(
    logits: Tensor,
    targets: Tensor,
    teacher_batch: TeacherBatch,
    row_weights: Tensor,
    settings: DistillSettings,
    *,
    task_losses: dict[str, Tensor] | None = None,
    negatives: Tensor | None = None,
    propensity: Tensor | None = None,
    consistency_logits: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of `distillation_losses` that depend on the logits only: ``L_task + α L_dros + λ_d L_ranking``.

    Args:
        logits: Shape ``(B, N)``.
        targets: Shape ``(B,)``.
        teacher_batch: The teacher's outputs for the rows.
        row_weights: Weight of each row's ranking loss, shape ``(B,)``.
        settings: Distillation recipe.
        task_losses: Result of `TaskLoss`; None as in `distillation_losses`.
        negatives: As in `distillation_losses`.
        propensity: As in `distillation_losses`.
        consistency_logits: Logits that give the student's top K, shape ``(B, N)``; ``logits`` if None.

    Returns:
        Losses by name, ``loss`` their total, each of shape ``(B,)``.
    """
    ranking, alpha, scores = settings.ranking, settings.dros.weight, CatalogueScores(logits)
    if settings.task_loss == "sampled_bce":
        assert negatives is not None
        task_losses = {"loss": sampled_bce(logits, targets, negatives)}
    losses = _with_task_names(task_losses or {"loss": cross_entropy(logits, targets)})
    if alpha > 0:
        assert propensity is not None
        candidates = [teacher_batch.ranking] if settings.robust_ranking else []
        robust = dros(logits, torch.cat([targets.unsqueeze(1), *candidates], dim=1), propensity, settings.dros.beta)
        losses["loss_dros"] = robust[:, 0]  # of (B, 1 or 1 + K), the target's first
        losses["loss"] = losses["loss"] + alpha * losses["loss_dros"]
    if ranking.weight > 0 and ranking.loss != "weighted_bce":
        _add_ranking(losses, row_weights * order_loss(scores, teacher_batch, ranking, negatives), ranking)
    elif ranking.weight > 0:
        weights = candidate_weights(
            logits if consistency_logits is None else consistency_logits, teacher_batch, ranking
        )
        raised = ranking_loss(scores.of(teacher_batch.ranking), weights)  # (B,)
        if ranking.negative != "none":
            assert negatives is not None
            raised = raised + negative_term(scores.of(negatives.unsqueeze(1)).squeeze(1), weights, ranking.negative)
        if settings.robust_ranking:
            raised = raised + alpha * robust_term(robust[:, 1:], weights, settings.dros.in_ranking, row_weights)
        _add_ranking(losses, row_weights * raised, ranking)
    return losses


def _with_task_names(task_losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the total of the task losses as ``loss_student``."""
    return {"loss": task_losses["loss"], "loss_student": task_losses["loss"], **task_losses}


def _add_ranking(losses: dict[str, Tensor], loss_ranking: Tensor, settings: RankingSettings) -> None:
    losses["loss_ranking"] = loss_ranking
    losses["loss"] = losses["loss"] + settings.weight * loss_ranking


def order_loss(
    scores: CatalogueScores | TableScores,
    teacher_batch: TeacherBatch,
    settings: RankingSettings,
    negatives: Tensor | None = None,
    sampled: ScoredNegatives | None = None,
) -> Tensor:
    """The listwise and pairwise ranking losses, which compare candidates with each other or with the catalogue.

    Args:
        scores: Student's scores.
        teacher_batch: The teacher's outputs.
        settings: Ranking settings.
        negatives: One sampled item per row, shape ``(B,)``; needed for ``negative=ranked_last``.
        sampled: Negatives that estimate the sum over the catalogue for ``over=sampled``; None computes it exactly.

    Returns:
        Shape ``(B,)``.
    """
    ranking, temperature = teacher_batch.ranking, settings.temperature
    if settings.loss == "listwise":
        if settings.samples and sampled is not None:
            estimate = sampled_catalogue(
                scores.of(ranking), ranking, sampled.scores, sampled.items, sampled.log_expected, temperature
            )
            estimate = estimate / temperature  # (B, K + n), the candidates first
            candidates, log_total = estimate[:, : ranking.shape[1]], estimate.logsumexp(dim=1)
        else:
            scaled = scores.scaled(temperature)
            candidates = scaled.of(ranking)  # (B, K)
            log_total = candidates.logsumexp(dim=1) if settings.over == "candidates" else scaled.log_total()
        return listwise_loss(candidates, log_total, teacher_batch.distance, temperature)
    if settings.negative != "ranked_last":
        return pairwise_loss(scores.of(ranking), settings.loss, margin=settings.margin)
    assert negatives is not None
    last = negatives.unsqueeze(1)  # (B, 1)
    ordered, repeated = scores.of(torch.cat([ranking, last], dim=1)), (ranking == last).any(dim=1)
    return pairwise_loss(ordered, settings.loss, margin=settings.margin, repeated=repeated)


def candidate_weights(logits: Tensor, teacher_batch: TeacherBatch, settings: RankingSettings) -> Tensor:
    """Importance weights of the teacher's candidates, shape ``(B, K)``."""
    n_candidates, floor = teacher_batch.ranking.shape[1], settings.weight_floor
    if settings.confidence == "per_row":
        assert teacher_batch.target_distance is not None
        confidence = row_confidence_weights(teacher_batch.target_distance, n_candidates)
    else:
        confidence = confidence_weights(teacher_batch.distance, floor)
    return importance_weights(
        position_weights(n_candidates, settings.beta).to(logits.device),
        confidence,
        consistency_weights(
            logits, teacher_batch.ranking, settings.top_k, floor=floor, normalise=settings.normalise_consistency
        ),
        gamma_position=settings.gamma_position,
        gamma_confidence=settings.gamma_confidence,
        gamma_consistency=settings.gamma_consistency,
        renormalise=settings.renormalise,
    )
