"""Read columns of csv, tsv, parquet and JSON-lines files, with the line of every row for error messages.

Files are read once, in parts.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pa_parquet

from llm2rec.core.errors import DataError
from llm2rec.core.files import opened_with_progress
from llm2rec.core.logging import Progress
from llm2rec.data._files import data_suffix, marked_encoding, numbered_lines, opened, shorten
from llm2rec.data._spill import Spill
from llm2rec.data._text import clean_text

__all__ = ["Column", "Table", "read_table"]

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = (",", ";", "\t", "|")
_JSON_LINES = (".jsonl", ".ndjson")

# The csv module's default limit of 128 KiB per field is too small for long descriptions.
_FIELD_LIMIT_CHARS = 1 << 27
_ROWS_PER_PART = 1 << 14

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A column to read.

    Attributes:
        name: Its name in the file.
        option: The option that holds this name, for messages.
        nullable: Whether values may be missing.
        may_be_nested: Whether values may also be lists or mappings of text; JSON lines yield them as clean text.
    """

    name: str
    option: str
    nullable: bool = False
    may_be_nested: bool = False


@dataclass(frozen=True)
class Table:
    """Columns of a file, under our names.

    Attributes:
        path: The file.
        names: The file's column name by our name.
        place: Words for where a row (from 0) is in the file, such as `a.csv, line 3`.
        parts: Yields the columns by our name, some rows at a time; may be called again. Text for csv and tsv, the
            types of the file otherwise, the same in all parts.
    """

    path: Path
    names: dict[str, str]
    place: Callable[[int], str]
    parts: Callable[[], Iterator[dict[str, pd.Series]]]

    def whole(self) -> dict[str, pd.Series]:
        """All rows of all columns."""
        parts = list(self.parts())
        return {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in self.names}


def read_table(path: Path, wanted: Mapping[str, Column], work: Path | None = None, encoding: str = "utf-8") -> Table:
    """Read columns of a file; its suffix decides the format.

    Args:
        path: The file.
        wanted: Columns by our name for them.
        work: A folder for data that does not fit into memory; None keeps all in memory.
        encoding: Of text; parquet has its own.

    Returns:
        The columns, as many rows as the file has.

    Raises:
        DataError: If the format or a column is unknown, the file is empty, or a row is malformed.
    """
    suffix = data_suffix(path)
    spill = Spill(None if work is None else work / f"{path.name}.columns")
    if suffix in _DELIMITERS:
        return _read_delimited(path, wanted, _DELIMITERS[suffix], spill, encoding)
    if suffix in _JSON_LINES:
        return _read_json_lines(path, wanted, spill, encoding)
    if suffix == ".parquet":
        return _read_parquet(path, wanted)
    raise DataError(
        f"{path}: unknown format {suffix!r}; expected .csv, .tsv, .jsonl or .ndjson (each also .gz) or .parquet. "
        "Rename or convert the file."
    )


def _require_columns(path: Path, wanted: Mapping[str, Column], there: list[str], hint: str = "") -> None:
    for column in wanted.values():
        if column.name not in there:
            alike = next((each for each in there if _plain(each) == _plain(column.name)), None)
            names = ", ".join(
                each if each == each.strip() != "" and each.isprintable() else repr(each) for each in there
            )
            remedy = "Name the right one: " + _override(column.option, "COLUMN" if alike is None else alike)
            if alike is not None and alike != alike.strip():
                remedy += f", or remove the spaces around {alike!r} in the file"
            raise DataError(f"{path}: there is no column `{column.name}`; the columns are {names}{hint}. {remedy}")
        if there.count(column.name) > 1:
            raise DataError(f"{path}: column `{column.name}` is there {there.count(column.name)} times; keep one.")


def _plain(name: str) -> str:
    return name.strip().casefold()


def _override(option: str, name: str) -> str:
    """The override that names a column, quoted for a shell where that is needed."""
    plain = re.fullmatch(r"\w+", name) is not None
    value = name if plain else f'"{name}"'
    value = f"[{value}]" if option.endswith("columns") else value
    return f"dataset.{option}={value}" if plain else f"'dataset.{option}={value}'"


def _delimiter(path: Path, wanted: Mapping[str, Column], usual: str, encoding: str) -> str:
    """Return the delimiter under which the first line holds most of the wanted columns, then most columns.

    Args:
        path: The file.
        wanted: The columns.
        usual: The delimiter of the file's suffix, which is preferred.
        encoding: Of the text.
    """
    names = {column.name for column in wanted.values()}

    def found(delimiter: str) -> tuple[int, int]:
        try:
            header = next(_rows(path, delimiter, encoding), (0, []))[1]
        except DataError:  # raised again when the file is read
            return 0, 0
        return len(names.intersection(header)), len(header)

    best = max((usual, *_OTHER_DELIMITERS), key=found)
    if best != usual:
        _log.info("%s: columns are separated by %r, not by %r", path, best, usual)
    return best


