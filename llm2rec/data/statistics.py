"""Numbers that describe a prepared dataset, and how they are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from llm2rec.data.filtering import Sequences
from llm2rec.data.splitting import SPLIT_NAMES

__all__ = ["compute_statistics", "format_statistics"]


def compute_statistics(
    sequences: Sequences, splits: Mapping[str, Dataset], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Describe a dataset.

    Args:
        sequences: What the filters left.
        splits: Examples by split.
        counts: What the filters and the split took away, by name.

    Returns:
        JSON values: sizes, `density` (interactions over users times items), `sequence_length` and
        `history_length` (min, median, mean, max), `rows`, cold targets, `removed`.
    """
    n_users, n_items = len(sequences.user_ids), len(sequences.item_ids)
    histories = {name: _column(split, "history") for name, split in splits.items()}
    targets = {name: _column(split, "target") for name, split in splits.items()}
    seen = np.zeros(n_items, dtype=bool)
    seen[histories["train"]] = True
    seen[targets["train"]] = True
    _, title_counts = np.unique(sequences.titles.astype(str), return_counts=True)
    history_lengths = np.concatenate([_list_lengths(split, "history") for split in splits.values()])
    return {
        "users": n_users,
        "items": n_items,
        "interactions": len(sequences.items),
        "density": len(sequences.items) / (n_users * n_items),
        "sequence_length": _summary(sequences.lengths),
        "history_length": _summary(history_lengths),
        "rows": {name: len(splits[name]) for name in SPLIT_NAMES},
        "items_unseen_in_train": int((~seen).sum()),
        "cold_targets": {name: int((~seen[targets[name]]).sum()) for name in SPLIT_NAMES[1:]},
        "items_sharing_a_title": int(title_counts[title_counts > 1].sum()),
        "removed": dict(counts),
    }


def format_statistics(statistics: Mapping[str, Any]) -> str:
    """Lay statistics out as a small table; what is zero in the removals is left out.

    Args:
        statistics: What `compute_statistics` returned.

    Returns:
        Lines without a trailing newline.
    """
    rows = statistics["rows"]
    cold = statistics["cold_targets"]
    lines = [
        ("users", f"{statistics['users']:,}"),
        ("items", f"{statistics['items']:,}"),
        ("interactions", f"{statistics['interactions']:,}   density {statistics['density']:.3%}"),
        ("sequence length", _spread(statistics["sequence_length"])),
        ("history length", _spread(statistics["history_length"])),
        ("rows", "   ".join(f"{name} {rows[name]:,}" for name in SPLIT_NAMES)),
        ("unseen in training", f"{statistics['items_unseen_in_train']:,} items; targets: " + _pairs(cold)),
    ]
    if statistics["items_sharing_a_title"]:
        lines.append(("same title as another", f"{statistics['items_sharing_a_title']:,} items"))
    # Cuts are points in time, not counts: without thousands separators.
    lines += [
        (key.replace("_", " "), str(value) if key.endswith("_cut") else f"{value:,}")
        for key, value in statistics["removed"].items()
        if value
    ]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def _column(dataset: Dataset, name: str) -> npt.NDArray[np.int64]:
    """All values of an integer column, lists flattened."""
    column = dataset.data.table[name]
    parts = [chunk.flatten() if name == "history" else chunk for chunk in column.chunks]
    return np.concatenate([part.to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.int64)


def _list_lengths(dataset: Dataset, name: str) -> npt.NDArray[np.int64]:
    chunks = dataset.data.table[name].chunks
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]) if chunks else np.zeros(0, np.int64)


def _summary(values: npt.NDArray[Any]) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def _spread(summary: Mapping[str, float]) -> str:
    return f"{summary['min']} to {summary['max']}, median {summary['median']:g}, mean {summary['mean']:.1f}"


def _pairs(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} in {name}" for name, value in values.items())
