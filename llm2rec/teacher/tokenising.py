"""Tokenise prompts segment by segment, and titles as segments: short enough, and distinct as answers.

The tokens of a prompt's segments, concatenated, equal those of the whole text.
"""

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError

__all__ = ["PLACEHOLDER", "SegmentTokenizer", "distinct_titles", "fold_title", "shortened"]

PLACEHOLDER = "<|item|>"  # the token at positions where an item's vector is injected

_PROBE = "x:"  # any text before a title
_TRIES = 100  # numbers tried for a title; real catalogues need far fewer


class SegmentTokenizer:
    """Tokenizes segments of a prompt.

    Args:
        tokenizer: The language model's tokenizer. `PLACEHOLDER` is added to it if missing.
        titles: Some titles, to detect how titles inside a text are tokenised.
        separator: Text after each title.

    Attributes:
        begin: Special tokens before a text.
        end: Special tokens after it.
        space: Text before every segment but the first: a space, or nothing if the tokenizer adds one.
        placeholder_id: Token of `PLACEHOLDER`.
        pad_id: Padding token.

    Raises:
        ConfigError: If the tokenizer rewrites a text when it adds special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], separator: str) -> None:
        if PLACEHOLDER not in tokenizer.get_vocab():  # a tokenizer saved with an adapter has it
            tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
        self.tokenizer = tokenizer
        self.placeholder_id = tokenizer.get_vocab()[PLACEHOLDER]
        self.pad_id = int(tokenizer.pad_token_id)
        self.begin, self.end = self._special_tokens()
        self.space = self._separating_space(titles, separator)

    def first(self, text: str) -> list[int]:
        """Tokens of the first segment, without special tokens."""
        return self.all([text])[0] if text else []

    def next(self, text: str) -> list[int]:
        """Tokens of a segment that follows another."""
        return self.first(f"{self.space}{text}" if text else "")

    def all(self, texts: Sequence[str], *, split_special: bool = False) -> list[list[int]]:
        """Tokens of each text, without special tokens.

        Args:
            texts: Texts, taken as they are.
            split_special: Whether special tokens spelt out in a text are tokenised as ordinary text. The placeholder
                always is: its token may only stand where a vector is injected.
        """
        if not texts:
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=split_special)["input_ids"]
        spelt = [number for number, text in enumerate(texts) if PLACEHOLDER in text and not split_special]
        for number in spelt:
            ids[number] = self.all([texts[number]], split_special=True)[0]
        return [list(each) for each in ids]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        bare, whole = self.first(_PROBE), list(self.tokenizer(_PROBE)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise ConfigError(f"the tokenizer {type(self.tokenizer).__name__} rewrites a text when it adds special tokens.")

    def _separating_space(self, titles: Sequence[str], separator: str) -> str:
        """A space if titles inside a text are tokenised with a leading space (byte-level BPE), else nothing."""
        whole = self.first(_PROBE + "".join(f" {title}{separator}" for title in titles))
        for space in (" ", ""):
            parts = self.all([f"{space}{title}{separator}" for title in titles])
            if self.first(_PROBE) + [token for part in parts for token in part] == whole:
                return space
        return " "


def fold_title(text: str) -> str:
    """Normalise a title for comparison: letter case, white space and composed characters."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def shortened(titles: Sequence[str], tokenizer: SegmentTokenizer, max_tokens: int | None) -> list[str]:
    """Cut titles that are too long, after a word if at least one fits.

    Args:
        titles: Titles.
        tokenizer: Counts their tokens.
        max_tokens: Maximum tokens of a title; None for no limit.
    """
    if max_tokens is None:
        return list(titles)
    counts = [len(ids) for ids in tokenizer.all([f"{tokenizer.space}{title}" for title in titles], split_special=True)]
    return [
        _cut(title, "", tokenizer, max_tokens) if count > max_tokens else title
        for title, count in zip(titles, counts, strict=True)
    ]


def distinct_titles(
    titles: Sequence[str], tokenizer: SegmentTokenizer, max_tokens: int | None
) -> tuple[list[str], list[list[int]]]:
    """Make titles distinct, both as text (see `fold_title`) and as tokens.

    The first of several equal titles is kept; the others are numbered in item order, ``Title (2)``, ``Title (3)``,
    skipping names of other items.

    Args:
        titles: Title of each item.
        tokenizer: Makes their tokens.
        max_tokens: Maximum tokens of a title, its number included; None for no limit.

    Returns:
        Each item's title, and its tokens after other text.

    Raises:
        ConfigError: If a title is blank, or the tokenizer cannot represent two titles differently.
    """
    texts = shortened([" ".join(title.split()) for title in titles], tokenizer, max_tokens)
    tokens = _tokens(texts, tokenizer)
    for item, title in enumerate(titles):
        if not texts[item] or not tokens[item]:
            raise ConfigError(
                f"item {item} has the title {title!r}, which has no tokens; expected text. Prepare the dataset with "
                "`dataset.missing_title=id` or `drop`."
            )
    folded = [fold_title(text) for text in texts]
    taken = set(folded)  # original and numbered titles
    names: set[str] = set()
    owner: dict[tuple[int, ...], int] = {}
    last_number: dict[str | tuple[int, ...], int] = {}
    for item, name in enumerate(folded):
        key = tuple(tokens[item])
        if name in names or key in owner:
            last = max(last_number.get(name, 1), last_number.get(key, 1))
            for number in range(last + 1, last + 1 + _TRIES):
                text = _numbered(texts[item], number, tokenizer, max_tokens)
                new = tuple(_tokens([text], tokenizer)[0])
                if fold_title(text) not in taken and new not in owner:
                    break
            else:
                raise ConfigError(
                    f"items {owner.get(key, item)} and {item} have the same title tokens: the tokenizer "
                    f"{type(tokenizer.tokenizer).__name__} maps {titles[item]!r} and another title to the same tokens, "
                    "even when numbered; use a language model that knows these characters, or correct the titles."
                )
            last_number[name] = last_number[key] = number
            texts[item], tokens[item], key = text, list(new), new
            taken.add(fold_title(text))
        names.add(fold_title(texts[item]))
        owner[key] = item
    return texts, tokens


def _tokens(texts: Sequence[str], tokenizer: SegmentTokenizer) -> list[list[int]]:
    """Tokens of titles after other text. Special tokens spelt out are split: none may end an answer early."""
    return tokenizer.all([f"{tokenizer.space}{text}" for text in texts], split_special=True)


def _numbered(text: str, number: int, tokenizer: SegmentTokenizer, max_tokens: int | None) -> str:
    suffix = f" ({number})"
    if max_tokens is None or len(_tokens([text + suffix], tokenizer)[0]) <= max_tokens:
        return text + suffix
    return _cut(text, suffix, tokenizer, max_tokens) + suffix


def _cut(text: str, suffix: str, tokenizer: SegmentTokenizer, max_tokens: int) -> str:
    """The longest prefix of a text, of whole words if one fits, with at most ``max_tokens`` including the suffix."""
    words = text.split() or [text]
    for units, joint in ((words, " "), (words[0], "")):
        beginnings = [joint.join(units[:n]) for n in range(1, len(units) + 1)]
        n_fitting = bisect_right(
            beginnings, max_tokens, key=lambda beginning: len(_tokens([beginning + suffix], tokenizer)[0])
        )
        if n_fitting:
            return beginnings[n_fitting - 1]
    raise ConfigError(
        f"`llm.prompt.max_title_tokens` is {max_tokens}, too few for the title {text!r} before {suffix!r}; raise it."
    )
