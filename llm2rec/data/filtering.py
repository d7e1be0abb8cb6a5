"""From raw tables to numbered, ordered sequences: titles, thresholds, duplicates, k-core, short users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.data._files import shorten
from llm2rec.data.spec import DatasetSpec, RawData

__all__ = ["Sequences", "filter_and_number"]

_SHOWN = 5


@dataclass(frozen=True)
class Sequences:
    """Interactions after all filters, grouped by user and ordered in time.

    Attributes:
        user_ids: Raw id of each user, ``(U,)``; users are numbered in the order they first appear.
        item_ids: Raw id of each item, ``(N,)``; items keep the order of the source's item table.
        titles: Title of each item, ``(N,)``.
        lengths: Interactions of each user, ``(U,)``.
        items: Item index of each interaction, ``(M,)``, user after user, oldest first.
        timestamps: Time of each interaction, ``(M,)``.
        counts: What each filter took away, by name.
    """

    user_ids: npt.NDArray[np.object_]
    item_ids: npt.NDArray[np.object_]
    titles: npt.NDArray[np.object_]
    lengths: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    timestamps: npt.NDArray[np.int64]
    counts: dict[str, int]


def filter_and_number(raw: RawData, spec: DatasetSpec) -> Sequences:
    """Apply the filters of `spec` and number what is left.

    The order is: titles, rating threshold, exact duplicates (same user, item and timestamp; the first stays),
    then k-core and short users together until neither takes anything away. Interactions are sorted by user, time
    and original row, so that equal timestamps keep the order of the source. Items nobody interacts with any more
    are left out of the catalogue.

    Args:
        raw: Tables as the source yields them.
        spec: The settings.

    Returns:
        The sequences, with the counts of everything taken away.

    Raises:
        DataError: If an item id is there twice, an interaction names an unknown item, a title is missing, or
            nothing is left.
        ConfigError: If there is a rating threshold and the source has no ratings.
    """
    counts = dict(raw.notes)
    counts["raw_interactions"] = len(raw.interactions)
    titles = _titles(raw.items, spec)
    item = _item_codes(raw)
    user, distinct_users = pd.factorize(raw.interactions["user_id"])
    user_ids = np.asarray(distinct_users, dtype=object)
    timestamp = raw.interactions["timestamp"].to_numpy(dtype=np.int64)

    keep = (titles != "")[item]
    counts["rows_without_title"] = int((~keep).sum())
    counts["items_without_title"] = int((titles == "").sum())
    if spec.min_rating is not None:
        rated = _ratings(raw.interactions) >= spec.min_rating
        counts["rows_below_min_rating"] = int((keep & ~rated).sum())
        keep &= rated
    rows = np.flatnonzero(keep)
    repeated = pd.DataFrame({"u": user[rows], "i": item[rows], "t": timestamp[rows]}).duplicated().to_numpy()
    counts["duplicate_rows"] = int(repeated.sum())
    rows = rows[~repeated]
    rows = _dense_enough(rows, user, item, spec, counts)
    counts["users_dropped"] = len(user_ids) - len(np.unique(user[rows]))
    counts["items_dropped"] = len(titles) - len(np.unique(item[rows]))
    if len(rows) == 0:
        raise DataError(_nothing_left(spec, counts))

    # Stable: equal users and timestamps stay in the order of the source.
    rows = rows[np.lexsort((timestamp[rows], user[rows]))]
    kept_users, lengths = np.unique(user[rows], return_counts=True)
    kept_items, numbered = np.unique(item[rows], return_inverse=True)
    return Sequences(
        user_ids=user_ids[kept_users],
        item_ids=raw.items["item_id"].to_numpy(dtype=object)[kept_items],
        titles=titles[kept_items],
        lengths=lengths.astype(np.int64),
        items=numbered.astype(np.int32),
        timestamps=timestamp[rows],
        counts=counts,
    )


def _titles(items: pd.DataFrame, spec: DatasetSpec) -> npt.NDArray[np.object_]:
    """Return a title for each item, ``(N,)``; empty only where the item is to be dropped."""
    repeated = items["item_id"][items["item_id"].duplicated()]
    if len(repeated):
        raise DataError(
            f"dataset `{spec.name}`: item id {repeated.iloc[0]!r} is there more than once ({len(repeated)} repeats "
            "in all); item ids must be unique. Keep one title for each id."
        )
    titles = items["title"].to_numpy(dtype=object)
    blank = np.array([not title.strip() for title in titles], dtype=bool)
    if not blank.any():
        return titles
    if spec.missing_title == "error":
        named = ", ".join(shorten(each) for each in items["item_id"][blank].head(_SHOWN))
        raise DataError(
            f"dataset `{spec.name}`: {int(blank.sum())} of {len(items)} items have no title ({named}{_more(blank)}). "
            "Teachers read titles: add them, or choose dataset.missing_title=drop (leave such items out) or "
            "dataset.missing_title=id (use the id as title)."
        )
    fallback = items["item_id"].to_numpy(dtype=object) if spec.missing_title == "id" else ""
    return np.where(blank, fallback, titles)


def _item_codes(raw: RawData) -> npt.NDArray[np.int64]:
    """Return the row in `raw.items` of each interaction's item, ``(M,)``."""
    codes = pd.Index(raw.items["item_id"]).get_indexer(pd.Index(raw.interactions["item_id"]))
    unknown = codes < 0
    if unknown.any():
        missing = raw.interactions["item_id"][unknown]
        named = ", ".join(shorten(each) for each in missing.drop_duplicates().head(_SHOWN))
        raise DataError(
            f"{int(unknown.sum())} interactions name {missing.nunique()} items that are not among the "
            f"{len(raw.items)} items ({named}{_more(missing.drop_duplicates())}). Add these items with their titles, "
            "or take the interactions out; ids are compared as text, so '7' and '007' differ."
        )
    return codes.astype(np.int64)


