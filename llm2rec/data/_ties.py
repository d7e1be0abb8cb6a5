"""The order of one user's interactions with equal timestamps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.data._buckets import Rows
from llm2rec.data.spec import DatasetSpec

__all__ = ["TieKey", "tie_key"]

TieKey = Callable[[Rows], npt.NDArray[Any]]
"""Gives interactions, ``(rows,)``, the keys by which one user's ties ascend, ``(rows,)``."""


def tie_key(spec: DatasetSpec, user_ids: npt.NDArray[np.object_], items: pd.DataFrame) -> TieKey:
    """Return a function that gives interactions the key by which one user's ties ascend, ``(rows,)``.

    A shuffle is ordered by a hash of seed, user and item, so that it depends neither on the order of the file nor on
    how items are ordered elsewhere.
    """
    item_ids = items["item_id"].to_numpy(dtype=object)
    if spec.ties == "item":
        places = items["order"].to_numpy() if "order" in items else pd.factorize(item_ids, sort=True)[0]
        return lambda rows: places[rows["item"]]

    def drawn(rows: Rows) -> npt.NDArray[np.uint64]:
        texts = (f"{spec.ties_seed}\t{user_ids[user]}\t{item_ids[item]}" for user, item, _ in rows.tolist())
        digests = b"".join(hashlib.md5(text.encode(), usedforsecurity=False).digest() for text in texts)
        return np.frombuffer(digests, ">u8")[::2].astype(np.uint64)

    return drawn if spec.ties == "shuffle" else lambda rows: np.zeros(len(rows), np.int8)
