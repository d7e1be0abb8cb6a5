"""What a distilled student minimises: its own task, and what the teacher wrote down (DLLM2Rec)."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm2rec.distill.data_bridge import TeacherBatch
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
from llm2rec.distill.settings import DistillSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.catalogue import catalogue_logsumexp, fits_in_a_tile, scores_of
from llm2rec.student.datamodule import SequenceBatch
from llm2rec.student.losses import cross_entropy, dros, sampled_bce
from llm2rec.student.task_loss import ScoredNegatives

__all__ = ["candidate_weights", "distillation_losses", "objective"]


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
        own: `TaskLoss` of these rows, still to be told the logits; None computes what ``settings.task_loss`` names,
            cross-entropy where that is ``student``.
        negatives: One sampled item per row, shape ``(B,)``; needed if ``settings.needs_negatives``.
        sampled: Negatives of the student's own loss; needed if ``settings.ranking.samples``.
        propensity: Of each item, shape ``(N,)``; needed if ``settings.dros.weight`` is not 0.

    Returns:
        ``loss`` and ``loss_student``, and ``loss_dros``, ``loss_ranking`` and ``loss_alignment`` where they are asked
        for, each of shape ``(B,)``.
    """
    ranking = settings.ranking
    in_tiles = ranking.over_catalogue and not fits_in_a_tile(len(users), model.student.n_items, users.device)
    if own is not None and settings.dros.weight == 0 and (in_tiles or not ranking.needs_logits):
        losses = objective_of_few(
            model, users, told, distilled, ranking, own, negatives=negatives, sampled=sampled, in_tiles=in_tiles
        )
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
        losses["loss"] = losses["loss"] + embedding.alignment_weight * losses["loss_alignment"]
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
        own: What `TaskLoss` gave; None as in `distillation_losses`.
        negatives: As in `distillation_losses`.
        propensity: As in `distillation_losses`.
        compared: Logits that the student's own top K is read off, shape ``(B, N)``; ``logits`` if None.

    Returns:
        Losses by name, ``loss`` their total, each of shape ``(B,)``.
    """
    ranking, alpha = settings.ranking, settings.dros.weight
    if settings.task_loss == "sampled_bce":
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


def objective_of_few(
    model: DistilledStudent,
    users: Tensor,
    told: TeacherBatch,
    distilled: Tensor,
    ranking: RankingSettings,
    own: Callable[..., dict[str, Tensor]],
    *,
    negatives: Tensor | None = None,
    sampled: ScoredNegatives | None = None,
    in_tiles: bool = False,
) -> dict[str, Tensor]:
    """`objective` without DROS where no row's scores of all items are held.

    Args:
        model: As in `distillation_losses`.
        users: As there, shape ``(B, D)``.
        told: As there.
        distilled: As there, shape ``(B,)``.
        ranking: Weight and kind of the ranking loss, one of `order_loss`.
        own: As there.
        negatives: As there.
        sampled: As there.
        in_tiles: Whether the ranking loss is over the catalogue, whose sum is then taken tile by tile, once for both
            losses where they have one temperature.

    Returns:
        Losses by name, ``loss`` their total, each of shape ``(B,)``.
    """
    log_total = None
    if in_tiles:
        table = model.student.output_items
        log_total = catalogue_logsumexp(users / ranking.temperature, table.with_padding(), table.n_items)  # (B,)
    losses = _named(own(log_total=log_total if ranking.temperature == 1 else None))
    if ranking.weight > 0:
        raised = order_loss_of_few(model, users, told, ranking, negatives, sampled, log_total)
        losses["loss_ranking"] = distilled * raised
        losses["loss"] = losses["loss"] + ranking.weight * losses["loss_ranking"]
    return losses


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
    # The same loss of a small catalogue, in which candidate k is item k and a negative that is none comes after them.
    places = torch.arange(told.ranking.shape[1], device=users.device).expand_as(told.ranking)
    below = None
    if negatives is not None:
        hits = told.ranking == negatives.unsqueeze(1)
        below = torch.where(hits, places, places.shape[1]).amin(dim=1)
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
