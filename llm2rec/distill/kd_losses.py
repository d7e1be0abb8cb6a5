"""Distillation losses: DLLM2Rec (arXiv 2405.00338, section 4), listwise, pairwise, and embedding alignment.

Pure functions of the scores of a few items; one value per row, in nats. Where the paper and its released program
(github.com/istarryn/DLLM2Rec, ``main.py``) differ, an argument selects the variant. Symbols: B rows, K teacher
candidates, N items, D width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from llm2rec.student.losses import at_least_float32

__all__ = [
    "alignment_loss",
    "confidence_weights",
    "consistency_weights",
    "contrastive_alignment",
    "importance_weights",
    "listwise_loss",
    "negative_term",
    "pairwise_loss",
    "position_weights",
    "ranking_loss",
    "robust_term",
    "row_confidence_weights",
    "sampled_catalogue",
]


def position_weights(n_candidates: int, beta: float) -> Tensor:
    """Position weights: ``w_p ∝ exp(-rank / β)``, summing to 1 over K.

    Args:
        n_candidates: Candidates per row, K.
        beta: Ranks over which the weight falls by a factor e. The released program uses 1 and ignores its ``--beta2``.

    Returns:
        Shape ``(K,)``, float32.
    """
    return torch.softmax(-torch.arange(n_candidates, dtype=torch.float32) / beta, dim=0)


def confidence_weights(distance: Tensor, floor: float = 0.0) -> Tensor:
    """Confidence weights of the released program: ``w_c ∝ exp(-distance) + floor``, summing to 1 over K.

    They use one distance per candidate; for the paper's form see `row_confidence_weights`. If distances are negative
    log-probabilities, this is the teacher's distribution over its top K.

    Args:
        distance: Lower means more confident, shape ``(B, K)``.
        floor: The program adds 1e-8, which makes weights nearly uniform if all distances are above about 18.

    Returns:
        Shape ``(B, K)``, float32 at least.
    """
    scores = -at_least_float32(distance)
    if floor > 0:
        scores = torch.logaddexp(scores, scores.new_tensor(math.log(floor)))
    return torch.softmax(scores, dim=1)


def row_confidence_weights(target_distance: Tensor, n_candidates: int) -> Tensor:
    """Confidence weights of the paper: ``w_c = exp(-distance to the target)``, one value for all candidates of a row.

    A confident teacher therefore has flatter weights if they are renormalised over K, and larger ones otherwise.

    Args:
        target_distance: Distance of the row's target, shape ``(B,)``; clamped at 0.
        n_candidates: Candidates per row, K.

    Returns:
        Shape ``(B, K)``, float32 at least, in 0 to 1.
    """
    weights = torch.exp(-at_least_float32(target_distance).clamp(min=0))
    return weights.unsqueeze(1).expand(-1, n_candidates)


def consistency_weights(
    student_logits: Tensor, ranking: Tensor, top_k: int, *, floor: float = 0.0, normalise: bool = False
) -> Tensor:
    """Consistency weights: ``w_o = 1`` for candidates that are also in the student's top K, else 0.

    Args:
        student_logits: Shape ``(B, N)``; no gradient flows through the selection.
        ranking: Teacher's candidates, shape ``(B, K)``.
        top_k: Length of the student's list; items that tie with its last one are included.
        floor: Added to each weight; the program adds 1e-8.
        normalise: Whether a row's weights sum to 1 over K, like the other two kinds (a row of zeros stays 0). Neither
            the paper nor the program does this.

    Returns:
        Shape ``(B, K)``, float32.
    """
    logits = student_logits.detach()
    threshold = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]  # the lowest score in the list
    weights = (logits.gather(1, ranking) >= threshold).float() + floor
    return _over_sum(weights) if normalise else weights


def importance_weights(
    position: Tensor,
    confidence: Tensor,
    consistency: Tensor,
    *,
    gamma_position: float,
    gamma_confidence: float,
    gamma_consistency: float,
    renormalise: bool = True,
) -> Tensor:
    """Mix the three weights: ``w = γ_p w_p + γ_c w_c + γ_o w_o``, divided by the sum over K if ``renormalise``.

    Args:
        position: Shape ``(K,)``.
        confidence: Shape ``(B, K)``.
        consistency: Shape ``(B, K)``.
        gamma_position: γ_p.
        gamma_confidence: γ_c.
        gamma_consistency: γ_o.
        renormalise: Whether each row's weights sum to 1, as in the program; the paper does not renormalise.

    Returns:
        Shape ``(B, K)``.
    """
    mixed = gamma_position * position + gamma_confidence * confidence + gamma_consistency * consistency
    return _over_sum(mixed) if renormalise else mixed


def _over_sum(weights: Tensor) -> Tensor:
    """Divide each row ``(B, K)`` by its sum; rows of zeros stay zero."""
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def ranking_loss(scores: Tensor, weights: Tensor) -> Tensor:
    """Raise the scores of the teacher's candidates: ``L_d = -Σ_i w_i · log σ(ŷ_i)``, summed over the K candidates.

    Args:
        scores: Student's scores ŷ of the candidates, shape ``(B, K)``.
        weights: w, shape ``(B, K)``.

    Returns:
        Shape ``(B,)``, nats.
    """
    return -(weights * functional.logsigmoid(at_least_float32(scores))).sum(dim=1)


def negative_term(negative_scores: Tensor, weights: Tensor, kind: str) -> Tensor:
    """Lower the score of one sampled negative per row.

    ``(Σ_i w_i) · n``, since the negative is paired with all K candidates. n is ``-log σ(1 - ŷ⁻)`` for
    ``one_minus_score`` (the released program), or ``-log(1 - σ(ŷ⁻))`` for ``one_minus_probability`` (binary
    cross-entropy, the likely intention of the program). The paper's loss has no such term.

    Args:
        negative_scores: ŷ⁻, shape ``(B,)``.
        weights: w, shape ``(B, K)``.
        kind: ``one_minus_score`` or ``one_minus_probability``.

    Returns:
        Shape ``(B,)``, nats.
    """
    if kind not in ("one_minus_score", "one_minus_probability"):
        raise ValueError(f"`kind` is {kind!r}, expected 'one_minus_score' or 'one_minus_probability'.")
    scores = at_least_float32(negative_scores)
    inverted = 1 - scores if kind == "one_minus_score" else -scores
    return -weights.sum(dim=1) * functional.logsigmoid(inverted)


def robust_term(robust: Tensor, weights: Tensor, kind: str, rows: Tensor | None = None) -> Tensor:
    """The DROS losses of the candidates inside the ranking loss.

    ``per_row`` is ``Σ_i w_i · L_i``. ``broadcast`` reproduces the released program, which multiplies weights ``(B, 1)``
    by losses ``(B,)``: the mean of that table is mean(w) times mean(L), so a candidate's loss is weighted by the
    batch's mean weight at its rank, ``Σ_i w̄_i · L_i``. The mean of these values over rows equals the program's value.

    Args:
        robust: L, the DROS loss of each candidate, shape ``(B, K)``; see `llm2rec.student.losses.dros`.
        weights: w, shape ``(B, K)``.
        kind: ``per_row`` or ``broadcast``.
        rows: Weight of each row in the mean w̄, shape ``(B,)``; equal if None.

    Returns:
        Shape ``(B,)``, nats.
    """
    if kind == "per_row":
        return (weights * robust).sum(dim=1)
    if kind == "broadcast":
        rows = torch.ones_like(weights[:, 0]) if rows is None else rows.to(weights)
        mean = rows @ weights / rows.sum().clamp(min=torch.finfo(weights.dtype).tiny)  # (K,)
        return robust @ mean.to(robust)
    raise ValueError(f"`kind` is {kind!r}, expected 'per_row' or 'broadcast'.")


def listwise_loss(scores: Tensor, log_total: Tensor, distance: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's distribution from the teacher's top K: ``T² · KL(p ‖ q)``.

    ``p_i ∝ exp(-distance_i / T)`` over the K candidates: with negative log-probabilities, the teacher's distribution at
    temperature T. ``q_i = exp(ŷ_i / T) / Z``, where Z is the sum over the same K candidates (ListNet, Cao et al., ICML
    2007, with the teacher's order; it does not compare the candidates with other items) or over all N items (soft
    labels whose mass lies on the K candidates). The factor T² keeps the scale of gradients independent of T (Hinton et
    al., arXiv 1503.02531, section 2).

    Args:
        scores: Student's scores of the candidates, scaled: ``ŷ_i / T``, shape ``(B, K)``.
        log_total: ``log Z = log Σ_j exp(ŷ_j / T)``, shape ``(B,)``.
        distance: Teacher's distances, lower means more confident, shape ``(B, K)``.
        temperature: T; larger values flatten both distributions.

    Returns:
        Shape ``(B,)``, nats at T = 1; 0 if both distributions agree (over the catalogue, only in the limit).
    """
    distance = at_least_float32(distance)
    # Subtract the minimum first, so that the division cannot overflow.
    probs = torch.softmax((distance.amin(dim=1, keepdim=True) - distance) / temperature, dim=1)
    log_probs = scores - log_total.unsqueeze(1)
    return temperature**2 * -(torch.special.entr(probs) + probs * log_probs).sum(dim=1)


