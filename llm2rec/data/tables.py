"""Any user's own interactions and items: csv, tsv, parquet or JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.core.errors import DataError
from llm2rec.data._files import existing_file, shorten
from llm2rec.data._table_reader import Column, Table, read_table
from llm2rec.data.spec import DatasetSpec, RawData, path_field

__all__ = ["CsvTables"]


@dataclass
class CsvTables(DatasetSpec):
    """A table of interactions and a table of items.

    The format is told by the suffix: `.csv`, `.tsv`, `.parquet`, `.jsonl` (or `.ndjson`); all but parquet may end
    in `.gz`. Ids are text and kept exactly (`007` stays `007`). Timestamps are integers of any unit, decimal
    numbers (taken as seconds and kept to the microsecond) or ISO 8601 dates (kept to the microsecond; without a
    zone they are UTC). Titles have their white space normalised.

    Attributes:
        interactions: Path of the interactions.
        items: Path of the items.
        user_column: Column of the interactions that holds the user id.
        item_column: Column of the interactions that holds the item id.
        timestamp_column: Column of the interactions that holds the time.
        rating_column: Column of the interactions that holds the rating; None where there are none.
        item_id_column: Column of the items that holds the item id.
        title_column: Column of the items that holds the title.
    """

    _target_: str = "llm2rec.data.tables.CsvTables"
    name: str = "csv"
    interactions: str = path_field()
    items: str = path_field()
    user_column: str = "user_id"
    item_column: str = "item_id"
    timestamp_column: str = "timestamp"
    rating_column: str | None = None
    item_id_column: str = "item_id"
    title_column: str = "title"

    def raw_files(self) -> list[Path]:
        """Return the two files.

        Raises:
            DataError: If one is missing.
        """
        return [existing_file(self.interactions, "interactions"), existing_file(self.items, "items")]

    def read(self) -> RawData:
        """Read both tables.

        Raises:
            DataError: If a file is missing, has an unknown format or lacks a column, or a row is malformed.
        """
        interactions_path, items_path = self.raw_files()
        return RawData(interactions=self._read_interactions(interactions_path), items=self._read_items(items_path))

    def _read_interactions(self, path: Path) -> pd.DataFrame:
        wanted = {
            "user_id": Column(self.user_column, "user_column"),
            "item_id": Column(self.item_column, "item_column"),
            "timestamp": Column(self.timestamp_column, "timestamp_column"),
        }
        if self.rating_column is not None:
            wanted["rating"] = Column(self.rating_column, "rating_column")
        table = read_table(path, wanted)
        frame = pd.DataFrame(
            {
                "user_id": _ids(table, "user_id"),
                "item_id": _ids(table, "item_id"),
                "timestamp": _timestamps(table),
            }
        )
        if "rating" in wanted:
            ratings = pd.to_numeric(table.columns["rating"], errors="coerce").to_numpy(dtype=np.float64)
            _refuse(table, "rating", ~np.isfinite(ratings), "a number")
            frame["rating"] = ratings
        return frame

    def _read_items(self, path: Path) -> pd.DataFrame:
        table = read_table(
            path,
            {
                "item_id": Column(self.item_id_column, "item_id_column"),
                "title": Column(self.title_column, "title_column", nullable=True),
            },
        )
        ids = _ids(table, "item_id")
        repeated = ids.duplicated().to_numpy()
        if repeated.any():
            row = int(np.flatnonzero(repeated)[0])
            first = int(np.flatnonzero((ids == ids.iloc[row]).to_numpy())[0])
            raise DataError(
                f"{table.place(row)}: item id {ids.iloc[row]!r} is there already ({table.place(first)}); item ids "
                "must be unique. Keep one row for each id."
            )
        titles = [" ".join(str(title).split()) for title in table.columns["title"].fillna("")]
        blank = [row for row, title in enumerate(titles) if not title]
        if blank and self.missing_title == "error":
            raise DataError(
                f"{table.place(blank[0])}: item {ids.iloc[blank[0]]!r} has no title, as have {len(blank)} of "
                f"{len(titles)} items. Teachers read titles: add them, or choose dataset.missing_title=drop (leave "
                "such items out) or dataset.missing_title=id (use the id as title)."
            )
        return pd.DataFrame({"item_id": ids, "title": pd.Series(titles, dtype="str")})


def _refuse(table: Table, column: str, bad: npt.NDArray[np.bool_], expected: str) -> None:
    """Raise for the first row marked bad, naming file, line, column and value."""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = table.columns[column].iloc[row]
        count = int(bad.sum())
        raise DataError(
            f"{table.place(row)}: column `{table.names[column]}` holds {shorten(value)}, expected {expected} "
            f"({count} of {len(bad)} rows are like that). Correct or remove such rows."
        )


def _ids(table: Table, column: str) -> pd.Series:
    ids = table.columns[column]
    if not (pd.api.types.is_string_dtype(ids) or pd.api.types.is_integer_dtype(ids)):
        raise DataError(
            f"{table.path}: column `{table.names[column]}` holds {ids.dtype} values, expected text or integers "
            "(decimal ids come from missing values). Save the ids as text."
        )
    bad = ids.isna().to_numpy() | (ids.astype("str").str.strip() == "").to_numpy(dtype=bool)
    _refuse(table, column, bad, "an id")
    return ids.astype("str")


def _timestamps(table: Table) -> npt.NDArray[np.int64]:
    """Return times as int64: integers as they are, decimal seconds and dates in microseconds."""
    values = table.columns["timestamp"]
    if pd.api.types.is_datetime64_any_dtype(values):
        return _microseconds(table, pd.to_datetime(values, utc=True))
    if pd.api.types.is_integer_dtype(values) and not values.isna().any():
        return values.to_numpy(dtype=np.int64)
    if pd.api.types.is_string_dtype(values) or values.dtype == object:
        try:
            return values.astype("str").to_numpy(dtype=object).astype(np.int64)
        except (ValueError, OverflowError):
            pass  # not all integers: numbers or dates
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    # A date like 2020-01-01 is no number, so a column of dates has none; one stray date among numbers is an error.
    if np.isnan(numbers).all() and pd.api.types.is_string_dtype(values):
        return _microseconds(table, pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601"))
    expected = "a number like the others, or an ISO 8601 date in every row"
    _refuse(table, "timestamp", ~np.isfinite(numbers), expected)
    if (numbers == np.floor(numbers)).all():
        _refuse(table, "timestamp", np.abs(numbers) >= 2.0**53, "a number below 2^53, or integers without a point")
        return numbers.astype(np.int64)
    _refuse(table, "timestamp", np.abs(numbers) > 9e12, "seconds, at most 9e12")
    return np.round(numbers * 1e6).astype(np.int64)


def _microseconds(table: Table, times: pd.Series) -> npt.NDArray[np.int64]:
    _refuse(table, "timestamp", times.isna().to_numpy(), "an ISO 8601 date such as 2024-05-31T12:30:00 or a number")
    return times.dt.tz_convert(None).to_numpy(dtype="datetime64[us]").astype(np.int64)
