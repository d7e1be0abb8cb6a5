"""The task loss of a student, selected by `LossSettings`."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.student.catalogue import blocked_cross_entropy, blocked_dros, fits_in_a_tile
from llm2rec.student.losses import (
    calibrated_bce,
    calibration_power,
    cross_entropy,
    dros,
    popularity_propensity,
    sampled_softmax,
)
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.negatives import Negatives, Proposal
from llm2rec.student.settings import LossSettings

__all__ = ["ScoredNegatives", "TaskLoss"]


@dataclass(frozen=True)
class ScoredNegatives:
    """Negatives of some rows with their scores.

    Attributes:
        items: Item ids of shape ``(K,)`` if rows share them, else ``(B, K)``.
        scores: Shape ``(B, K)``.
        log_expected: Log of the expected count of each item among the K, ``log(K q_j)``, of the shape of ``items``.
    """

    items: Tensor
    scores: Tensor
    log_expected: Tensor


class TaskLoss:
    """Task losses of rows from their user vectors, without a ``(B, N)`` matrix for large catalogues.

    Args:
        model: The student, unwrapped; scores with its output table.
        settings: Loss settings.
        targets: Targets of all training rows, shape ``(M,)``, for item popularity.
        seed: Seed of the run, for negatives.

    Raises:
        ConfigError: If the catalogue does not have more items than there are negatives.
    """

    def __init__(self, model: SequentialRecommender, settings: LossSettings, targets: Tensor, seed: int) -> None:
        self._model, self._settings = model, settings.completed()
        self._negatives, self._propensity = None, None
        if self._settings.n_negatives is not None:
            popularity = targets if self._settings.proposal == "popularity" else None
            self._negatives = Negatives(
                Proposal(model.n_items, popularity),
                self._settings.n_negatives,
                self._settings.sharing == "step",
                seed,
            )
        if settings.dros.weight > 0:
            self._propensity = popularity_propensity(targets, model.n_items, settings.dros.propensity_power).float()

    def __call__(
        self,
        users: Tensor,
        targets: Tensor,
        rows: NDArray[np.int64],
        *,
        epoch: int,
        step: int,
        logits: Tensor | None = None,
        negatives: ScoredNegatives | None = None,
        log_total: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of some rows, by name; ``loss`` is their total.

        Args:
            users: User vectors, shape ``(B, D)``.
            targets: Item ids of shape ``(B,)``.
            rows: Row numbers, shape ``(B,)``.
            epoch: Epoch, for the negatives of rows.
            step: Global step, for shared negatives.
            logits: Scores of all items, shape ``(B, N)``, if already computed.
            negatives: Result of `negatives` for these rows, if already computed.
            log_total: `catalogue_logsumexp` of these users, shape ``(B,)``, if already computed.

        Returns:
            ``loss``; with DROS ``loss_student`` and ``loss_dros`` beside it. Each of shape ``(B,)``, in nats.
        """
        weight, beta = self._settings.dros.weight, self._settings.dros.beta
        on_catalogue = self._negatives is None or weight > 0
        if logits is None and on_catalogue and fits_in_a_tile(len(users), self._model.n_items, users.device):
            logits = self._model.score(users)
        if self._negatives is not None:
            loss = self._sampled(users, targets, negatives or self.negatives(users, rows, epoch=epoch, step=step))
        elif logits is None:
            loss = blocked_cross_entropy(users, self._model.output_items, targets, log_total)
        else:
            loss = cross_entropy(logits, targets)
        if self._propensity is None:
            return {"loss": loss}
        propensity = self._propensity.to(users.device)
        if logits is None:
            robust = blocked_dros(users, self._model.output_items, targets, propensity, beta)
        else:
            robust = dros(logits, targets.unsqueeze(1), propensity, beta).squeeze(1)
        return {"loss": loss + weight * robust, "loss_student": loss, "loss_dros": robust}

    def negatives(self, users: Tensor, rows: NDArray[np.int64], *, epoch: int, step: int) -> ScoredNegatives:
        """Draw the negatives of some rows and score them; arguments as in `__call__`."""
        assert self._negatives is not None, f"{self._settings.name} has no negatives"
        items = self._negatives.draw(rows, epoch, step).to(users.device)
        vectors = self._model.output_items(items)  # (K, D) or (B, K, D)
        scores = users @ vectors.T if vectors.ndim == 2 else torch.einsum("bd,bkd->bk", users, vectors)
        log_expected = self._negatives.proposal.log_probability(items) + np.log(self._negatives.n_negatives)
        return ScoredNegatives(items, scores, log_expected)

    def _sampled(self, users: Tensor, targets: Tensor, negatives: ScoredNegatives) -> Tensor:
        """Losses with sampled negatives, shape ``(B,)``."""
        settings = self._settings
        positive = (users * self._model.output_items(targets)).sum(dim=1)
        hits = negatives.items == targets.unsqueeze(1)  # (B, K)
        if settings.name == "sampled_softmax":
            return sampled_softmax(positive, negatives.scores, negatives.log_expected, hits)
        assert settings.n_negatives is not None
        power = calibration_power(settings.n_negatives, self._model.n_items, settings.calibration or 0.0)
        return calibrated_bce(positive, negatives.scores, hits, power)
