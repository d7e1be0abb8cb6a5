"""From raw tables to numbered, ordered sequences: titles, thresholds, duplicates, k-core, short users.

Interactions go from file to file, so that memory grows with users and items, not with interactions: filters need only
counts, and duplicates and order are found user by user.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.data._buckets import ROW, Buckets, Rows, partitioned
from llm2rec.data._files import shorten
from llm2rec.data._ties import TieKey, tie_key
from llm2rec.data.spec import DatasetSpec, RawParts

__all__ = ["Sequences", "check_titles", "filter_and_number"]

_SHOWN = 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """Interactions after all filters, grouped by user and ordered in time.

    Attributes:
        user_ids: Raw id of each user, ``(U,)``; users are numbered in the order they first appear.
        item_ids: Raw id of each item, ``(N,)``; items keep the order of the source's item table.
        titles: Title of each item, ``(N,)``.
        item_columns: Other columns of the items that the source has, ``(N,)`` each.
        lengths: Interactions of each user, ``(U,)``.
        buckets: Interactions, user after user, oldest first, by the numbers of ``user_ids`` and ``item_ids``.
        counts: Interactions, users and items that each filter removed, by name.
    """

    user_ids: npt.NDArray[np.object_]
    item_ids: npt.NDArray[np.object_]
    titles: npt.NDArray[np.object_]
    item_columns: dict[str, npt.NDArray[Any]]
    lengths: npt.NDArray[np.int64]
    buckets: Buckets
    counts: dict[str, int]

    @property
    def n_interactions(self) -> int:
        """Interactions after all filters."""
        return int(self.lengths.sum())


def filter_and_number(raw: RawParts, spec: DatasetSpec, work: Path) -> Sequences:
    """Apply the filters of `spec` and number the remaining users and items.

    The order is: items that the item table lacks, titles, rating threshold, exact duplicates (same user, item and
    timestamp; the first stays), then k-core and short users together until neither removes anything. Interactions are
    sorted by user, time, the key of `spec.ties` and original row, so that equal timestamps keep the order of the source
    where there is no such key. Items without interactions are left out of the catalogue.

    Args:
        raw: Tables as the source yields them.
        spec: The settings.
        work: A folder for intermediate files; the returned sequences read from there.

    Returns:
        The sequences, with counts of everything removed.

    Raises:
        DataError: If an item id occurs twice, an interaction names an unknown item, a title is missing, or
            nothing is left, or a global time split would cut at positions.
        ConfigError: If there is a rating threshold and the source has no ratings.
    """
    titles = check_titles(raw.items, spec)
    numbering = _Numbering(raw, spec, titles)
    with open(work / "interactions", "wb") as file:
        for rows in numbering.rows():
            rows.tofile(file)
    counts, user_ids = numbering.counts, numbering.user_ids()
    buckets = partitioned(work / "interactions", numbering.of_users[: len(user_ids)], len(titles), work)
    (work / "interactions").unlink()

    n_rows = _n_rows(buckets)
    buckets.change(lambda rows: rows[~pd.DataFrame(rows).duplicated().to_numpy()])
    counts["duplicate_rows"] = n_rows - _n_rows(buckets)
    if spec.split == "global_time":
        _check_times(buckets, numbering.raw_of_users[: len(user_ids)], spec)
    of_users, of_items = _dense_enough(buckets, spec, counts)
    kept_users, kept_items = of_users > 0, of_items > 0
    counts["users_dropped"] = int((~kept_users).sum())
    counts["items_dropped"] = int((~kept_items).sum())
    if not kept_users.any():
        raise DataError(_nothing_left(spec, counts))
    _finish(buckets, kept_users, kept_items, tie_key(spec, user_ids, raw.items))
    return Sequences(
        user_ids=user_ids[kept_users],
        item_ids=raw.items["item_id"].to_numpy(dtype=object)[kept_items],
        titles=titles[kept_items],
        item_columns={name: raw.items[name].to_numpy()[kept_items] for name in raw.items.columns[2:]},
        lengths=of_users[kept_users],
        buckets=buckets,
        counts=counts,
    )


class _Numbering:
    """Numbers users and items part by part, and drops interactions by title and rating.

    Args:
        raw: What the source yields.
        spec: The settings.
        titles: Titles of the items, ``(N,)``; empty ones are to be dropped.

    Attributes:
        counts: Removed interactions and items, by name.
        of_users: Remaining interactions of each user, padded with zeros.
    """

    def __init__(self, raw: RawParts, spec: DatasetSpec, titles: npt.NDArray[np.object_]) -> None:
        self._raw, self._spec = raw, spec
        self._items, self._has_title = pd.Index(raw.items["item_id"]), titles != ""
        self._users: dict[str, int] = {}
        self._unknown: dict[str, None] = {}
        self._n_unknown = 0
        self.of_users, self.raw_of_users = np.zeros((2, 1024), np.int64)
        self.counts = {**raw.notes, "raw_interactions": 0, "rows_without_title": 0}
        self.counts["items_without_title"] = int((~self._has_title).sum())
        if spec.missing_items == "drop":
            self.counts["rows_with_missing_items"] = self.counts["missing_items"] = 0
        if spec.min_rating is not None:
            self.counts["rows_below_min_rating"] = 0

    def rows(self) -> Iterator[Rows]:
        """Yield the remaining interactions, part by part.

        Raises:
            DataError: At the end, if interactions name unknown items and these are not to be dropped.
        """
        for part in self._raw.interactions():
            self.counts["raw_interactions"] += len(part)
            item = self._items.get_indexer(pd.Index(part["item_id"]))
            unknown = item < 0
            if unknown.any():
                self._n_unknown += int(unknown.sum())
                self._unknown.update(dict.fromkeys(part["item_id"][unknown]))
            user = self._numbers(part["user_id"])
            keep = self._kept(part, item)
            rows = np.empty(int(keep.sum()), ROW)
            rows["user"], rows["item"], rows["time"] = user[keep], item[keep], part["timestamp"].to_numpy()[keep]
            self._count(user, rows["user"])
            yield rows
        self._settle_unknown()

    def _kept(self, part: pd.DataFrame, item: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        known = item >= 0
        keep = known.copy()
        keep[known] = self._has_title[item[known]]
        self.counts["rows_without_title"] += int((known & ~keep).sum())
        if self._spec.min_rating is not None:
            rated = _ratings(part) >= self._spec.min_rating
            self.counts["rows_below_min_rating"] += int((keep & ~rated).sum())
            keep = keep & rated
        return keep

    def _numbers(self, user_ids: pd.Series) -> npt.NDArray[np.int64]:
        """Number users in the order they first appear."""
        codes, distinct = pd.factorize(user_ids)
        known = self._users
        return np.array([known.setdefault(each, len(known)) for each in distinct], np.int64)[codes]

    def _count(self, users: npt.NDArray[np.int64], kept: npt.NDArray[np.int32]) -> None:
        if (missing := len(self._users) - len(self.of_users)) > 0:
            longer = len(self._users) + missing
            self.of_users, self.raw_of_users = (
                np.pad(each, (0, longer)) for each in (self.of_users, self.raw_of_users)
            )
        np.add.at(self.raw_of_users, users, 1)
        np.add.at(self.of_users, kept, 1)

    def user_ids(self) -> npt.NDArray[np.object_]:
        """Raw ids of all users, in the order of their numbers."""
        ids = np.empty(len(self._users), dtype=object)
        ids[:] = list(self._users)
        return ids

    def _settle_unknown(self) -> None:
        if not self._unknown:
            return
        named = ", ".join(shorten(each) for each in list(self._unknown)[:_SHOWN])
        found = (
            f"{self._n_unknown} interactions name {len(self._unknown)} items that are not among the "
            f"{len(self._items)} items ({named}{', ...' * (len(self._unknown) > _SHOWN)})"
        )
        if self._spec.missing_items == "error":
            raise DataError(
                f"{found}. Add these items with their titles, or leave these interactions out with "
                "dataset.missing_items=drop; ids are compared as text, so '7' and '007' differ."
            )
        _log.warning("%s; dropped", found)
        self.counts["rows_with_missing_items"] = self._n_unknown
        self.counts["missing_items"] = len(self._unknown)


def _check_times(buckets: Buckets, raw_of_users: npt.NDArray[np.int64], spec: DatasetSpec) -> None:
    """Refuse times that count each user's own interactions: 0 to n - 1, or from another common number.

    Filters may have taken some of them away.

    Args:
        buckets: Interactions without duplicates.
        raw_of_users: Each user's interactions before any filter, ``(U,)``.
        spec: The settings.
    """
    first = min((int(rows["time"].min()) for rows in buckets if len(rows)), default=0)
    longest = 0
    for rows in buckets:
        places = rows["time"].astype(np.uint64) - np.array(first).astype(np.uint64)  # wraps around to the difference
        distinct = np.unique(np.stack([rows["user"].astype(np.uint64), places]), axis=1).shape[1]
        if distinct < len(rows) or (places >= raw_of_users[rows["user"]].astype(np.uint64)).any():
            return
        longest = max(longest, int(places.max(initial=0)))
    if longest > 0 and np.count_nonzero(raw_of_users) > 1:
        raise DataError(
            f"dataset `{spec.name}`: split=global_time needs times that can be compared between users, but "
            f"`timestamp` counts each user's own interactions ({first} to {first + longest}). Name a column that "
            "holds times (dataset.timestamp_column=COLUMN), or use dataset.split=leave_one_out."
        )


def _n_rows(buckets: Buckets) -> int:
    return sum(file.stat().st_size for file in buckets.files) // ROW.itemsize


def _finish(
    buckets: Buckets,
    kept_users: npt.NDArray[np.bool_],
    kept_items: npt.NDArray[np.bool_],
    key: TieKey,
) -> None:
    """Drop removed users and items from the buckets, renumber and sort."""
    user_number, item_number = np.cumsum(kept_users) - 1, np.cumsum(kept_items) - 1

    def finished(rows: Rows) -> Rows:
        rows = rows[kept_users[rows["user"]] & kept_items[rows["item"]]]
        # Stable: equal keys stay in the order of the source.
        rows = rows[np.lexsort((key(rows), rows["time"], rows["user"]))]
        rows["user"], rows["item"] = user_number[rows["user"]], item_number[rows["item"]]
        return rows

    buckets.change(finished)
    buckets.n_users, buckets.n_items = int(kept_users.sum()), int(kept_items.sum())


def check_titles(items: pd.DataFrame, spec: DatasetSpec) -> npt.NDArray[np.object_]:
    """Return a title for each item, ``(N,)``; empty only where the item is to be dropped.

    Raises:
        DataError: If an item id occurs twice, or a required title is missing.
    """
    repeated = items["item_id"][items["item_id"].duplicated()]
    if len(repeated):
        raise DataError(
            f"dataset `{spec.name}`: item id {repeated.iloc[0]!r} occurs more than once ({len(repeated)} repeats "
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


def _more(values: object) -> str:
    """The end of a list of examples that was cut."""
    n_values = int(values.sum()) if isinstance(values, np.ndarray) else len(values)  # type: ignore[arg-type]
    return ", ..." if n_values > _SHOWN else ""


def _ratings(interactions: pd.DataFrame) -> npt.NDArray[np.float64]:
    if "rating" not in interactions:
        raise ConfigError(
            "`dataset.min_rating` is set but the interactions have no ratings; name the column "
            "(dataset.rating_column=...) or remove the threshold (dataset.min_rating=null)."
        )
    return interactions["rating"].to_numpy(dtype=np.float64)


def _dense_enough(
    buckets: Buckets, spec: DatasetSpec, counts: dict[str, int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Remove users and items below the k-core, and users too short to split, until nothing changes.

    Removing a short user can push an item below the core and vice versa, hence one loop for both. A user or an item is
    removed with all its interactions, so that two masks describe what is left.

    Returns:
        Remaining interactions of each user, ``(U,)``, and of each item, ``(N,)``.
    """
    users, items = np.ones(buckets.n_users, bool), np.ones(buckets.n_items, bool)
    before_core = before_short = n_users_short = 0

    def counted() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        of_users, of_items = buckets.counts(lambda rows: users[rows["user"]] & items[rows["item"]])
        return of_users, of_items

    of_users, of_items = counted()
    while True:
        n_rows = int(of_users.sum())
        while spec.k_core > 1:
            thin_users, thin_items = (_between(each, spec.k_core) for each in (of_users, of_items))
            if not (thin_users.any() or thin_items.any()):
                break
            users &= ~thin_users
            items &= ~thin_items
            left, of_items = counted()
            before_core, of_users = before_core + int((of_users - left).sum()), left
        short = _between(of_users, spec.min_interactions)
        n_users_short += int(short.sum())
        before_short += int(of_users[short].sum())
        if short.any():
            users &= ~short
            of_users, of_items = counted()
        if int(of_users.sum()) == n_rows:
            break
    counts["rows_below_k_core"] = before_core
    counts["users_too_short"] = n_users_short
    counts["rows_of_short_users"] = before_short
    return of_users, of_items


def _between(counts: npt.NDArray[np.int64], least: int) -> npt.NDArray[np.bool_]:
    """Mask of counts above 0 and below ``least``."""
    return (counts > 0) & (counts < least)


def _nothing_left(spec: DatasetSpec, counts: dict[str, int]) -> str:
    lost = ", ".join(
        f"{counts[key]:,} {what}"
        for key, what in (
            ("rows_with_missing_items", "with items that are not in the item table"),
            ("rows_without_title", "without a title"),
            ("rows_below_min_rating", f"rated below {spec.min_rating}"),
            ("duplicate_rows", "exact duplicates"),
            ("rows_below_k_core", f"outside the {spec.k_core}-core"),
            ("rows_of_short_users", f"of users with fewer than {spec.min_interactions} interactions"),
        )
        if counts.get(key)
    )
    return (
        f"dataset `{spec.name}`: no interaction is left of {counts['raw_interactions']:,} ({lost or 'none at all'}). "
        f"A user needs at least {spec.min_interactions} interactions (dataset.min_interactions); give more data, or "
        "lower dataset.k_core or dataset.min_rating."
    )
