"""Rank the target of every row: the loop shared by students, teachers and ensembles, and the student's ranking."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.logging import Progress
from llm2rec.core.ranking import Catalogue, ranks_in_blocks
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.models import SequentialRecommender

__all__ = [
    "Batches",
    "RowNumbers",
    "aligned_batches",
    "batches_within_cost",
    "evaluation_mode",
    "rank_rows",
    "rank_targets",
]

RowNumbers = NDArray[np.int64]
"""Row numbers, shape ``(B,)``."""
Batches = Callable[[RowNumbers], Iterable[RowNumbers]]
"""Splits row numbers into batches."""


def rank_rows(
    rank: Callable[[RowNumbers], Tensor],
    n_rows: int,
    engine: Engine,
    batches: Batches,
) -> Tensor:
    """Rank the targets of all rows, split among processes; a collective.

    Args:
        rank: Returns the 0-based ranks ``(B,)`` of the targets of a batch of rows.
        n_rows: Number of rows, M.
        engine: Splits the rows among processes and gathers the ranks.
        batches: Splits the rows of this process into batches (`batches_within_cost`, `aligned_batches`). A batch may
            contain rows of other processes; their ranks are discarded.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """
    mine = engine.my_rows(n_rows)
    ranks = torch.zeros(n_rows, dtype=torch.int64)
    with torch.no_grad(), Progress("rank", len(mine), "row") as progress:
        for rows in batches(mine):
            ranks[torch.from_numpy(rows)] = rank(rows).cpu()
            progress.advance(int(((rows >= mine[0]) & (rows <= mine[-1])).sum()))
    return engine.gather_rows(ranks[torch.from_numpy(mine)], n_rows)


def batches_within_cost(costs: Callable[[RowNumbers], NDArray[np.int64]], max_cost: int) -> Batches:
    """Batches of rows with similar costs, such as tokens; see `batches_by_cost`.

    Args:
        costs: Returns the cost of each row, shape ``(B,)``.
        max_cost: Upper bound of a batch's rows times its largest cost.
    """
    return lambda mine: (mine[part] for part in batches_by_cost(costs(mine), max_cost))


def aligned_batches(n_rows: int, size: int) -> Batches:
    """Batches of ``size`` consecutive rows, the same for any number of processes.

    The batch size affects the last bits of a matrix product, so a process ranks every batch that contains one of its
    rows.
    """

    def batches(mine: RowNumbers) -> Iterator[RowNumbers]:
        for number in range(mine[0] // size, mine[-1] // size + 1) if len(mine) else ():
            yield np.arange(number * size, min((number + 1) * size, n_rows))

    return batches


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode and without gradients; restores the mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def rank_targets(
    model: SequentialRecommender,
    data: Rows,
    engine: Engine,
    *,
    seen: SeenItems | None = None,
    batch_size: int = 512,
) -> Tensor:
    """Rank the targets of all rows among the whole catalogue; a collective.

    Memory use: item vectors, user vectors of a batch, and a tile of their scores (see `core.ranking`).

    Args:
        model: Unwrapped model.
        data: Rows to rank, M of them.
        engine: Splits the rows among processes and gathers the ranks.
        seen: Items to exclude from each row's ranking; None ranks all items.
        batch_size: Rows per forward pass.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """
    with evaluation_mode(model):
        catalogue = Catalogue(model.output_items.vectors())

        def rank(rows: RowNumbers) -> Tensor:
            batch = data.batch(rows, engine.device)
            users = model(batch.history, batch.lengths)  # (B, D)
            left_out = None if seen is None else seen.pairs(rows, engine.device)
            return ranks_in_blocks(users, catalogue, batch.targets, left_out)

        return rank_rows(rank, len(data), engine, aligned_batches(len(data), batch_size))
