"""HR@1 among seeded candidates (the iLoRA paper's protocol) for models that score the whole catalogue."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.metrics import target_ranks
from llm2rec.core.statistics import bootstrap_interval
from llm2rec.core.train.engine import Engine
from llm2rec.student.evaluator import RowNumbers, batches_within_cost, rank_rows
from llm2rec.student.negatives import CandidateSampler

__all__ = [
    "CANDIDATES_HR",
    "GENERATED_HR",
    "GENERATED_HR_VALID",
    "VALID_RATIO",
    "candidates_hr",
    "rank_among",
    "rank_among_candidates",
]

CANDIDATES_HR = "candidates_hr@1"
GENERATED_HR = "generated_hr@1"
"""Share of ALL rows whose generated title names the target and no other candidate."""
GENERATED_HR_VALID = "generated_hr@1_valid"
"""The same over rows whose generated title names exactly one candidate, as in iLoRA's released program."""
VALID_RATIO = "valid_ratio"
"""Share of rows whose generated title names exactly one candidate."""


def rank_among(scores: Tensor, candidates: NDArray[np.int64], targets: Tensor) -> Tensor:
    """Rank each row's target among its candidates only, ties against the model.

    Args:
        scores: Scores of all items, shape ``(B, N)``, higher is better. No seen items may be masked: candidates exclude
            the row's history but not the items before it, which a mask would give away.
        candidates: Item ids, shape ``(B, C)``, each row's target among them once.
        targets: Target item ids, shape ``(B,)``, where ``scores`` are.

    Returns:
        0-based ranks of shape ``(B,)``, int64, below C.

    Raises:
        NonFiniteError: If a candidate's score is NaN, or a target's is not finite.
    """
    items = torch.from_numpy(candidates).to(scores.device)  # (B, C)
    places = (items == targets.unsqueeze(1)).int().argmax(dim=1)
    return target_ranks(scores.gather(1, items), places)


def rank_among_candidates(
    score: Callable[[NDArray[np.int64]], Tensor],
    targets: Tensor,
    candidates: CandidateSampler,
    engine: Engine,
    *,
    costs: NDArray[np.int64],
    max_cost: int,
) -> Tensor:
    """Rank the targets of all rows among their candidates; a collective. No row is dropped.

    Args:
        score: Gives the scores ``(B, N)`` of rows ``(B,)``.
        targets: Targets of all rows, shape ``(M,)``.
        candidates: Draws the candidates of a row.
        engine: Splits the rows among processes and gathers the ranks.
        costs: Cost of each row in a batch, such as tokens, shape ``(M,)``.
        max_cost: Bound of a batch's rows times its costliest row.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """

    def rank(rows: RowNumbers) -> Tensor:
        scores = score(rows)
        row_targets = targets[torch.from_numpy(rows)].to(scores.device, torch.int64)
        return rank_among(scores, candidates.draw(rows), row_targets)

    return rank_rows(rank, len(targets), engine, batches_within_cost(lambda mine: costs[mine], max_cost))


def candidates_hr(ranks: Tensor) -> tuple[float, tuple[float, float]]:
    """Share of rows whose target is first among its candidates.

    Args:
        ranks: 0-based ranks among candidates, shape ``(M,)``.

    Returns:
        HR@1 and its bootstrap 95 % interval, over rows.
    """
    hits = (ranks == 0).double().numpy()
    return float(hits.mean()), bootstrap_interval(hits)
