"""Settings that every dataset shares, and the raw tables that every source yields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd

from llm2rec.core.errors import ConfigError, Ignored
from llm2rec.data._files import digest_of_files
from llm2rec.data._text import joined_text

__all__ = ["MISSING", "DatasetSpec", "RawData", "RawParts", "TextSpec", "new_field", "path_field", "side_field"]

MISSING = "???"
"""OmegaConf's mark of a required value that is missing."""

SPLITS = ("leave_one_out", "global_time")
MISSING_TITLE_POLICIES = ("error", "drop", "id")
MISSING_ITEM_POLICIES = ("error", "drop")
TIES = ("source", "item", "shuffle")

_IS_PATH = "is_path"
_NOT_CONTENT = "not_content"
_NEW = "new"

SpecT = TypeVar("SpecT", bound="DatasetSpec")


def path_field(default: str | None = MISSING) -> Any:
    """Declare a field that holds a path: made absolute by `with_base`, and never part of `settings`."""
    return field(default=default, metadata={_IS_PATH: True, _NOT_CONTENT: True})


def side_field(default: Any) -> Any:
    """Declare a field that cannot change the result: not part of `settings`."""
    return field(default=default, metadata={_NOT_CONTENT: True})


def new_field(default: Any) -> Any:
    """Declare a field that is part of `settings` only where it differs from its default.

    Fingerprints of datasets that were prepared before the field existed stay as they were.
    """
    return field(default=default, metadata={_NEW: default})


