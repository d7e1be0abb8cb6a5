"""Amazon reviews: the public review and metadata files of 2014, 2018 and 2023."""

from __future__ import annotations

import ast
import html
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pyarrow as pa

from llm2rec.core.errors import DataError
from llm2rec.data._files import existing_file, numbered_lines, shorten
from llm2rec.data._spill import Spill
from llm2rec.data._text import clean_text
from llm2rec.data.spec import RawParts, TextSpec, path_field

__all__ = ["AmazonFiles", "AmazonReviews"]

_ROWS_PER_PART = 1 << 14
_REVIEW = pa.schema(
    {"user_id": pa.large_string(), "item_id": pa.large_string(), "timestamp": pa.int64(), "rating": pa.float64()}
)


@dataclass(frozen=True)
class _Layout:
    """Keys of one version of the review files."""

    years: str
    user: str
    item: str
    rating: str
    timestamp: str


# 2023 reviews have `asin` too, the variant bought; their metadata is keyed by `parent_asin`.
_LAYOUTS = (
    _Layout("2014 and 2018", "reviewerID", "asin", "overall", "unixReviewTime"),
    _Layout("2023", "user_id", "parent_asin", "rating", "timestamp"),
)
_METADATA_KEYS = ("parent_asin", "asin")

# Some 2018 metadata rows hold the page's script where the title should be; the publishers advise to drop them.
_SCRIPT_IN_TITLE = "getTime("


@dataclass
class AmazonFiles(TextSpec):
    """Reviews as implicit interactions, with the products' titles; subclasses name the two files.

    Both files are JSON lines, gzipped or plain; the keys of the first row decide the layout. Timestamps are
    kept as published: seconds in 2014 and 2018, milliseconds in 2023. Titles have HTML entities decoded and white
    space normalised. Repeated metadata rows are counted and the first title is kept. A product without metadata
    follows `missing_title`, unless `missing_items` is `drop`.
    """

    FILE_OPTIONS: ClassVar[tuple[str, str]]
    """Options that hold reviews and metadata, with a value, for messages."""

    def read_parts(self, work: Path | None = None) -> RawParts:
        """Read reviews, in parts, then the titles of the products they name.

        Raises:
            DataError: If a file is missing, of no known layout, or has a malformed row.
        """
        reviews, metadata = self.raw_files()
        spill, reviewed = Spill(None if work is None else work / "reviews"), dict[str, None]()
        for part in _read_reviews(reviews, self.FILE_OPTIONS[0]):
            reviewed.update(dict.fromkeys(part["item_id"].to_pylist()))
            spill.append(part)
        spill.close()
        products, n_repeated = _read_products(metadata, reviewed, self.text_columns, self.FILE_OPTIONS[1])
        if not products:
            raise DataError(
                f"{metadata} names none of the {len(reviewed)} products reviewed in {reviews} (the first is "
                f"{next(iter(reviewed))!r}); give the metadata of the same category and year: "
                f"dataset.{self.FILE_OPTIONS[1]}"
            )
        if self.missing_items == "error":  # products without metadata are products without a title
            nothing = [""] * (1 + len(self.text_columns))
            products |= {item: nothing for item in reviewed if item not in products}
        titles, *texts = zip(*products.values(), strict=True)
        items = pd.DataFrame(
            {"item_id": pd.Series(list(products), dtype="str"), "title": pd.Series(titles, dtype="str")}
        )
        items = self._with_texts(items, texts)

        def interactions() -> Iterator[pd.DataFrame]:
            for part in spill.parts():
                yield part.to_pandas().astype({"user_id": "str", "item_id": "str"})

        return RawParts(interactions, items, {"metadata_rows_repeated": n_repeated})