def _read_delimited(path: Path, wanted: Mapping[str, Column], usual: str, spill: Spill, encoding: str) -> Table:
    """Read with the csv module in its strict mode.

    Arrow reads several times faster, but after an unclosed quote it silently swallows the rows up to the next quote;
    and data is prepared only once.
    """
    delimiter = _delimiter(path, wanted, usual, encoding)
    rows = _rows(path, delimiter, encoding)
    header = next(rows, (0, []))[1]
    if not header:
        raise DataError(f"{path} is empty; expected a first line with the column names.")
    hint = " (a separator must be a comma, a semicolon, a tab or |)" if len(header) == 1 else ""
    if any("\0" in name for name in header):
        hint = " (UTF-16 without a byte-order mark? Then dataset.encoding=utf-16-le)"
    _require_columns(path, wanted, header, hint)
    at = [header.index(column.name) for column in wanted.values()]
    empty = pa.table({ours: pa.array([], pa.large_string()) for ours in wanted})
    spill.append(empty)
    while taken := list(itertools.islice(rows, _ROWS_PER_PART)):
        for number, fields in taken:
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, line {number}: {len(fields)} fields, expected {len(header)} as in the first line "
                    f"({shorten(delimiter.join(fields))}). Correct the line; a value that holds {delimiter!r} needs "
                    "double quotes."
                )
        columns = [pa.array([fields[index] for _, fields in taken], pa.large_string()) for index in at]
        spill.append(pa.table(dict(zip(wanted, columns, strict=True))))
    spill.close()

    def parts() -> Iterator[dict[str, pd.Series]]:
        for part in spill.parts():
            yield {ours: part[ours].to_pandas().astype("str") for ours in wanted}

    names = {ours: column.name for ours, column in wanted.items()}
    return Table(path, names, lambda row: _line_of_row(path, delimiter, encoding, row), parts)


def _line_of_row(path: Path, delimiter: str, encoding: str, row: int) -> str:
    """Where a row is, for error messages; reads the file again, because quoted values may span lines."""
    for at, (number, _) in enumerate(_rows(path, delimiter, encoding)):
        if at == row + 1:  # the header is the row before the first
            return f"{path}, line {number}"
    return f"{path}, row {row + 1}"


