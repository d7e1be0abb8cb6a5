"""Rank every row's target among the whole catalogue."""

import torch
from torch import Tensor

from llm2rec.core.ranking import Catalogue, ranks_in_blocks
from llm2rec.core.train.engine import Engine
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

    Memory holds the vectors of the items and of a batch of users, and a tile of their scores, see `core.ranking`. The
    model is put into evaluation mode and back.

    Args:
        model: Unwrapped model.
        data: Rows to rank, M of them.
        engine: Divides the rows and gathers the ranks.
        seen: Items to leave out of each row's ranking; None ranks all items.
        batch_size: Rows represented at once.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """
    was_training = model.training
    model.eval()
    mine, blocks = engine.my_rows(len(data)), []
    with torch.inference_mode():
        catalogue = Catalogue(model.output_items.vectors())
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            batch = data.batch(rows, engine.device)
            users = model(batch.history, batch.lengths)  # (B, D)
            left_out = None if seen is None else seen.pairs(rows, engine.device)
            blocks.append(ranks_in_blocks(users, catalogue, batch.targets, left_out).cpu())
    model.train(was_training)
    ranks = torch.cat(blocks) if blocks else torch.zeros(0, dtype=torch.int64)
    return engine.gather_rows(ranks, len(data))
