"""Pieces of text as tokens, such that their concatenation is what the tokenizer makes of the whole text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError

__all__ = ["PLACEHOLDER", "PieceTokenizer"]

PLACEHOLDER = "<|item|>"  # the token at positions where an item's vector is injected

_PROBE = "x:"  # stands for whatever text comes before a title


class PieceTokenizer:
    """A tokenizer for pieces of text.

    Args:
        tokenizer: The language model's tokenizer. It is given the placeholder's token unless it has it.
        titles: Some titles, to find out how titles inside a text are tokenised.
        separator: What follows a title.

    Attributes:
        begin: What the tokenizer puts before a text.
        end: What it puts behind.
        space: What goes before a piece that is not the first: a space or, where the tokenizer adds one, nothing.
        placeholder_id: Token of `PLACEHOLDER`.
        pad_id: Token that pads.

    Raises:
        ConfigError: If the tokenizer rewrites a text when it adds special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], separator: str) -> None:
        if PLACEHOLDER not in tokenizer.get_vocab():  # one saved with an adapter has it already
            tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
        self.tokenizer = tokenizer
        self.placeholder_id = tokenizer.get_vocab()[PLACEHOLDER]
        self.pad_id = int(tokenizer.pad_token_id)
        self.begin, self.end = self._special_tokens()
        self.space = self._separating_space(titles, separator)

    def first(self, text: str) -> list[int]:
        """Tokens of a text at the very beginning, without special tokens."""
        return self.all([text])[0] if text else []

    def next(self, text: str) -> list[int]:
        """Tokens of a text that follows another."""
        return self.first(f"{self.space}{text}" if text else "")

    def all(self, texts: Sequence[str], *, split_special: bool = False) -> list[list[int]]:
        """Tokens of each text, without special tokens.

        Args:
            texts: Texts, taken as they are.
            split_special: Whether special tokens spelt out in a text are read as ordinary text. The placeholder always
                is: it must stand nowhere but where a vector is injected.
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
        """Whether a title inside a text is tokenised as if a space came first (byte-level BPE) or not (the others)."""
        whole = self.first(_PROBE + "".join(f" {title}{separator}" for title in titles))
        for space in (" ", ""):
            pieces = self.all([f"{space}{title}{separator}" for title in titles])
            if self.first(_PROBE) + [token for piece in pieces for token in piece] == whole:
                return space
        return " "
