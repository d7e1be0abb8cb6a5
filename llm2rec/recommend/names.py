"""Raw ids and titles of items, and their item ids in a model."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from llm2rec.core.errors import ConfigError, DataError, UnknownItemError

__all__ = ["By", "ItemNames", "Recommendation", "Unknown", "check_choice"]

By = Literal["id", "title"]
Unknown = Literal["error", "drop"]

_COMPARED = 20_000  # titles compared letter by letter, a few microseconds each
_SHOWN = 3


@dataclass(frozen=True)
class Recommendation:
    """A recommended item.

    Attributes:
        item_id: Its id, as in the raw data.
        title: Its title.
        score: For a student the inner product of user and item vector, comparable within one list only; for a teacher
            the log-probability, in nats. Larger is better.
    """

    item_id: str
    title: str
    score: float


class ItemNames:
    """Raw ids and titles of all items.

    Args:
        table: Columns ``raw_id`` and ``title``, row = item id.
    """

    def __init__(self, table: pa.Table) -> None:
        self.raw_ids: list[str] = table.column("raw_id").to_pylist()
        self.titles: list[str] = table.column("title").to_pylist()
        self._by_raw_id = {raw_id: item for item, raw_id in enumerate(self.raw_ids)}

    def __len__(self) -> int:
        return len(self.raw_ids)

    def table(self) -> pa.Table:
        """The names as a table."""
        return pa.table({"raw_id": self.raw_ids, "title": self.titles})

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        """Built at the first lookup by title."""
        items: dict[str, list[int]] = {}
        for item, title in enumerate(self.titles):
            items.setdefault(title, []).append(item)
        return items

    @cached_property
    def _title_lengths(self) -> np.ndarray:
        return np.array([len(title) for title in self.titles])

    def items(self, history: Sequence[str], by: By = "id", unknown: Unknown = "error") -> list[int]:
        """Find the items of a history.

        Args:
            history: Raw ids or titles, oldest first.
            by: ``id`` or ``title``. Titles must match the data exactly.
            unknown: What to do with items that the model was not trained on: ``error``, or ``drop`` them.

        Returns:
            Item ids, oldest first, at least one.

        Raises:
            UnknownItemError: If an item is unknown (and not dropped), or several items have the title.
            DataError: If the history is empty, or no item is left.
            ConfigError: If ``by`` or ``unknown`` is invalid.
        """
        check_choice("by", by, By)
        check_choice("unknown", unknown, Unknown)
        expected = f"a history is a list of {by}s, each a string"
        history = _listed(history, expected)
        if not all(isinstance(name, str) for name in history):
            raise DataError(f"{expected}; got {reprlib.repr(history)}.")
        if not history:
            raise DataError("the history is empty; give at least one item, or recommend popular items.")
        found = [self._item(name, by) for name in history]
        if unknown == "error" and None in found:
            raise UnknownItemError(self._about(history[found.index(None)], by))
        items = [item for item in found if item is not None]
        if not items:
            raise DataError(
                f"the model knows none of the {len(history)} items of the history, such as {history[-1]!r}."
            )
        return items

    def histories(
        self, histories: Sequence[Sequence[str]], by: By = "id", unknown: Unknown = "error"
    ) -> list[list[int]]:
        """Find the items of several histories; see `items`. Errors name the number of the history."""
        expected = "`histories` is a list of histories, each a list of strings; for one, `recommend_one`"
        histories = _listed(histories, expected, most_dimensions=2)
        if any(isinstance(history, str) for history in histories):
            raise DataError(f"{expected}.")
        found = []
        for number, history in enumerate(histories):
            try:
                found.append(self.items(history, by, unknown))
            except DataError as error:
                if len(histories) == 1:
                    raise
                raise type(error)(f"history {number}: {error}") from error
        return found

    def check_k(self, k: int) -> int:
        """Check ``k``, which may be an integer of NumPy.

        Returns:
            It as Python's.

        Raises:
            ConfigError: If ``k`` is not a whole number between 1 and the size of the catalogue.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(self):
            raise ConfigError(f"`k` is {k!r}, expected 1 to the {len(self)} items of the catalogue, a whole number.")
        return int(k)

    def _item(self, name: str, by: By) -> int | None:
        if by == "id":
            return self._by_raw_id.get(name)
        items = self._by_title.get(name, [])
        if len(items) > 1:
            ids = ", ".join(repr(self.raw_ids[item]) for item in items[:_SHOWN])
            raise UnknownItemError(f"{len(items)} items have the title {name!r}: {ids}; use ids.")
        return items[0] if items else None

    def _about(self, name: str, by: By) -> str:
        """Error message for an unknown name."""
        remedy = "Correct it, or leave unknown items out (`unknown=drop`)."
        if by == "id":
            hint = " It is a title: use `by=title`." if name in self._by_title else ""
            return f"the model knows no item with id {name!r}, which was not in the training data.{hint} {remedy}"
        if name in self._by_raw_id:
            return f"no item has the title {name!r}, which is an id: use `by=id`."
        close = " or ".join(repr(title) for title in self._close_titles(name))
        return f"no item has the title {name!r}{f'; did you mean {close}?' if close else '.'} {remedy}"

    def _close_titles(self, title: str) -> list[str]:
        """Most similar titles, ignoring case; in large catalogues among those of similar length."""
        distance = np.abs(self._title_lengths - len(title))
        n_compared = min(_COMPARED, len(distance))
        nearest = np.argpartition(distance, n_compared - 1)[:n_compared]
        folded = {self.titles[item].casefold(): self.titles[item] for item in np.sort(nearest).tolist()}
        return [folded[each] for each in difflib.get_close_matches(title.casefold(), folded, n=_SHOWN)]


def _listed(values: Any, expected: str, most_dimensions: int = 1) -> list[Any]:
    """The elements of a list, array or Series.

    Raises:
        DataError: If it is something else, such as a string or a dictionary.
    """
    is_other = isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable)
    if is_other or hasattr(values, "columns") or not 1 <= getattr(values, "ndim", 1) <= most_dimensions:
        raise DataError(f"{expected}; got {type(values).__name__}.")
    return list(values)


def check_choice(name: str, value: str, kind: object) -> None:
    """Check that a value is one of a ``Literal``'s.

    Raises:
        ConfigError: If it is not.
    """
    if value not in get_args(kind):
        raise ConfigError(f"`{name}` is {value!r}, expected one of {', '.join(get_args(kind))}.")
