"""Task losses of students; one value per row, in nats. The trainer takes the mean."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = [
    "at_least_float32",
    "calibrated_bce",
    "calibration_power",
    "cross_entropy",
    "dros",
    "popularity_propensity",
    "sampled_bce",
    "sampled_softmax",
]


def at_least_float32(values: Tensor) -> Tensor:
    """Cast to float32 unless ``values`` are float32 or float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probability of the target under a softmax over the whole catalogue, in float32 at least.

    Args:
        logits: Shape ``(B, N)``.
        targets: Item ids of shape ``(B,)``.

    Returns:
        Losses of shape ``(B,)``, in nats.
    """
    return functional.cross_entropy(at_least_float32(logits), targets, reduction="none")


def sampled_bce(logits: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy of the target and one sampled negative: ``-½ (log σ(s⁺) + log(1 - σ(s⁻)))``.

    With the factor ½, the mean over rows is the mean over all 2B scores, as in the released DLLM2Rec program
    (``main.py``, "bce loss"); other papers sum the two terms.

    Args:
        logits: Shape ``(B, N)``.
        targets: Item ids of shape ``(B,)``.
        negatives: Item ids of shape ``(B,)``, one per row; see `NegativeSampler`.

    Returns:
        Losses of shape ``(B,)``, in nats.
    """
    scores = at_least_float32(logits.gather(1, torch.stack([targets, negatives], dim=1)))
    return -0.5 * (functional.logsigmoid(scores[:, 0]) + functional.logsigmoid(-scores[:, 1]))


def sampled_softmax(positive: Tensor, negative: Tensor, log_expected: Tensor, hits: Tensor) -> Tensor:
    """Sampled softmax with log-Q correction: cross-entropy with the sum over the catalogue estimated from a sample.

    ``log( exp(s_t) + Σ_{k: j_k ≠ t} exp(s_{j_k} - log(K q_{j_k})) ) - s_t``: the correction makes the expectation of
    the sum equal to the sum over the catalogue for any proposal (Bengio and Senécal, 2008). The target is always
    included and needs no correction.

    Args:
        positive: Scores s_t of the targets, shape ``(B,)``.
        negative: Scores of the K negatives, drawn with replacement, shape ``(B, K)``.
        log_expected: Log of the expected count of each negative, ``log(K q_j)``, shape ``(K,)`` or ``(B, K)``.
        hits: Accidental hits, where a negative is the target; masked. Shape ``(B, K)``.

    Returns:
        Losses of shape ``(B,)``, in nats; equal to `cross_entropy` if every item is drawn as often as expected.
    """
    target = at_least_float32(positive).unsqueeze(1)
    corrected = (at_least_float32(negative) - log_expected).masked_fill(hits, -torch.inf)
    return (torch.cat([target, corrected], dim=1) - target).logsumexp(dim=1)


def calibrated_bce(positive: Tensor, negative: Tensor, hits: Tensor, power: float = 1.0) -> Tensor:
    """Binary cross-entropy of the target and K negatives: ``-(β log σ(s⁺) + Σ_k log(1 - σ(s⁻_k))) / (K + 1)``.

    With ``β = 1`` this is the loss of SASRec (Kang and McAuley, arXiv 1808.09781, K = 1) as a mean; with a smaller β it
    is gBCE (Petrov and Macdonald, arXiv 2308.07192), see `calibration_power`.

    Args:
        positive: Scores s⁺ of the targets, shape ``(B,)``.
        negative: Scores s⁻, shape ``(B, K)``.
        hits: Accidental hits, where a negative is the target; left out of the sum and of K. Shape ``(B, K)``.
        power: β.

    Returns:
        Losses of shape ``(B,)``, in nats.
    """
    of_target = power * functional.logsigmoid(at_least_float32(positive))
    of_negatives = functional.logsigmoid(-at_least_float32(negative)).masked_fill(hits, 0.0).sum(dim=1)
    return -(of_target + of_negatives) / (1 + (~hits).sum(dim=1))


