"""Any user's own interactions and items: csv, tsv, parquet or JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.core.errors import DataError
from llm2rec.data._files import existing_file
from llm2rec.data._table_reader import Column, Table, read_table
from llm2rec.data._text import clean_text
from llm2rec.data._times import InvalidRows, read_times
from llm2rec.data.spec import RawParts, TextSpec, new_field, path_field

__all__ = ["CsvTables"]


@dataclass
class CsvTables(TextSpec):
    """A table of interactions and a table of items.

    The suffix decides the format: `.csv`, `.tsv`, `.parquet`, `.jsonl` (or `.ndjson`); all but parquet may end
    in `.gz`. Ids are text and kept exactly (`007` stays `007`). Timestamps are integers of any unit, decimal
    numbers (taken as seconds and kept to the microsecond) or ISO 8601 dates (kept to the microsecond; without a
    zone they are UTC). Titles have their white space normalised. Columns of `.csv` and `.tsv` may be separated by
    commas, semicolons, tabs or `|`, whichever gives the first line the columns that are asked for.

    Attributes:
        interactions: Path of the interactions.
        items: Path of the items.
        user_column: Column of the interactions that holds the user id.
        item_column: Column of the interactions that holds the item id.
        timestamp_column: Column of the interactions that holds the time.
        rating_column: Column of the interactions that holds the rating; None where there are none.
        item_id_column: Column of the items that holds the item id.
        title_column: Column of the items that holds the title.
        tie_column: Column of the items, such as a product code, by which `ties=item` orders equal timestamps and
            `llm2rec.evaluate` reports test rows whose last two items ascend and descend apart. Text ascends by code
            point, numbers of JSON lines and parquet by size. None for the item id.
        encoding: Of both files' text, by a name that Python knows (``cp1252``, ``shift_jis``, ``utf-16``). A
            byte-order mark of UTF-8, UTF-16 or UTF-32 at the start of a file goes first.
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
    encoding: str = "utf-8"
    tie_column: str | None = new_field(None)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        try:
            "".encode(self.encoding)
        except LookupError:
            problems.append(
                f"`encoding` must be the name of a text encoding such as utf-8, cp1252 (Windows), shift_jis or utf-16 "
                f"(Excel's Unicode text), got {self.encoding!r}"
            )
        return problems

    def raw_files(self) -> list[Path]:
        """Return the two files.

        Raises:
            DataError: If one is missing.
        """
        return [existing_file(self.interactions, "interactions"), existing_file(self.items, "items")]

    def read_parts(self, work: Path | None = None) -> RawParts:
        """Read both tables, that of the interactions in parts.

        Raises:
            DataError: If a file is missing, has an unknown format or lacks a column, or a row is malformed.
        """
        interactions_path, _ = self.raw_files()
        return RawParts(self._read_interactions(interactions_path, work), self.read_items())

    def _read_interactions(self, path: Path, work: Path | None) -> Callable[[], Iterator[pd.DataFrame]]:
        wanted = {
            "user_id": Column(self.user_column, "user_column"),
            "item_id": Column(self.item_column, "item_column"),
            "timestamp": Column(self.timestamp_column, "timestamp_column"),
        }
        if self.rating_column is not None:
            wanted["rating"] = Column(self.rating_column, "rating_column")
        table = read_table(path, wanted, work, self.encoding)
        _check_ids(table, "user_id")
        _check_ids(table, "item_id")
        times = read_times(table)
        if "rating" in wanted:
            invalid = InvalidRows(table, "rating", "a number")
            for part in table.parts():
                invalid.add(~np.isfinite(_numbers(part["rating"])))
            invalid.check()

        def parts() -> Iterator[pd.DataFrame]:
            for part in table.parts():
                columns = {name: part[name].astype("str") for name in ("user_id", "item_id")}
                frame = pd.DataFrame({**columns, "timestamp": times(part["timestamp"])})
                if "rating" in wanted:
                    frame["rating"] = _numbers(part["rating"])
                yield frame

        return parts

    def read_items(self) -> pd.DataFrame:
        """Read the table of items: `item_id`, `title` and, with `text_columns`, `text`.

        Raises:
            DataError: As `read_parts`.
        """
        wanted = {
            "item_id": Column(self.item_id_column, "item_id_column"),
            "title": Column(self.title_column, "title_column", nullable=True),
        }
        for name in self.text_columns:
            wanted[f"text {name}"] = Column(name, "text_columns", nullable=True, may_be_nested=True)
        if self.tie_column is not None:
            wanted["order"] = Column(self.tie_column, "tie_column")
        table = read_table(existing_file(self.items, "items"), wanted, encoding=self.encoding)
        _check_ids(table, "item_id")
        if "order" in wanted:
            _check_ids(table, "order")
        columns = table.whole()
        ids = columns["item_id"].astype("str")
        repeated = ids.duplicated().to_numpy()
        if repeated.any():
            row = int(np.flatnonzero(repeated)[0])
            first = int(np.flatnonzero((ids == ids.iloc[row]).to_numpy())[0])
            raise DataError(
                f"{table.place(row)}: item id {ids.iloc[row]!r} occurs before ({table.place(first)}); item ids "
                "must be unique. Keep one row for each id."
            )
        titles = [" ".join(str(title).split()) for title in columns["title"].fillna("")]
        blank = [row for row, title in enumerate(titles) if not title]
        if blank and self.missing_title == "error":
            raise DataError(
                f"{table.place(blank[0])}: item {ids.iloc[blank[0]]!r} has no title, as have {len(blank)} of "
                f"{len(titles)} items. Teachers read titles: add them, or choose dataset.missing_title=drop (leave "
                "such items out) or dataset.missing_title=id (use the id as title)."
            )
        items = pd.DataFrame({"item_id": ids, "title": pd.Series(titles, dtype="str")})
        texts = [columns[f"text {name}"].map(clean_text).tolist() for name in self.text_columns]
        items = self._with_texts(items, texts)
        if "order" in wanted:
            items["order"] = pd.factorize(columns["order"], sort=True)[0].astype(np.int32)
        return items


def _check_ids(table: Table, column: str) -> None:
    invalid = InvalidRows(table, column, "an id")
    for part in table.parts():
        ids = part[column]
        if not (pd.api.types.is_string_dtype(ids) or pd.api.types.is_integer_dtype(ids)):
            raise DataError(
                f"{table.path}: column `{table.names[column]}` holds {ids.dtype} values, expected text or integers "
                "(decimal ids come from missing values). Save the ids as text."
            )
        invalid.add(ids.isna().to_numpy() | (ids.astype("str").str.strip() == "").to_numpy(dtype=bool))
    invalid.check()


def _numbers(values: pd.Series) -> npt.NDArray[np.float64]:
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
