"""Statistics of a prepared dataset, and warnings about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llm2rec.data.columns import column_numbers
from llm2rec.data.filtering import Sequences
from llm2rec.data.masking import RETURNING, repeat_share
from llm2rec.data.recdata import RecData
from llm2rec.data.splitting import SPLIT_NAMES

__all__ = ["SplitCounts", "compute_statistics", "doubts", "format_statistics", "tie_doubt"]

_SHORT = 5  # interactions of the median user, below which order carries little information
_COLD = 0.01  # share of test targets
_TIED = 0.01  # share of users
_ROUGH = 0.02  # half the width of the 95 % interval of an HR@10 of .1, a fifth of it


class SplitCounts:
    """Counts of a split's examples, part by part.

    Args:
        n_items: Items in the catalogue, N.
        history_length: Most items a history holds, L.
    """

    def __init__(self, n_items: int, history_length: int) -> None:
        self.targets = np.zeros(n_items, np.int64)
        self.is_shown = np.zeros(n_items, bool)
        self.lengths = np.zeros(history_length + 1, np.int64)

    def add(self, part: pa.RecordBatch) -> None:
        """Count the next examples."""
        histories = part["history"]
        self.is_shown[histories.flatten().to_numpy()] = True
        lengths = np.bincount(histories.value_lengths().to_numpy())
        self.lengths[: len(lengths)] += lengths
        np.add.at(self.targets, part["target"].to_numpy(), 1)


def compute_statistics(
    sequences: Sequences, splits: Mapping[str, SplitCounts], counts: Mapping[str, int], repeated_targets: int
) -> dict[str, Any]:
    """Describe a dataset.

    Args:
        sequences: Interactions after all filters.
        splits: Counts of the examples by split.
        counts: Counts of removed data, by name.
        repeated_targets: Training and validation targets that their user interacted with before.

    Returns:
        JSON values: sizes, `density` (interactions over users times items), `sequence_length` and
        `history_length` (min, median, mean, max), `rows`, cold and repeated targets, `removed`.
    """
    n_users, n_items = len(sequences.user_ids), len(sequences.item_ids)
    seen = splits["train"].is_shown | (splits["train"].targets > 0)
    _, title_counts = np.unique(sequences.titles.astype(str), return_counts=True)
    return {
        "users": n_users,
        "items": n_items,
        "interactions": sequences.n_interactions,
        "density": sequences.n_interactions / (n_users * n_items),
        "sequence_length": _summary(np.bincount(sequences.lengths)),
        "history_length": _summary(np.sum([each.lengths for each in splits.values()], axis=0)),
        "rows": {name: int(splits[name].targets.sum()) for name in SPLIT_NAMES},
        "items_unseen_in_train": int((~seen).sum()),
        "cold_targets": {name: int(splits[name].targets[~seen].sum()) for name in SPLIT_NAMES[1:]},
        "repeated_targets": repeated_targets,
        "items_sharing_a_title": int(title_counts[title_counts > 1].sum()),
        "removed": dict(counts),
    }


def format_statistics(statistics: Mapping[str, Any]) -> str:
    """Format statistics as a small table, without removals that are zero.

    Args:
        statistics: Result of `compute_statistics`.

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
        ("targets seen before", _repeats(statistics)),
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


def doubts(statistics: Mapping[str, Any]) -> list[str]:
    """Warnings about a dataset, and about metrics measured on it.

    Args:
        statistics: Result of `compute_statistics`.

    Returns:
        One sentence per warning.
    """
    found = []
    length, shown, n_test = statistics["sequence_length"], statistics["history_length"], statistics["rows"]["test"]
    if length["median"] < _SHORT:
        found.append(
            f"half of the users have {length['median']:g} interactions or fewer: a sequential model "
            "can learn little more than popularity"
        )
    if length["median"] > shown["max"] + 1:  # the target is no history
        found.append(
            f"most histories are cut at {shown['max']} items: a longer `dataset.history_length` shows models more"
        )
    cold = statistics["cold_targets"]["test"]
    if n_test and cold > _COLD * n_test:
        found.append(
            f"{cold / n_test:.1%} of the test targets are items without training interactions: no student can "
            "recommend them, only a teacher that reads titles can"
        )
    if n_test and (half := 1.96 * (0.1 * 0.9 / n_test) ** 0.5) > _ROUGH:
        found.append(
            f"with {n_test:,} test rows an HR@10 of 10 % is known to ± {100 * half:.1f} points: small gains are "
            "within noise"
        )
    return found


def tie_doubt(data: RecData) -> str | None:
    """A warning if many users have their validation and test targets at one time; None if few have."""
    settings = data.manifest["settings"]
    if settings["split"] != "leave_one_out":
        return None
    every = np.arange(len(data.sequences))
    validation, test = (column_numbers(data.splits[name], "timestamp")[every] for name in SPLIT_NAMES[1:])
    share = float((validation == test).mean())
    if share <= _TIED:
        return None
    decides = {"item": "their item ids decide", "shuffle": "a seeded shuffle decides"}
    return (
        f"{share:.0%} of the users have their validation and test items at the same time: "
        f"{decides.get(settings.get('ties', 'source'), 'the order of the file decides')} which is which "
        "(`dataset.ties`)"
    )


def _summary(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Summarise lengths, of which ``counts[l]`` have length l."""
    n_values, reached = int(counts.sum()), np.cumsum(counts)
    middle = [int(np.searchsorted(reached, place, side="right")) for place in ((n_values - 1) // 2, n_values // 2)]
    there = np.flatnonzero(counts)
    return {
        "min": int(there[0]),
        "median": sum(middle) / 2,
        "mean": int((np.arange(len(counts)) * counts).sum()) / n_values,
        "max": int(there[-1]),
    }


def _spread(summary: Mapping[str, float]) -> str:
    return f"{summary['min']} to {summary['max']}, median {summary['median']:g}, mean {summary['mean']:.1f}"


def _repeats(statistics: Mapping[str, Any]) -> str:
    share = repeat_share(statistics)
    consequence = "keep" if share > RETURNING else "leave out"
    return f"{share:.1%} of training and validation: rankings {consequence} the items of a user's past"


def _pairs(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} in {name}" for name, value in values.items())
