"""Ranking metrics for one relevant item per row.

The rank of a target counts every other item that scores at least as high: ties count against the model, so a model with
equal scores for all items gets no credit. Means are over all rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm2rec.core.errors import NonFiniteError

__all__ = ["CUTOFFS", "metric_names", "ranking_metrics", "target_ranks"]

CUTOFFS = (1, 5, 10, 20)


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank each row's target among all items.

    Args:
        scores: Scores of shape ``(B, N)``, higher is better; ``-inf`` for excluded items.
        targets: Target item ids of shape ``(B,)``.

    Returns:
        0-based ranks of shape ``(B,)``, int64: the number of other items that score at least as high.

    Raises:
        NonFiniteError: If a score is NaN (which would rank the target first), or a target's score is not finite.
    """
    target_scores = scores.gather(1, targets.unsqueeze(1))  # (B, 1)
    if bool(torch.isnan(scores).any()) or not bool(torch.isfinite(target_scores).all()):
        raise NonFiniteError("scores contain NaN, or a target's score is not finite; check the model before ranking.")
    return (scores >= target_scores).sum(dim=1) - 1


def ranking_metrics(ranks: Tensor, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Average HR, NDCG and MRR over rows with one relevant item each.

    With one relevant item, HR@K equals Recall@K, and NDCG@K is ``1 / log2(rank + 2)`` for ranks below K.

    Args:
        ranks: 0-based ranks of shape ``(B,)``, B at least 1.
        ks: Cut-offs.

    Returns:
        ``hr@K``, ``ndcg@K`` and ``mrr@K`` for each K, and ``mrr`` without cut-off, each a mean over all rows.

    Raises:
        ValueError: If there are no rows.
    """
    if ranks.numel() == 0:
        raise ValueError("`ranks` is empty; metrics need at least one evaluated row.")
    ranks = ranks.double()
    gain, reciprocal = 1 / torch.log2(ranks + 2), 1 / (ranks + 1)
    metrics = {}
    for k in ks:
        hit = (ranks < k).double()
        metrics[f"hr@{k}"] = hit.mean().item()
        metrics[f"ndcg@{k}"] = (gain * hit).mean().item()
        metrics[f"mrr@{k}"] = (reciprocal * hit).mean().item()
    metrics["mrr"] = reciprocal.mean().item()
    return metrics


def metric_names(ks: Sequence[int] = CUTOFFS) -> list[str]:
    """Names of the metrics that `ranking_metrics` returns for ``ks``, in its order."""
    return [f"{name}@{k}" for k in ks for name in ("hr", "ndcg", "mrr")] + ["mrr"]