def _more(values: object) -> str:
    """Continue a list of examples that was cut."""
    n_values = int(values.sum()) if isinstance(values, np.ndarray) else len(values)  # type: ignore[arg-type]
    return ", ..." if n_values > _SHOWN else ""


def _ratings(interactions: pd.DataFrame) -> npt.NDArray[np.float64]:
    if "rating" not in interactions:
        raise ConfigError(
            "`dataset.min_rating` is set but the interactions have no ratings; name the column "
            "(dataset.rating_column=...) or take the threshold away (dataset.min_rating=null)."
        )
    return interactions["rating"].to_numpy(dtype=np.float64)


def _dense_enough(
    rows: npt.NDArray[np.int64],
    user: npt.NDArray[np.int64],
    item: npt.NDArray[np.int64],
    spec: DatasetSpec,
    counts: dict[str, int],
) -> npt.NDArray[np.int64]:
    """Take away users and items below the k-core, and users too short to split, until nothing changes.

    Dropping a short user can push an item below the core and the other way round, hence one loop for both.
    """
    before_core = before_short = 0
    n_users_short = 0
    while True:
        n_rows = len(rows)
        while spec.k_core > 1 and len(rows):
            dense = (np.bincount(user[rows]) >= spec.k_core)[user[rows]]
            dense &= (np.bincount(item[rows]) >= spec.k_core)[item[rows]]
            if dense.all():
                break
            before_core += int((~dense).sum())
            rows = rows[dense]
        lengths = np.bincount(user[rows]) if len(rows) else np.zeros(0, dtype=np.int64)
        long_enough = (lengths >= spec.min_interactions)[user[rows]]
        n_users_short += int(((lengths > 0) & (lengths < spec.min_interactions)).sum())
        before_short += int((~long_enough).sum())
        rows = rows[long_enough]
        if len(rows) == n_rows:
            break
    counts["rows_below_k_core"] = before_core
    counts["users_too_short"] = n_users_short
    counts["rows_of_short_users"] = before_short
    return rows


def _nothing_left(spec: DatasetSpec, counts: dict[str, int]) -> str:
    lost = ", ".join(
        f"{counts[key]:,} {what}"
        for key, what in (
            ("rows_without_title", "without a title"),
            ("rows_below_min_rating", f"rated below {spec.min_rating}"),
            ("duplicate_rows", "exact duplicates"),
            ("rows_below_k_core", f"outside the {spec.k_core}-core"),
            ("rows_of_short_users", f"of users with fewer than {spec.min_interactions} interactions"),
        )
        if counts.get(key)
    )
    return (
        f"dataset `{spec.name}`: no interaction is left of {counts['raw_interactions']:,} ({lost or 'none came in'}). "
        f"A user needs at least {spec.min_interactions} interactions (dataset.min_interactions); give more data, or "
        "lower dataset.k_core or dataset.min_rating."
    )