@dataclass(frozen=True)
class RawData:
    """Tables of a source, before any filter.

    Attributes:
        interactions: One row per interaction, in the order of the source: `user_id` and `item_id` (str), `timestamp`
            (int64, any unit, larger is later) and, where the source has them, `rating` (float64).
        items: One row per item, ids unique: `item_id` (str), `title` (str, empty where the source has none) and, where
            the options ask for them, the columns of `OPTIONAL_ITEM_FEATURES`. Its order is the order of the item
            indices.
        notes: Counts of rows that the source left out, by name; they go into the statistics.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    notes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RawParts:
    """The same as `RawData`, with interactions that need not fit into memory.

    Attributes:
        interactions: Yields frames with the columns of `RawData.interactions`, in order; at least one.
        items: As in `RawData`.
        notes: As in `RawData`.
    """

    interactions: Callable[[], Iterator[pd.DataFrame]]
    items: pd.DataFrame
    notes: dict[str, int] = field(default_factory=dict)


@dataclass
class DatasetSpec:
    """Settings that every dataset shares; each source adds its own.

    The same class is the schema of `conf/dataset/*.yaml` and the object Hydra builds from it.

    Attributes:
        name: Names the prepared folder and the teacher's outputs: letters, digits, `.`, `_` and `-`.
        domain: The word for one item in prompts, such as `movie`.
        min_rating: Keep only interactions rated at least this; None keeps all.
        k_core: Keep only users and items with at least this many interactions, repeated until nothing changes;
            0 keeps all.
        min_interactions: Users with fewer interactions after the filters are counted and left out.
        missing_title: An item without a title is an `error`, is dropped with its interactions (`drop`), or is
            titled with its own id (`id`).
        missing_items: Interactions with items that the source's item table lacks are an `error`, or are dropped,
            counted and logged (`drop`).
        ties: The order of a user's interactions with equal timestamps: that of the `source`, ascending item ids as
            text or, of tables, ascending `tie_column` (`item`), or a seeded `shuffle` of each user's ties.
        ties_seed: Seed of that shuffle.
        history_length: The most recent interactions an example's history holds, L.
        split: `leave_one_out` (each user's last interaction tests, the one before validates) or `global_time`
            (everybody's latest interactions test).
        validation_fraction: Share of all interactions that validate; only with `global_time`.
        test_fraction: Share of all interactions that test; only with `global_time`.
        num_proc: Processes that build examples.

    Raises:
        ConfigError: If a value cannot work; all problems of one dataset are named together.
    """

    name: str = MISSING
    domain: str = "item"
    min_rating: float | None = None
    k_core: int = 0
    min_interactions: int = 3
    missing_title: str = "error"
    history_length: int = 10
    split: str = "leave_one_out"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    num_proc: int = side_field(1)
    missing_items: str = new_field("error")
    ties: str = new_field("source")
    ties_seed: int = new_field(0)

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        Ignored(("validation_fraction", "test_fraction"), "split", ("leave_one_out",)),
        Ignored(("ties_seed",), "ties", ("source", "item")),
    )

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigError(f"dataset `{self.name}` cannot be built: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        """Problems with the values, one clause each; sources add their own."""
        problems = [
            f"`dataset.{each.name}` is not set: give `dataset.{each.name}=...`"
            for each in dataclasses.fields(self)
            if getattr(self, each.name) == MISSING
        ]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) and self.name != MISSING:
            problems.append(f"`name` must be letters, digits, '.', '_' or '-', got {self.name!r}")
        if not self.domain.strip():
            problems.append("`domain` is blank: give the word for one item, such as 'movie'")
        if self.split not in SPLITS:
            problems.append(f"`split` must be one of {', '.join(SPLITS)}, got {self.split!r}")
        for key, allowed in (
            ("missing_title", MISSING_TITLE_POLICIES),
            ("missing_items", MISSING_ITEM_POLICIES),
            ("ties", TIES),
        ):
            if getattr(self, key) not in allowed:
                problems.append(f"`{key}` must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        # Leave-one-out needs a history, a validation target and a test target; one target and a history do otherwise.
        lowest_length = 3 if self.split == "leave_one_out" else 2
        for key, lowest in (
            ("k_core", 0),
            ("min_interactions", lowest_length),
            ("history_length", 1),
            ("num_proc", 1),
        ):
            if getattr(self, key) < lowest:
                problems.append(f"`{key}` must be at least {lowest} with split={self.split}, got {getattr(self, key)}")
        validation, test = self.validation_fraction, self.test_fraction
        if self.split == "global_time" and not (validation > 0 and test > 0 and validation + test < 1):
            problems.append(
                "`validation_fraction` and `test_fraction` must be positive and sum to less than 1, "
                f"got {validation} and {test}"
            )
        return problems

    def with_base(self: SpecT, base: Path) -> SpecT:
        """Return a copy whose relative paths start at `base`.

        Args:
            base: The folder of the launch; Hydra has changed the working folder since.
        """
        changes: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.metadata.get(_IS_PATH) and value is not None:
                # Joining with an absolute path gives that path, so absolute paths stay.
                changes[each.name] = str(Path(base).absolute() / Path(value).expanduser())
        return dataclasses.replace(self, **changes)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the content, as plain JSON values and without any path."""
        own = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if not each.metadata.get(_NOT_CONTENT)
            and each.name != "_target_"
            and not (_NEW in each.metadata and getattr(self, each.name) == each.metadata[_NEW])
        }
        return {"source": type(self).__name__, **own}

    def obtain(self: SpecT, raw_cache_dir: Path | None) -> SpecT:
        """Make sure the raw files are there, downloading what may be downloaded.

        Args:
            raw_cache_dir: Where downloads are kept; None when there is no such place.

        Returns:
            A spec whose raw files exist as far as the source can know.

        Raises:
            DataError: If the raw files are missing and cannot be had.
        """
        return self

    def raw_files(self) -> list[Path]:
        """Return the files that `read` reads.

        Raises:
            DataError: If one of them is missing.
        """
        raise NotImplementedError

    def raw_digest(self) -> str:
        """Return a hash of the raw content, part of the key of prepared data."""
        return digest_of_files(self.raw_files())

    def read(self) -> RawData:
        """Read the raw files. A source implements this method or `read_parts`.

        Raises:
            DataError: If a file is missing or malformed; the message names file and line.
        """
        parts = self.read_parts()
        return RawData(pd.concat(parts.interactions(), ignore_index=True), parts.items, parts.notes)

    def read_parts(self, work: Path | None = None) -> RawParts:
        """Read the raw files, interactions in parts; implemented by sources whose files may be larger than memory.

        Args:
            work: An empty folder for data that does not fit into memory; None keeps all in memory.

        Raises:
            DataError: If a file is missing or malformed; the message names file and line.
        """
        raw = self.read()
        return RawParts(lambda: iter([raw.interactions]), raw.items, raw.notes)


@dataclass
class TextSpec(DatasetSpec):
    """A dataset whose items may have texts beside their titles.

    Attributes:
        text_columns: Further texts of the items that a language model reads after the title, such as `description` and
            `brand`: columns of a table, or keys of Amazon's metadata. HTML is removed, lists are joined.
        text_length: Most characters of title and texts together.
    """

    text_columns: list[str] = field(default_factory=list, metadata={_NEW: []})
    text_length: int = new_field(1000)

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        *DatasetSpec.IGNORED,
        Ignored(("text_length",), "text_columns", ([],)),
    )

    def __post_init__(self) -> None:
        self.text_columns = list(self.text_columns)  # Hydra passes its own kind of list
        super().__post_init__()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.text_length < 1:
            problems.append(f"`text_length` must be at least 1, got {self.text_length}")
        if len(set(self.text_columns)) < len(self.text_columns):
            problems.append(f"`text_columns` names a column twice: {', '.join(self.text_columns)}")
        return problems

    def _with_texts(self, items: pd.DataFrame, others: Sequence[Sequence[str]]) -> pd.DataFrame:
        """Add the column `text` to items: their titles, then clean texts of `text_columns`, ``(columns, N)``."""
        if not self.text_columns:
            return items
        titles = items["title"]
        if self.missing_title == "id":
            titles = titles.where(titles != "", items["item_id"])
        texts = [joined_text(parts, self.text_length) for parts in zip(titles, *others, strict=True)]
        return items.assign(text=pd.Series(texts, dtype="str"))