def calibration_power(n_negatives: int, n_items: int, calibration: float) -> float:
    """β of gBCE: ``α (t (1 - 1/α) + 1/α)`` with the sampling rate ``α = K / (N - 1)`` (arXiv 2308.07192).

    Args:
        n_negatives: K.
        n_items: N.
        calibration: t; 0 is plain binary cross-entropy, 1 gives scores whose sigmoids are probabilities.
    """
    rate = n_negatives / (n_items - 1)
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def popularity_propensity(targets: Tensor, n_items: int, power: float) -> Tensor:
    """Propensity of each item to be observed: ``p_j = ((c_j + 1) / Σ_i (c_i + 1)) ^ power``.

    The released programs of DROS and DLLM2Rec (``calcu_propensity_score``) count training targets and use 0.05, which
    makes the propensities of all items similar.

    Args:
        targets: Targets of all training rows, shape ``(M,)``; c_j counts item j.
        n_items: Number of items, N.
        power: 0 makes all items equal.

    Returns:
        Shape ``(N,)``, float64, in (0, 1].
    """
    counts = torch.bincount(targets.long(), minlength=n_items).double() + 1
    return (counts / counts.sum()) ** power


def dros(logits: Tensor, items: Tensor, propensity: Tensor, beta: float) -> Tensor:
    """Distributionally robust loss with each of ``items`` as the target of its row (DROS, Yang et al., SIGIR 2023).

    ``log( Σ_{j ≠ i} exp(p_j s_j² / β) + exp(p_i (s_i - 1)² / β) )``: the target score is 1 for item i and 0 for all
    others, and the exponential emphasises the items with the largest errors (doi 10.1145/3539618.3591624).

    The released program subtracts the term of item i from the sum over the catalogue and adds 1e-24, which vanishes
    next to a sum of at least N. This function leaves the term out of the sum, so that nothing cancels, and nothing
    overflows below ``|s| = 1e19``.

    Args:
        logits: s, shape ``(B, N)``.
        items: i, shape ``(B, K)``; an item may occur twice.
        propensity: p, shape ``(N,)``.
        beta: Robust radius β; smaller values put more weight on the worst items.

    Returns:
        Losses of shape ``(B, K)``, in nats. The sum over the catalogue is computed once, not K times.
    """
    scores = at_least_float32(logits)
    strength = propensity.to(scores) / beta  # (N,)
    rest = _Rest.apply(scores, items, strength)  # (B, 1): all items but those of ``items``
    item_strength, item_scores = strength[items], scores.gather(1, items)  # (B, K)
    as_target = item_strength * (item_scores - 1).square()  # (B, K)
    as_other = (item_strength * item_scores.square()).unsqueeze(1)  # (B, 1, K)
    same = items.unsqueeze(2) == items.unsqueeze(1)  # (B, K, K)
    # Column j counts towards row i unless it is the same item, or a repetition of an earlier column.
    repeated = same.tril(-1).any(dim=2)  # (B, K)
    others = as_other.masked_fill(same | repeated.unsqueeze(1), -torch.inf)  # (B, K, K)
    return torch.cat([others, rest.unsqueeze(2).expand(-1, items.shape[1], 1), as_target.unsqueeze(2)], 2).logsumexp(2)


class _Rest(torch.autograd.Function):
    """``log Σ_j exp(q_j s_j²)`` over the items j outside ``items``, shape ``(B, 1)``.

    Inputs are scores s ``(B, N)``, items ``(B, K)`` and strengths q ``(N,)``. Autograd of the same lines would read and
    write the scores three times as often.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, items: Tensor, strength: Tensor) -> Tensor:
        slopes = scores * strength
        terms = (slopes * scores).scatter_(1, items, -torch.inf)
        largest = terms.amax(dim=1, keepdim=True).clamp_(min=0)  # terms are at least 0; -inf if no item is left
        terms.sub_(largest).exp_()
        total = terms.sum(dim=1, keepdim=True)
        ctx.save_for_backward(terms, slopes, total)
        return largest + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        terms, slopes, total = ctx.saved_tensors
        return (terms * slopes).mul_(2 * gradient / total.clamp(min=1)), None, None
