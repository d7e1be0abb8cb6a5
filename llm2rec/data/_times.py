"""Timestamps of every kind as integers; the kind of a column is known after reading all of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.core.errors import DataError
from llm2rec.data._files import shorten
from llm2rec.data._table_reader import Table

__all__ = ["InvalidRows", "read_times"]

Times = Callable[[pd.Series], npt.NDArray[np.int64]]

_LARGEST_SECONDS = 9e12


class InvalidRows:
    """Invalid rows of a column, counted part by part.

    Args:
        table: The table.
        column: The column, by our name.
        expected: A description of valid rows.
    """

    def __init__(self, table: Table, column: str, expected: str) -> None:
        self._table, self._column, self._expected = table, column, expected
        self._n_rows = self.n_bad = self._first = 0

    def add(self, bad: npt.NDArray[np.bool_]) -> None:
        """Count the invalid rows of the next part."""
        if not self.n_bad and bad.any():
            self._first = self._n_rows + int(bad.argmax())
        self._n_rows, self.n_bad = self._n_rows + len(bad), self.n_bad + int(bad.sum())

    @property
    def is_all(self) -> bool:
        """Whether all rows are invalid."""
        return self.n_bad == self._n_rows

    def check(self) -> None:
        """Raise for the first invalid row, if there is one.

        Raises:
            DataError: Naming file, line, column and value.
        """
        if not self.n_bad:
            return
        row = self._first
        for part in self._table.parts():
            if row < len(part[self._column]):
                break
            row -= len(part[self._column])
        raise DataError(
            f"{self._table.place(self._first)}: column `{self._table.names[self._column]}` holds "
            f"{shorten(part[self._column].iloc[row])}, expected {self._expected} ({self.n_bad} of {self._n_rows} rows "
            "are invalid). Correct or remove these rows."
        )


def read_times(table: Table) -> Times:
    """Detect the kind of timestamps that a column holds, and check all of them.

    Returns:
        A function that converts a part of the column to int64: integers stay, decimal seconds and dates become
        microseconds.

    Raises:
        DataError: If a row holds no timestamp, or one of another kind than the others.
    """
    first = next((part["timestamp"] for part in table.parts()), pd.Series(dtype="int64"))  # a header alone has no part
    if pd.api.types.is_datetime64_any_dtype(first):
        return _checked_dates(table, lambda values: pd.to_datetime(values, utc=True))
    if pd.api.types.is_integer_dtype(first):
        return lambda values: values.to_numpy(dtype=np.int64)
    is_text = pd.api.types.is_string_dtype(first) or first.dtype == object
    if is_text and all(_integers(part["timestamp"]) is not None for part in table.parts()):
        return lambda values: values.astype("str").to_numpy(dtype=object).astype(np.int64)
    finite = InvalidRows(table, "timestamp", "a number like the others, or an ISO 8601 date in every row")
    numeric = InvalidRows(table, "timestamp", "")
    exact = InvalidRows(table, "timestamp", "a number below 2^53, or integers without a point")
    small = InvalidRows(table, "timestamp", "seconds, at most 9e12")
    are_whole = True
    for part in table.parts():
        numbers = _decimals(part["timestamp"])
        numeric.add(np.isnan(numbers))
        finite.add(~np.isfinite(numbers))
        exact.add(np.abs(numbers) >= 2.0**53)
        small.add(np.abs(numbers) > _LARGEST_SECONDS)
        are_whole &= bool((numbers == np.floor(numbers)).all())
    # A date like 2020-01-01 is no number, so a column of dates has none; one stray date among numbers is an error.
    if numeric.is_all and pd.api.types.is_string_dtype(first):
        return _checked_dates(table, lambda values: pd.to_datetime(values, errors="coerce", utc=True, format="ISO8601"))
    finite.check()
    (exact if are_whole else small).check()
    if are_whole:
        return lambda values: _decimals(values).astype(np.int64)
    return lambda values: np.round(_decimals(values) * 1e6).astype(np.int64)


def _integers(values: pd.Series) -> npt.NDArray[np.int64] | None:
    try:
        return values.astype("str").to_numpy(dtype=object).astype(np.int64)
    except (ValueError, OverflowError):
        return None  # not all integers: numbers or dates


def _decimals(values: pd.Series) -> npt.NDArray[np.float64]:
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def _checked_dates(table: Table, parse: Callable[[pd.Series], pd.Series]) -> Times:
    invalid = InvalidRows(table, "timestamp", "an ISO 8601 date such as 2024-05-31T12:30:00 or a number")
    for part in table.parts():
        invalid.add(parse(part["timestamp"]).isna().to_numpy())
    invalid.check()
    return lambda values: parse(values).dt.tz_convert(None).to_numpy(dtype="datetime64[us]").astype(np.int64)
