"""The distillation losses of DLLM2Rec (arXiv 2405.00338, section 4). Pure functions, one value per row, in nats.

Symbols: B rows, K teacher candidates, N items, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "alignment_loss",
    "confidence_weights",
    "consistency_weights",
    "importance_weights",
    "position_weights",
    "ranking_loss",
]


def position_weights(n_candidates: int, beta: float) -> Tensor:
    """Weigh candidates by rank: ``w_p ∝ exp(-rank / β)``, summing to 1 over K.

    Args:
        n_candidates: Candidates per row, K.
        beta: Ranks over which the weight falls by a factor e.

    Returns:
        Shape ``(K,)``, float32.
    """
    return torch.softmax(-torch.arange(n_candidates, dtype=torch.float32) / beta, dim=0)


def confidence_weights(distance: Tensor) -> Tensor:
    """Weigh candidates by the teacher's confidence: ``w_c ∝ exp(-distance)``, summing to 1 over K.

    The paper has one distance per row (from the generated text to the true item); the released program reads one per
    candidate, and so do we. With negative log-probabilities as distances this is the teacher's distribution over its
    own top K.

    Args:
        distance: Lower means surer, shape ``(B, K)``.

    Returns:
        Shape ``(B, K)``, float32.
    """
    return torch.softmax(-distance.float(), dim=1)


def consistency_weights(student_logits: Tensor, ranking: Tensor, top_k: int) -> Tensor:
    """Weigh candidates on which student and teacher agree: ``w_o = 1`` in the student's top K too, else 0.

    Args:
        student_logits: Shape ``(B, N)``; no gradient flows through the choice.
        ranking: Teacher's candidates, shape ``(B, K)``.
        top_k: Length of the student's own list.

    Returns:
        Shape ``(B, K)``, float32, 0 or 1.
    """
    logits = student_logits.detach()
    threshold = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]  # the worst score that is still in
    return (logits.gather(1, ranking) >= threshold).float()


def importance_weights(
    position: Tensor,
    confidence: Tensor,
    consistency: Tensor,
    *,
    gamma_position: float,
    gamma_confidence: float,
    gamma_consistency: float,
) -> Tensor:
    """Mix the three weights and renormalise over K, so that each row's candidates weigh 1 together.

    Args:
        position: Shape ``(K,)``.
        confidence: Shape ``(B, K)``.
        consistency: Shape ``(B, K)``.
        gamma_position: γ_p.
        gamma_confidence: γ_c.
        gamma_consistency: γ_o.

    Returns:
        Shape ``(B, K)``, rows summing to 1.
    """
    mixed = gamma_position * position + gamma_confidence * confidence + gamma_consistency * consistency
    return mixed / mixed.sum(dim=1, keepdim=True)


def ranking_loss(student_logits: Tensor, ranking: Tensor, weights: Tensor) -> Tensor:
    """Pull the teacher's candidates up: ``L_d = -Σ_i w_i · log σ(ŷ_i)``, the sum over the K candidates of a row.

    Args:
        student_logits: ŷ, shape ``(B, N)``.
        ranking: Teacher's candidates, shape ``(B, K)``.
        weights: w, shape ``(B, K)``.

    Returns:
        Shape ``(B,)``, nats.
    """
    scores = student_logits.gather(1, ranking).float()
    return -(weights * functional.logsigmoid(scores)).sum(dim=1)


def alignment_loss(projected: Tensor, teacher_vectors: Tensor, kind: str) -> Tensor:
    """Pull projected student vectors to the teacher's.

    Args:
        projected: Student's item vectors in the teacher's space, shape ``(B, d_teacher)``.
        teacher_vectors: Shape ``(B, d_teacher)``.
        kind: ``mse`` (mean over the width) or ``cosine`` (1 - cosine).

    Returns:
        Shape ``(B,)``, 0 where both agree.
    """
    if kind == "mse":
        return (projected.float() - teacher_vectors).square().mean(dim=1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(projected.float(), teacher_vectors, dim=1)
    raise ValueError(f"`kind` is {kind!r}, expected 'mse' or 'cosine'.")