def sampled_catalogue(
    candidates: Tensor,
    ranking: Tensor,
    negatives: Tensor,
    items: Tensor,
    log_expected: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Scores whose sum ``Σ exp(ŷ / T)`` is an unbiased estimate of the sum over the catalogue.

    The candidates keep their scores. Each negative gets the log-Q correction ``ŷ_j - T log(n q_j)`` and is masked if it
    is a candidate, as `llm2rec.student.losses.sampled_softmax` does with the target alone.

    Args:
        candidates: Scores of the teacher's candidates, shape ``(B, K)``.
        ranking: Their item ids, shape ``(B, K)``.
        negatives: Scores of n items drawn with replacement, shape ``(B, n)``.
        items: Their item ids, shape ``(n,)`` or ``(B, n)``.
        log_expected: Logarithm of their expected number among the n, ``log(n q_j)``, of the shape of ``items``.
        temperature: T.

    Returns:
        Shape ``(B, K + n)``, float32 at least.
    """
    drawn = items.expand(negatives.shape).contiguous()
    ordered = ranking.sort(dim=1).values
    place = torch.searchsorted(ordered, drawn).clamp(max=ranking.shape[1] - 1)
    hits = ordered.gather(1, place) == drawn  # (B, n)
    others = (at_least_float32(negatives) - temperature * log_expected).masked_fill(hits, -torch.inf)
    return torch.cat([at_least_float32(candidates), others], dim=1)


def pairwise_loss(scores: Tensor, kind: str, *, margin: float = 1.0, repeated: Tensor | None = None) -> Tensor:
    """Pairwise loss on the teacher's order; the mean over the pairs of a row.

    With s the student's score of the better item minus that of the worse: ``-log σ(s)`` for ``ranknet`` (Burges et
    al., ICML 2005), ``max(0, margin - s)`` for ``margin``. Only the teacher's order is used, not its confidence.

    Args:
        scores: Student's scores of the items in the teacher's order, best first, shape ``(B, K)``. A sampled negative
            may come last; without one the candidates are not compared with other items.
        kind: ``ranknet`` or ``margin``.
        margin: Margin of the ``margin`` loss.
        repeated: Rows whose last item repeats another, shape ``(B,)``, bool; pairs with that item are ignored.

    Returns:
        Shape ``(B,)``; nats for ``ranknet``.
    """
    if kind not in ("ranknet", "margin"):
        raise ValueError(f"`kind` is {kind!r}, expected 'ranknet' or 'margin'.")
    scores, n_items = at_least_float32(scores), scores.shape[1]
    better, worse = torch.triu_indices(n_items, n_items, offset=1, device=scores.device)
    gaps = scores[:, better] - scores[:, worse]  # (B, pairs)
    losses = -functional.logsigmoid(gaps) if kind == "ranknet" else functional.relu(margin - gaps)
    if repeated is None:
        return losses.mean(dim=1)
    counts = ~(repeated.unsqueeze(1) & (worse == n_items - 1))  # (B, pairs)
    return losses.where(counts, 0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def alignment_loss(projected: Tensor, teacher_vectors: Tensor, kind: str) -> Tensor:
    """Distance between projected student vectors and teacher vectors.

    Args:
        projected: Student's item vectors in the teacher's space, shape ``(B, d_teacher)``.
        teacher_vectors: Shape ``(B, d_teacher)``.
        kind: ``mse`` (mean over the width) or ``cosine`` (1 - cosine).

    Returns:
        Shape ``(B,)``, 0 for equal vectors.
    """
    if kind == "mse":
        return (at_least_float32(projected) - teacher_vectors).square().mean(dim=1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(at_least_float32(projected), teacher_vectors, dim=1)
    raise ValueError(f"`kind` is {kind!r}, expected 'mse' or 'cosine'.")


def contrastive_alignment(projected: Tensor, teacher_vectors: Tensor, items: Tensor, temperature: float) -> Tensor:
    """Contrast an item's teacher vector with those of all other items (InfoNCE, van den Oord et al., arXiv 1807.03748).

    ``-log( exp(cos(x, z_i) / τ) / Σ_j exp(cos(x, z_j) / τ) )``, j over the whole catalogue. Unlike with in-batch
    negatives, as in contrastive representation distillation (Tian et al., arXiv 1910.10699), the loss of a row does not
    depend on other rows, and no item is its own negative.

    Args:
        projected: x, student's vectors of ``items`` in the teacher's space, shape ``(B, d_teacher)``.
        teacher_vectors: z, of all items, shape ``(N, d_teacher)``.
        items: i, shape ``(B,)``.
        temperature: τ.

    Returns:
        Shape ``(B,)``, nats.
    """
    unit = functional.normalize(at_least_float32(projected), dim=1)
    cosines = unit @ functional.normalize(teacher_vectors.to(unit), dim=1).T  # (B, N)
    return functional.cross_entropy(cosines / temperature, items, reduction="none")
