"""Titles as answers: short enough, and each told apart from all others."""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.tokenising import PieceTokenizer

__all__ = ["distinct_titles", "fold_title", "shortened"]

_TRIES = 100  # numbers tried for a title; far fewer are taken already in any real catalogue


def fold_title(text: str) -> str:
    """What titles are compared by: without differences of letter case, white space and composed characters."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shortened(titles: Sequence[str], pieces: PieceTokenizer, max_tokens: int | None) -> list[str]:
    """Cut titles that are too long, behind a word where at least one fits; the others are left as they are.

    Args:
        titles: Titles.
        pieces: Counts their tokens.
        max_tokens: Tokens of a title at most; None cuts nothing.
    """
    if max_tokens is None:
        return list(titles)
    counts = [len(ids) for ids in pieces.all([f"{pieces.space}{title}" for title in titles], split_special=True)]
    return [
        _cut(title, "", pieces, max_tokens) if count > max_tokens else title
        for title, count in zip(titles, counts, strict=True)
    ]


def distinct_titles(
    titles: Sequence[str], pieces: PieceTokenizer, max_tokens: int | None
) -> tuple[list[str], list[list[int]]]:
    """Titles of which no two are equal, neither as text (see `fold_title`) nor as tokens.

    The first of several equal titles keeps it, the others are numbered in the order of the items: ``Title (2)``,
    ``Title (3)``, leaving out names that other items have already.

    Args:
        titles: Title of each item.
        pieces: Makes their tokens.
        max_tokens: Tokens of a title at most, its number included; None for no bound.

    Returns:
        Each item's title, and its tokens as they follow a text.

    Raises:
        ConfigError: If a title is blank, or the tokenizer cannot tell two titles apart.
    """
    texts = shortened([" ".join(title.split()) for title in titles], pieces, max_tokens)
    tokens = _tokens(texts, pieces)
    for item, title in enumerate(titles):
        if not texts[item] or not tokens[item]:
            raise ConfigError(
                f"item {item} has the title {title!r}, of which the tokenizer makes no token, expected text; prepare "
                "the dataset with `dataset.missing_title=id` or `drop`."
            )
    folded = [fold_title(text) for text in texts]
    taken = set(folded)  # by whoever has the name from the start, or was given it
    names: set[str] = set()
    owner: dict[tuple[int, ...], int] = {}
    last_number: dict[str | tuple[int, ...], int] = {}
    for item, name in enumerate(folded):
        key = tuple(tokens[item])
        if name in names or key in owner:
            last = max(last_number.get(name, 1), last_number.get(key, 1))
            for number in range(last + 1, last + 1 + _TRIES):
                text = _numbered(texts[item], number, pieces, max_tokens)
                new = tuple(_tokens([text], pieces)[0])
                if fold_title(text) not in taken and new not in owner:
                    break
            else:
                raise ConfigError(
                    f"items {owner.get(key, item)} and {item} cannot be told apart: the tokenizer "
                    f"{type(pieces.tokenizer).__name__} makes the same tokens of {titles[item]!r} as of another title, "
                    "even when they are numbered; use a language model that knows these characters, or correct the "
                    "titles."
                )
            last_number[name] = last_number[key] = number
            texts[item], tokens[item], key = text, list(new), new
            taken.add(fold_title(text))
        names.add(fold_title(texts[item]))
        owner[key] = item
    return texts, tokens


def _tokens(texts: Sequence[str], pieces: PieceTokenizer) -> list[list[int]]:
    """Tokens of titles behind a text. Special tokens spelt out are split: none may end an answer half-way."""
    return pieces.all([f"{pieces.space}{text}" for text in texts], split_special=True)


def _numbered(text: str, number: int, pieces: PieceTokenizer, max_tokens: int | None) -> str:
    suffix = f" ({number})"
    if max_tokens is None or len(_tokens([text + suffix], pieces)[0]) <= max_tokens:
        return text + suffix
    return _cut(text, suffix, pieces, max_tokens) + suffix


def _cut(text: str, suffix: str, pieces: PieceTokenizer, max_tokens: int) -> str:
    """The longest beginning of a text, of whole words where one fits, that has at most so many tokens with a suffix."""
    words = text.split() or [text]
    for units, joint in ((words, " "), (words[0], "")):
        beginnings = [joint.join(units[:n]) for n in range(1, len(units) + 1)]
        n_fitting = bisect_right(
            beginnings, max_tokens, key=lambda beginning: len(_tokens([beginning + suffix], pieces)[0])
        )
        if n_fitting:
            return beginnings[n_fitting - 1]
    raise ConfigError(
        f"`llm.prompt.max_title_tokens` is {max_tokens}, which leaves no room for the title {text!r} before "
        f"{suffix!r}; raise it."
    )
