"""Columns out of csv, tsv, parquet and JSON-lines files, with the line of every row for error messages."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from llm2rec.core.errors import DataError
from llm2rec.data._files import data_suffix, numbered_lines, shorten

__all__ = ["Column", "Table", "read_table"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")

# The csv module's own limit of 128 KiB a field would refuse long descriptions.
_FIELD_LIMIT_CHARS = 1 << 27
_ROWS_PER_CHUNK = 1 << 16


@dataclass(frozen=True)
class Column:
    """A column asked for.

    Attributes:
        name: What the file calls it.
        option: The setting that names it, for messages.
        nullable: Whether a row may lack it.
    """

    name: str
    option: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """Columns of a file, under our names.

    Attributes:
        path: The file.
        columns: Values by our name; text for csv and tsv, the file's own types otherwise.
        names: The file's column name by our name.
        place: Words for where a row (from 0) is in the file, such as `a.csv, line 3`.
    """

    path: Path
    columns: dict[str, pd.Series]
    names: dict[str, str]
    place: Callable[[int], str]


def read_table(path: Path, wanted: Mapping[str, Column]) -> Table:
    """Read columns of a file whose format its suffix tells.

    Args:
        path: The file.
        wanted: Columns by our name for them.

    Returns:
        The columns, as many rows as the file has.

    Raises:
        DataError: If the format or a column is unknown, the file is empty, or a row is malformed.
    """
    suffix = data_suffix(path)
    if suffix in _DELIMITERS:
        return _read_delimited(path, wanted, _DELIMITERS[suffix])
    if suffix in _JSON_LINES:
        return _read_json_lines(path, wanted)
    if suffix == ".parquet":
        return _read_parquet(path, wanted)
    raise DataError(
        f"{path}: unknown format {suffix!r}; expected .csv, .tsv, .jsonl or .ndjson (each also .gz) or .parquet. "
        "Rename or convert the file."
    )


def _require_columns(path: Path, wanted: Mapping[str, Column], there: list[str]) -> None:
    for column in wanted.values():
        if column.name not in there:
            raise DataError(
                f"{path}: there is no column `{column.name}`; the columns are {', '.join(there)}. Name the right one: "
                f"dataset.{column.option}=COLUMN"
            )
        if there.count(column.name) > 1:
            raise DataError(f"{path}: column `{column.name}` is there {there.count(column.name)} times; keep one.")


def _read_delimited(path: Path, wanted: Mapping[str, Column], delimiter: str) -> Table:
    """Read with the csv module in its strict mode.

    Arrow reads several times faster, but an unclosed quote makes it swallow the rows up to the next quote without a
    word; and whoever prepares data waits for this once.
    """
    rows = _rows(path, delimiter)
    header = next(rows, (0, []))[1]
    if not header:
        raise DataError(f"{path} is empty; expected a first line with the column names.")
    _require_columns(path, wanted, header)
    at = [header.index(column.name) for column in wanted.values()]
    # Python strings are several times the size of Arrow's, so they are packed as they come.
    chunks: list[list[pa.Array]] = [[] for _ in at]
    while taken := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
        for number, fields in taken:
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, line {number}: {len(fields)} fields, expected {len(header)} as in the first line "
                    f"({shorten(delimiter.join(fields))}). Correct the line; a value that holds {delimiter!r} needs "
                    "double quotes."
                )
        for chunk, index in zip(chunks, at, strict=True):
            chunk.append(pa.array([fields[index] for _, fields in taken], pa.large_string()))
    columns = (pa.chunked_array(chunk, pa.large_string()).to_pandas().astype("str") for chunk in chunks)
    return Table(
        path=path,
        columns=dict(zip(wanted, columns, strict=True)),
        names={ours: column.name for ours, column in wanted.items()},
        place=lambda row: _line_of_row(path, delimiter, row),
    )


def _line_of_row(path: Path, delimiter: str, row: int) -> str:
    """Say where a row is; read again, because quoted values may span lines and this is only for errors."""
    for at, (number, _) in enumerate(_rows(path, delimiter)):
        if at == row + 1:  # the header is the row before the first
            return f"{path}, line {number}"
    return f"{path}, row {row + 1}"


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's last line, and its fields; blank lines are passed over.

    Raises:
        DataError: If quotes are wrong, the file is not UTF-8 text, or its compression is broken.
    """
    csv.field_size_limit(_FIELD_LIMIT_CHARS)
    last = 0
    try:
        with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for fields in reader:
                last = reader.line_num
                if fields:
                    yield last, fields
    except UnicodeDecodeError:
        # The text layer decodes whole blocks; line by line, the bad line is found and named.
        for _ in numbered_lines(path):
            pass
        raise
    except csv.Error as error:
        raise DataError(
            f"{path}, line {last + 1}: the row that begins here cannot be read ({error}). Correct its double quotes: "
            'a value with quotes is written "like ""this""".'
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {last} ({error}); fetch the file again.") from error


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _read_json_lines(path: Path, wanted: Mapping[str, Column]) -> Table:
    values: dict[str, list[Any]] = {ours: [] for ours in wanted}
    lines: list[int] = []
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {shorten(line)} is not JSON ({error}); expected one object a line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: {shorten(line)} is not an object such as {{"user_id": ...}}.')
        if not lines:
            _require_columns(path, wanted, list(record))
        for ours, column in wanted.items():
            value = record.get(column.name)
            is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            if not is_plain and not (value is None and column.nullable):
                raise DataError(
                    f"{path}, line {number}: `{column.name}` is {shorten(value)}, expected text or a number. Correct "
                    f"the line, or name another column: dataset.{column.option}=COLUMN"
                )
            values[ours].append(value)
        lines.append(number)
    if not lines:
        raise DataError(f"{path} is empty; expected one JSON object a line.")
    return Table(
        path=path,
        columns={ours: _series(each) for ours, each in values.items()},
        names={ours: column.name for ours, column in wanted.items()},
        place=lambda row: f"{path}, line {lines[row]}",
    )


def _series(values: list[Any]) -> pd.Series:
    """Text where any value is text, so that 7 and "007" in one column stay themselves; numbers otherwise."""
    if any(isinstance(value, str) for value in values):
        return pd.Series([None if value is None else str(value) for value in values], dtype="str")
    return pd.Series(values)


def _read_parquet(path: Path, wanted: Mapping[str, Column]) -> Table:
    try:
        file = pa_parquet.ParquetFile(path)
        _require_columns(path, wanted, file.schema_arrow.names)
        table = file.read(columns=[column.name for column in wanted.values()])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error}); save it again.") from error
    columns = {}
    for ours, column in wanted.items():
        values = table[column.name]
        if values.null_count and not column.nullable:
            row = values.is_null().to_pylist().index(True)
            raise DataError(
                f"{path}, row {row + 1}: `{column.name}` is empty ({values.null_count} rows are like that). Fill or "
                "remove such rows."
            )
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_date(values.type):
            values = values.cast(pa.timestamp("us"))  # pandas would make Python objects of dates
        columns[ours] = values.to_pandas()
    return Table(
        path=path,
        columns=columns,
        names={ours: column.name for ours, column in wanted.items()},
        place=lambda row: f"{path}, row {row + 1}",
    )