def _rows(path: Path, delimiter: str, encoding: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's last line, and its fields; blank lines are skipped.

    Raises:
        DataError: If quotes are wrong, the file is not text in this encoding, or its compression is broken.
    """
    csv.field_size_limit(_FIELD_LIMIT_CHARS)
    last = 0
    try:
        with opened_with_progress(path) as raw, opened(raw) as content:
            encoding = marked_encoding(content, encoding)
            without_mark = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
            with io.TextIOWrapper(content, encoding=without_mark, newline="") as text:
                reader = csv.reader(text, delimiter=delimiter, strict=True)
                for fields in reader:
                    last = reader.line_num
                    if fields:
                        yield last, fields
    except UnicodeDecodeError:
        # The text layer decodes whole blocks; reading line by line finds the bad line.
        for _ in _lines(path, encoding):
            pass
        raise
    except csv.Error as error:
        raise DataError(
            f"{path}, line {last + 1}: the row that starts here cannot be read ({error}). Correct its double quotes: "
            'a value with quotes is written "like ""this""".'
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {last} ({error}); fetch the file again.") from error


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    return numbered_lines(path, encoding, "save the file as utf-8, or name its encoding: dataset.encoding=cp1252")


def _read_json_lines(path: Path, wanted: Mapping[str, Column], spill: Spill, encoding: str) -> Table:
    kinds: dict[str, set[type]] = {ours: set() for ours in wanted}

    def plain(value: Any, ours: str) -> str | None:
        value = clean_text(value) if wanted[ours].may_be_nested else value
        kinds[ours].add(type(value))
        return None if value is None else str(value)  # of a float, the text that parses to the same float

    records = _records(path, wanted, encoding)
    while taken := list(itertools.islice(records, _ROWS_PER_PART)):
        columns = {ours: [plain(record[ours], ours) for record in taken] for ours in wanted}
        spill.append(pa.table({ours: pa.array(each, pa.large_string()) for ours, each in columns.items()}))
    spill.close()
    if not any(kinds.values()):
        raise DataError(f"{path} is empty; expected one JSON object per line.")

    def parts() -> Iterator[dict[str, pd.Series]]:
        for part in spill.parts():
            yield {ours: _typed(part[ours].to_pandas().astype("str"), kinds[ours]) for ours in wanted}

    names = {ours: column.name for ours, column in wanted.items()}
    return Table(path, names, lambda row: _line_of_record(path, encoding, row), parts)


def _records(path: Path, wanted: Mapping[str, Column], encoding: str) -> Iterator[dict[str, Any]]:
    """Yield the values of each line, by our names."""
    is_first = True
    for number, line in _lines(path, encoding):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter: thousands of brackets within brackets
            raise DataError(
                f"{path}, line {number}: {shorten(line)} is not JSON ({error}); expected one object per line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(f'{path}, line {number}: {shorten(line)} is not an object such as {{"user_id": ...}}.')
        if is_first:
            _require_columns(path, wanted, list(record))
            is_first = False
        values = {ours: record.get(column.name) for ours, column in wanted.items()}
        for ours, value in values.items():
            _check_value(value, wanted[ours], f"{path}, line {number}")
        yield values


def _check_value(value: Any, column: Column, where: str) -> None:
    is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    is_plain = is_plain or (isinstance(value, (list, dict)) and column.may_be_nested)
    if not is_plain and not (value is None and column.nullable):
        raise DataError(
            f"{where}: `{column.name}` is {shorten(value)}, expected text or a number. Correct the line, or name "
            f"another column: dataset.{column.option}=COLUMN"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError(
            f"{where}: `{column.name}` is a number beyond 64 bits, expected a smaller one, or text. Correct the line."
        )


def _line_of_record(path: Path, encoding: str, row: int) -> str:
    """Where a row is, for error messages; reads the file again."""
    number, _ = next(itertools.islice(_lines(path, encoding), row, None))
    return f"{path}, line {number}"


def _typed(values: pd.Series, kinds: set[type]) -> pd.Series:
    """Text where any value of the column is text, so that 7 and "007" stay distinct; numbers otherwise."""
    if str in kinds:
        return values
    numbers = kinds - {type(None)}
    return values.astype("int64" if kinds == {int} else "float64") if numbers else values.astype(object)


def _read_parquet(path: Path, wanted: Mapping[str, Column]) -> Table:
    file = _opened_parquet(path)
    _require_columns(path, wanted, file.schema_arrow.names)
    for ours, column in wanted.items():
        _check_type(path, file.schema_arrow.field(column.name).type, column, may_be_time=ours == "timestamp")
        if not column.nullable:
            _check_no_nulls(path, column)

    def parts() -> Iterator[dict[str, pd.Series]]:
        first = file.schema_arrow.empty_table().select([column.name for column in wanted.values()])
        for part in itertools.chain([first], _parquet_parts(path, [column.name for column in wanted.values()])):
            yield {ours: _of_parquet(part[column.name]) for ours, column in wanted.items()}

    return Table(
        path, {ours: column.name for ours, column in wanted.items()}, lambda row: f"{path}, row {row + 1}", parts
    )


def _check_type(path: Path, kind: pa.DataType, column: Column, *, may_be_time: bool) -> None:
    """Refuse what JSON lines refuse too: lists, structs, booleans and bytes, whose text would be Python's."""
    of = pa.types
    while of.is_dictionary(kind) or (column.may_be_nested and (of.is_list(kind) or of.is_large_list(kind))):
        kind = kind.value_type
    is_text = of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)
    is_number = of.is_integer(kind) or of.is_floating(kind) or of.is_decimal(kind)
    is_time = may_be_time and (of.is_timestamp(kind) or of.is_date(kind))
    is_nested = column.may_be_nested and (of.is_struct(kind) or of.is_map(kind))
    if not (is_text or is_number or is_time or is_nested or of.is_null(kind)):
        raise DataError(
            f"{path}: column `{column.name}` holds values of type {kind}, expected text or numbers"
            f"{' or times' if may_be_time else ''}. Save it as text, or name another column: "
            f"dataset.{column.option}=COLUMN"
        )


def _opened_parquet(path: Path) -> pa_parquet.ParquetFile:
    try:
        return pa_parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def _no_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable parquet file ({error}); save it again.")


def _parquet_parts(path: Path, names: list[str]) -> Iterator[pa.Table]:
    try:
        with _opened_parquet(path) as file, Progress(f"read {path.name}", file.metadata.num_rows, "row") as bar:
            for batch in file.iter_batches(_ROWS_PER_PART, columns=names):
                bar.advance(len(batch))
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from error


def _check_no_nulls(path: Path, column: Column) -> None:
    n_rows = n_empty = first = 0
    for part in _parquet_parts(path, [column.name]):
        values = part[column.name]
        if values.null_count and not n_empty:
            first = n_rows + values.is_null().to_pylist().index(True)
        n_empty, n_rows = n_empty + values.null_count, n_rows + len(values)
    if n_empty:
        raise DataError(
            f"{path}, row {first + 1}: `{column.name}` is empty ({n_empty} rows in all). Fill or remove these rows."
        )


def _of_parquet(values: pa.ChunkedArray) -> pd.Series:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_date(values.type):
        values = values.cast(pa.timestamp("us"))  # pandas would make Python objects of dates
    return values.to_pandas()
