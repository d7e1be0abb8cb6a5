"""Task losses of students. Each returns one value per row, in nats; the trainer takes the mean."""

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
    """Narrow formats as float32; float32 and float64 as they are."""
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

    The halves make the mean over rows the mean over all 2B scores, as in the released DLLM2Rec program (``main.py``,
    "bce loss"); other papers sum the two.

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
    """Cross-entropy whose sum over the catalogue is estimated from a sample, with log-Q correction.

    ``log( exp(s_t) + Σ_{k: j_k ≠ t} exp(s_{j_k} - log(K q_{j_k})) ) - s_t``: each negative stands for all the items
    that might have been drawn in its place, so that the expectation of the sum is that over the whole catalogue,
    whatever the proposal (Bengio and Senécal, 2008). The target is always there, not drawn, and has no correction.

    Args:
        positive: Scores s_t of the targets, shape ``(B,)``.
        negative: Scores of the K negatives, drawn with replacement, shape ``(B, K)``.
        log_expected: How often each was to be expected among them, ``log(K q_j)``, shape ``(K,)`` or ``(B, K)``.
        hits: Where a negative is the target by accident and does not count, shape ``(B, K)``.

    Returns:
        Losses of shape ``(B,)``, in nats; with all items drawn just as often as expected, `cross_entropy`.
    """
    own = at_least_float32(positive).unsqueeze(1)
    corrected = (at_least_float32(negative) - log_expected).masked_fill(hits, -torch.inf)
    return (torch.cat([own, corrected], dim=1) - own).logsumexp(dim=1)


def calibrated_bce(positive: Tensor, negative: Tensor, hits: Tensor, power: float = 1.0) -> Tensor:
    """Binary cross-entropy of the target and K negatives: ``-(β log σ(s⁺) + Σ_k log(1 - σ(s⁻_k))) / (K + 1)``.

    With ``β = 1`` the loss of SASRec (Kang and McAuley, arXiv 1808.09781, K = 1) as a mean; with a smaller
    one gBCE (Petrov and Macdonald, arXiv 2308.07192), see `calibration_power`.

    Args:
        positive: Scores s⁺ of the targets, shape ``(B,)``.
        negative: Scores s⁻, shape ``(B, K)``.
        hits: Where a negative is the target by accident and does not count, neither in the sum nor in K; ``(B, K)``.
        power: β.

    Returns:
        Losses of shape ``(B,)``, in nats.
    """
    own = power * functional.logsigmoid(at_least_float32(positive))
    others = functional.logsigmoid(-at_least_float32(negative)).masked_fill(hits, 0.0).sum(dim=1)
    return -(own + others) / (1 + (~hits).sum(dim=1))


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
    """How likely each item is to be seen at all: ``p_j = ((c_j + 1) / Σ_i (c_i + 1)) ^ power``.

    The released programs of DROS and DLLM2Rec (``calcu_propensity_score``) count training targets and use 0.05, which
    brings all items close together.

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
    """Distributionally robust loss of each item as if it were its row's target (DROS, Yang et al., SIGIR 2023).

    ``log( Σ_{j ≠ i} exp(p_j s_j² / β) + exp(p_i (s_i - 1)² / β) )``: scores are asked to be 1 for item i and 0 for all
    others, and the exponential puts the weight on the items that are worst off (doi 10.1145/3539618.3591624).

    The released program subtracts the item's own term from the sum over the catalogue and adds 1e-24, which no float
    can hold beside a sum of at least N; we leave the term out, so that nothing cancels, and nothing overflows below
    ``|s| = 1e19``.

    Args:
        logits: s, shape ``(B, N)``.
        items: i, shape ``(B, K)``; an item may occur twice.
        propensity: p, shape ``(N,)``.
        beta: Robust radius β; smaller looks at the worst items more.

    Returns:
        Losses of shape ``(B, K)``, in nats. The sum over the catalogue is done once, not K times.
    """
    scores = at_least_float32(logits)
    strength = propensity.to(scores) / beta  # (N,)
    rest = _Rest.apply(scores, items, strength)  # (B, 1): all items but those of ``items``
    asked, own = strength[items], scores.gather(1, items)  # (B, K)
    as_target = asked * (own - 1).square()  # (B, K)
    as_other = (asked * own.square()).unsqueeze(1)  # (B, 1, K)
    same = items.unsqueeze(2) == items.unsqueeze(1)  # (B, K, K)
    # Of the items asked about, column j counts towards row i unless it is item i, or was counted in an earlier column.
    repeated = same.tril(-1).any(dim=2)  # (B, K)
    others = as_other.masked_fill(same | repeated.unsqueeze(1), -torch.inf)  # (B, K, K)
    return torch.cat([others, rest.unsqueeze(2).expand(-1, items.shape[1], 1), as_target.unsqueeze(2)], 2).logsumexp(2)


class _Rest(torch.autograd.Function):
    """``log Σ_j exp(q_j s_j²)`` over the items j that are not asked about, shape ``(B, 1)``.

    Of scores s ``(B, N)``, items asked about ``(B, K)`` and strengths q ``(N,)``. What autograd makes of these lines
    reads and writes the catalogue's scores three times as often.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, items: Tensor, strength: Tensor) -> Tensor:
        slopes = scores * strength
        terms = (slopes * scores).scatter_(1, items, -torch.inf)
        largest = terms.amax(dim=1, keepdim=True).clamp_(min=0)  # no term is smaller, but where there is none
        terms.sub_(largest).exp_()
        total = terms.sum(dim=1, keepdim=True)
        ctx.save_for_backward(terms, slopes, total)
        return largest + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        terms, slopes, total = ctx.saved_tensors
        return (terms * slopes).mul_(2 * gradient / total.clamp(min=1)), None, None
