"""Rank every row's target among the whole catalogue."""

import torch
from torch import Tensor

from llm2rec.core.engine import Engine
from llm2rec.core.metrics import target_ranks
from llm2rec.student.datamodule import SeenItems, SequenceData
from llm2rec.student.models import SequentialRecommender

__all__ = ["rank_targets"]


def rank_targets(
    model: SequentialRecommender,
    data: SequenceData,
    engine: Engine,
    *,
    seen: SeenItems | None = None,
    batch_size: int = 512,
) -> Tensor:
    """Rank the targets of all rows, divided among processes; no row is dropped.

    The model is put into evaluation mode and back.

    Args:
        model: Unwrapped model.
        data: Rows to rank, M of them.
        engine: Divides the rows and gathers the ranks.
        seen: Items to leave out of each row's ranking; None ranks all items.
        batch_size: Rows scored at once.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """
    was_training = model.training
    model.eval()
    mine, blocks = engine.my_rows(len(data)), []
    with torch.inference_mode():
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            batch = data.batch(rows, engine.device)
            scores = model.score(model(batch.history, batch.lengths)).float()
            if seen is not None:
                scores = seen.mask(scores, rows, batch.targets)
            blocks.append(target_ranks(scores, batch.targets).cpu())
    model.train(was_training)
    ranks = torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
    return engine.gather_rows(ranks, len(data))