@dataclass
class AmazonReviews(AmazonFiles):
    """Two review files of any category and year.

    Attributes:
        reviews: Path of the reviews.
        metadata: Path of the products.
    """

    _target_: str = "llm2rec.data.amazon.AmazonReviews"
    name: str = "amazon_games"
    domain: str = "game"
    reviews: str = path_field()
    metadata: str = path_field()

    FILE_OPTIONS: ClassVar[tuple[str, str]] = ("reviews=FILE", "metadata=FILE")

    def raw_files(self) -> list[Path]:
        """Return the two files.

        Raises:
            DataError: If one is missing.
        """
        return [existing_file(self.reviews, "reviews"), existing_file(self.metadata, "metadata")]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and content of each row; JSON, or the Python literals of the 2014 metadata."""
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the latter: thousands of brackets within brackets
            try:
                record = ast.literal_eval(line.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: {shorten(line)} is neither a JSON object nor a Python dictionary. Correct "
                    "or remove the line, or fetch the file again."
                ) from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: {shorten(line)} is not an object with keys and values.")
        yield number, record


def _layout(path: Path, number: int, record: dict[str, Any], option: str) -> _Layout:
    for layout in _LAYOUTS:
        if layout.user in record and layout.item in record:
            return layout
    known = "; ".join(f"{each.years}: {each.user}, {each.item}, {each.rating}, {each.timestamp}" for each in _LAYOUTS)
    raise DataError(
        f"{path}, line {number}: not a review of a known layout, its keys are {', '.join(map(str, record))}; expected "
        f"({known}). Give the file of reviews: dataset.{option}"
    )


def _read_reviews(path: Path, option: str) -> Iterator[pa.Table]:
    """Yield the reviews, some thousands at a time."""
    reviews = _checked_reviews(path, option)
    while taken := list(itertools.islice(reviews, _ROWS_PER_PART)):
        columns = zip(_REVIEW, zip(*taken, strict=True), strict=True)
        yield pa.table({column.name: pa.array(values, column.type) for column, values in columns}, _REVIEW)


def _checked_reviews(path: Path, option: str) -> Iterator[tuple[str, str, int, float]]:
    layout: _Layout | None = None
    for number, record in _records(path):
        if layout is None:
            layout = _layout(path, number, record, option)
        try:
            user, item = record[layout.user], record[layout.item]
            if not (isinstance(user, str) and user and isinstance(item, str) and item):
                raise ValueError("an id is not text")
            rating, timestamp = float(record[layout.rating]), int(record[layout.timestamp])
            if not math.isfinite(rating) or not -(2**63) <= timestamp < 2**63:
                raise ValueError("a number is not finite, or beyond 64 bits")
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise DataError(
                f"{path}, line {number}: not a review of the {layout.years} layout ({error!r}); expected text in "
                f"`{layout.user}` and `{layout.item}`, numbers in `{layout.rating}` and `{layout.timestamp}`. Correct "
                "or remove the line."
            ) from error
        yield user, item, timestamp, rating
    if layout is None:
        raise DataError(f"{path} is empty; expected one review per line.")


def _read_products(
    path: Path, reviewed: dict[str, None], more: Sequence[str], option: str
) -> tuple[dict[str, list[str]], int]:
    """Return title and further texts of the reviewed products in the order of the file, and how many rows repeat one.

    The first text that is not empty counts.
    """
    products: dict[str, list[str]] = {}
    n_repeated, keys = 0, set[str]()
    for number, record in _records(path):
        key = next((each for each in _METADATA_KEYS if each in record), None)
        if key is None:
            raise DataError(
                f"{path}, line {number}: not a product, its keys are {', '.join(map(str, record))}; expected `asin` or "
                f"`parent_asin`, and `title`. Give the file of products: dataset.{option}"
            )
        item = record[key]
        if not isinstance(item, str):
            raise DataError(f"{path}, line {number}: `{key}` is {shorten(item)}, expected text. Correct the line.")
        if item not in reviewed:
            continue
        n_repeated += item in products
        before = products.get(item, [""] * (1 + len(more)))
        if not all(before):
            found = [_clean(record.get("title"), path, number), *(clean_text(record.get(name)) for name in more)]
            products[item] = [old or new for old, new in zip(before, found, strict=True)]
        keys.update(record)
    if products and (lacking := [name for name in more if name not in keys]):
        raise DataError(
            f"{path}: no reviewed product has `{lacking[0]}`; their keys are {', '.join(sorted(map(str, keys)))}. Name "
            "those with text: dataset.text_columns=[KEY, ...]"
        )
    return products, n_repeated


def _clean(title: object, path: Path, number: int) -> str:
    if title is None:
        return ""
    if not isinstance(title, str):
        raise DataError(f"{path}, line {number}: `title` is {shorten(title)}, expected text. Correct the line.")
    if _SCRIPT_IN_TITLE in title:
        return ""
    return " ".join(html.unescape(title).split())
