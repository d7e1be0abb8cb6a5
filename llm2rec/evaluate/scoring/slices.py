"""Slices of a split: rows that are reported apart, beside all rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.metrics import ranking_metrics
from llm2rec.data import RecData
from llm2rec.student.datamodule import Rows, SeenItems

__all__ = ["Slice", "slice_metrics", "slices"]


@dataclass(frozen=True)
class Slice:
    """Some rows of a split.

    Attributes:
        name: Its key in JSON files.
        title: What the rows have in common.
        note: What to know about it.
        rows: Numbers of the rows, ascending; at least one.
    """

    name: str
    title: str
    note: str
    rows: NDArray[np.int64]


def slices(data: RecData, split: str = "test") -> list[Slice]:
    """The slices of a split that have rows.

    ``untrained``: rows whose target occurs in no history and as no target of the training rows. ``new``: rows whose
    target their user did not have before, if others repeat an item. Where the data gives an order of ties
    (`RecData.tie_order`), ``ascending`` and ``descending``: rows whose target comes after and before the last item of
    the history in that order.
    """
    all_rows = Rows.of(data, split, 1)
    targets = all_rows.targets.numpy().astype(np.int64)
    is_trained = Rows.of(data, "train").occurring().numpy()
    found = [
        Slice(
            "untrained",
            "targets that do not occur in training",
            "A model that knows items by their ids alone can only guess them.",
            np.flatnonzero(~is_trained[targets]),
        )
    ]
    place, seen = SeenItems(all_rows).pairs(np.arange(len(targets)))
    is_new = np.ones(len(targets), bool)
    is_new[place[seen == torch.from_numpy(targets)[place]]] = False
    if not is_new.all():
        note = (
            "Where rankings leave out seen items, a repeated target stays in without its rivals: any model that "
            "prefers seen items ranks it first."
        )
        found.append(Slice("new", "targets that their user did not have before", note, np.flatnonzero(is_new)))
    if (order := data.tie_order) is not None:
        step = order[targets] - order[all_rows.histories()[0][:, 0]]
        note = (
            "Where many users have their last two items at the same time, a model that has learnt the order of ties "
            "gains from it on ascending rows."
        )
        for name, rows in (("ascending", step > 0), ("descending", step < 0)):
            title = f"targets whose last two items are in {name} order of ties"
            found.append(Slice(name, title, note, np.flatnonzero(rows)))
    return [each for each in found if len(each.rows)]


def slice_metrics(ranks: Tensor, parts: Sequence[Slice], ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """HR and NDCG of slices, by name.

    Args:
        ranks: 0-based ranks of all targets of the split, shape ``(M,)``.
        parts: The slices.
        ks: Cut-offs.
    """
    metrics = {part.name: ranking_metrics(ranks[torch.from_numpy(part.rows)], tuple(ks)) for part in parts}
    return {
        part: {name: value for name, value in found.items() if name.startswith(("hr@", "ndcg@"))}
        for part, found in metrics.items()
    }
