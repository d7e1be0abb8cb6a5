"""The distillation losses of DLLM2Rec (arXiv 2405.00338, section 4), and others of the field to compare them with.

Pure functions of the scores of a few items; one value per row, in nats. Where the paper and its released program
(github.com/istarryn/DLLM2Rec, ``main.py``) differ, an argument chooses. Symbols: B rows, K teacher candidates, N items,
D width.
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
    """Weigh candidates by rank: ``w_p ∝ exp(-rank / β)``, summing to 1 over K.

    Args:
        n_candidates: Candidates per row, K.
        beta: Ranks over which the weight falls by a factor e. The program's is 1, whatever its ``--beta2`` says.

    Returns:
        Shape ``(K,)``, float32.
    """
    return torch.softmax(-torch.arange(n_candidates, dtype=torch.float32) / beta, dim=0)


def confidence_weights(distance: Tensor, floor: float = 0.0) -> Tensor:
    """Weigh candidates by the teacher's confidence: ``w_c ∝ exp(-distance) + floor``, summing to 1 over K.

    This is the released program's form: it reads one distance per candidate; `row_confidence_weights` has the paper's.
    With negative log-probabilities as distances this is the teacher's distribution over its own top K.

    Args:
        distance: Lower means surer, shape ``(B, K)``.
        floor: The program adds 1e-8, which makes candidates alike where all distances are above 18 or so.

    Returns:
        Shape ``(B, K)``, float32 at least.
    """
    scores = -at_least_float32(distance)
    if floor > 0:
        scores = torch.logaddexp(scores, scores.new_tensor(math.log(floor)))
    return torch.softmax(scores, dim=1)


def row_confidence_weights(target_distance: Tensor, n_candidates: int) -> Tensor:
    """Weigh all candidates of a row by the teacher's distance to the true item: ``w_c = exp(-distance)``.

    This is the paper's form: one value per row, the same for each candidate, so that a sure teacher's weights are
    flatter where weights are renormalised over K, and larger where they are not.

    Args:
        target_distance: From the teacher's answer to the row's target, shape ``(B,)``; below 0 counts as 0.
        n_candidates: Candidates per row, K.

    Returns:
        Shape ``(B, K)``, float32 at least, in 0 to 1.
    """
    weights = torch.exp(-at_least_float32(target_distance).clamp(min=0))
    return weights.unsqueeze(1).expand(-1, n_candidates)


def consistency_weights(
    student_logits: Tensor, ranking: Tensor, top_k: int, *, floor: float = 0.0, normalise: bool = False
) -> Tensor:
    """Weigh candidates on which student and teacher agree: ``w_o = 1`` in the student's top K too, else 0.

    Args:
        student_logits: Shape ``(B, N)``; no gradient flows through the choice.
        ranking: Teacher's candidates, shape ``(B, K)``.
        top_k: Length of the student's own list; items that tie with its last one are in it.
        floor: Added to each weight; the program adds 1e-8.
        normalise: Whether a row's weights sum to 1 over K, as the other two kinds do (a row without any weight stays
            0). Neither paper nor program does.

    Returns:
        Shape ``(B, K)``, float32.
    """
    logits = student_logits.detach()
    threshold = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]  # the worst score that is still in
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
    """Mix the three weights: ``w = γ_p w_p + γ_c w_c + γ_o w_o``, over their sum over K.

    Args:
        position: Shape ``(K,)``.
        confidence: Shape ``(B, K)``.
        consistency: Shape ``(B, K)``.
        gamma_position: γ_p.
        gamma_confidence: γ_c.
        gamma_consistency: γ_o.
        renormalise: Whether each row's candidates weigh 1 together, as in the program; the paper's text leaves the
            mixture as it is.

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
    """Lower the score of one sampled negative per row, which is paired with all K candidates, so their weights add up.

    ``(Σ_i w_i) · n`` with n = ``-log σ(1 - ŷ⁻)`` for ``one_minus_score``, which is what the released program computes,
    or ``-log(1 - σ(ŷ⁻))`` for ``one_minus_probability``, binary cross-entropy, which it seems to mean. The paper's loss
    has no such term.

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

    ``per_row`` is ``Σ_i w_i · L_i``. ``broadcast`` is what the released program computes: it multiplies weights
    ``(B, 1)`` by losses ``(B,)``, and the mean of that table is mean(w) times mean(L), so that a candidate's loss is
    weighed by the batch's mean weight at its rank, ``Σ_i w̄_i · L_i``. The mean over rows of these values is the
    program's number.

    Args:
        robust: L, the DROS loss of each candidate, shape ``(B, K)``; see `llm2rec.student.losses.dros`.
        weights: w, shape ``(B, K)``.
        kind: ``per_row`` or ``broadcast``.
        rows: Weight of each row in the mean w̄, shape ``(B,)``; all alike if None.

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
    """Divergence of the student's distribution from the teacher's over its own top K: ``T² · KL(p ‖ q)``.

    ``p_i ∝ exp(-distance_i / T)`` over the K candidates, which for negative log-probabilities is the teacher's own
    distribution, sharpened or flattened. ``q_i = exp(ŷ_i / T) / Z``, where Z is the sum over the same K candidates
    (ListNet, Cao et al., ICML 2007, with the teacher as the judge; it says nothing of how the candidates compare with
    other items) or over all N items (soft labels whose mass lies on the K candidates). The factor T² keeps gradients of
    one size for any T (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        scores: Student's scores of the candidates, scaled: ``ŷ_i / T``, shape ``(B, K)``.
        log_total: ``log Z = log Σ_j exp(ŷ_j / T)``, shape ``(B,)``.
        distance: The teacher's, lower means surer, shape ``(B, K)``.
        temperature: T; larger makes both distributions flatter.

    Returns:
        Shape ``(B,)``, nats at T = 1; 0 where both distributions agree, which over the catalogue is a limit.
    """
    distance = at_least_float32(distance)
    # Of differences, so that no division overflows.
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
    """Scores whose sum ``Σ exp(ŷ / T)`` estimates that of the whole catalogue without bias.

    The candidates keep their scores. Each negative represents all items that could have been drawn in its place,
    ``ŷ_j - T log(n q_j)``, and is dropped where it is a candidate. This is the log-Q correction of
    `llm2rec.student.losses.sampled_softmax`, which does so for the target alone.

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
    """Order each pair of items as the teacher does; the mean over the pairs of a row.

    With s the student's score of the better item minus that of the worse: ``-log σ(s)`` for ``ranknet`` (Burges et
    al., ICML 2005), ``max(0, margin - s)`` for ``margin``. Only the teacher's order counts, not its confidences.

    Args:
        scores: Student's scores of the items, the teacher's best first, shape ``(B, K)``. A sampled negative may come
            last; without it the loss leaves open how the candidates compare with the rest of the catalogue.
        kind: ``ranknet`` or ``margin``.
        margin: Gap that is enough for ``margin``.
        repeated: Rows whose last item is one of the others, shape ``(B,)``, bool; its pairs do not count there.

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
    """Distance of projected student vectors to the teacher's.

    Args:
        projected: Student's item vectors in the teacher's space, shape ``(B, d_teacher)``.
        teacher_vectors: Shape ``(B, d_teacher)``.
        kind: ``mse`` (mean over the width) or ``cosine`` (1 - cosine).

    Returns:
        Shape ``(B,)``, 0 where both agree.
    """
    if kind == "mse":
        return (at_least_float32(projected) - teacher_vectors).square().mean(dim=1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(at_least_float32(projected), teacher_vectors, dim=1)
    raise ValueError(f"`kind` is {kind!r}, expected 'mse' or 'cosine'.")


def contrastive_alignment(projected: Tensor, teacher_vectors: Tensor, items: Tensor, temperature: float) -> Tensor:
    """Contrast an item's teacher vector with those of all other items (InfoNCE, van den Oord et al., arXiv 1807.03748).

    ``-log( exp(cos(x, z_i) / τ) / Σ_j exp(cos(x, z_j) / τ) )``, j over the whole catalogue: unlike with the other items
    of a batch, as in contrastive distillation of images (Tian et al., arXiv 1910.10699), the value of a row depends on
    no other row, and no item is its own negative.

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
