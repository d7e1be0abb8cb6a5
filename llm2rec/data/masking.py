"""Whether users come back to items, and so whether rankings leave out the items of a user's past."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm2rec.data.recdata import RecData

__all__ = ["RETURNING", "RepeatCount", "masks_seen", "repeat_share", "repeated_targets"]

RETURNING = 0.05
"""Share of repeated targets above which rankings keep the items of a user's past."""
_COUNTED = ("train", "validation")  # the test split decides nothing


def masks_seen(data: RecData, mask_seen: bool | None) -> bool:
    """Whether rankings of a dataset leave out the items of a user's past.

    Args:
        data: The dataset.
        mask_seen: The option ``metrics.mask_seen``. None leaves them out unless the `repeat_share` of the dataset is
            above `RETURNING`.
    """
    if mask_seen is not None:
        return mask_seen
    return repeat_share({**data.statistics, "repeated_targets": repeated_targets(data)}) <= RETURNING


def repeat_share(statistics: Mapping[str, Any]) -> float:
    """Share of the training and validation targets that their user interacted with before."""
    share: float = statistics["repeated_targets"] / sum(statistics["rows"][name] for name in _COUNTED)
    return share


def repeated_targets(data: RecData) -> int:
    """Training and validation targets that their user interacted with before; counted if not in the statistics."""
    if "repeated_targets" in data.statistics:
        return int(data.statistics["repeated_targets"])
    stops = np.zeros(len(data.sequences), np.int64)
    for name in _COUNTED:
        rows = data.splits[name].with_format("arrow")[:]
        np.maximum.at(stops, rows["user_index"].to_numpy(), rows["position"].to_numpy() + 1)
    count = RepeatCount(stops)
    for batch in data.sequences.with_format("arrow")[:].to_batches():
        count.add(batch)
    return count.repeated


class RepeatCount:
    """Counts the training and validation targets that their user interacted with before, part by part.

    Args:
        stops: One past the position of each user's last validation target, ``(U,)``. The first item of a user, which
            is no target, repeats nothing, so that all positions before it may be counted.

    Attributes:
        repeated: The count.
    """

    def __init__(self, stops: npt.NDArray[np.int64]) -> None:
        self._stops, self.repeated = stops, 0

    def add(self, part: pa.RecordBatch) -> None:
        """Count the next users, with columns `user_index` and `items`."""
        lists, users = part["items"], part["user_index"].to_numpy()
        items, lengths = lists.flatten().to_numpy().astype(np.int64), lists.value_lengths().to_numpy().astype(np.int64)
        user = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        is_repeated = np.ones(len(items), bool)
        firsts = np.unique(user * (items.max(initial=0) + 1) + items, return_index=True)[1]
        is_repeated[firsts] = False
        self.repeated += int((is_repeated & (position < self._stops[users][user])).sum())
