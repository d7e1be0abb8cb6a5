"""Histories as text, tokenised title by title.

Each title is tokenised once; a prompt is then a concatenation of pieces, put together for a whole batch with array
operations. No prompt is stored, and no loop runs over rows or tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.settings import PromptSettings

__all__ = ["PromptBuilder", "TokenBatch", "batches_by_tokens"]

_PROBE = "x:"  # stands for whatever text comes before a title


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences, padded on the right.

    Attributes:
        input_ids: Shape ``(B, T)``, int64.
        attention_mask: Shape ``(B, T)``, int64, 1 for real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        """Copy to a device."""
        return TokenBatch(self.input_ids.to(device), self.attention_mask.to(device))


class PromptBuilder:
    """Turns histories and items into token batches.

    Pieces 0 to N-1 are the titles, each followed by the separator; piece N is what comes before them, N+1 what comes
    after, special tokens included.

    Args:
        tokenizer: The language model's tokenizer.
        items: Items of `llm2rec.data`, with column ``title``.
        settings: Texts around the titles and the token budget.
        domain: The dataset's word for one item.

    Raises:
        ConfigError: If the texts around the titles leave no room for a title.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, items: Dataset, settings: PromptSettings, domain: str
    ) -> None:
        self.n_items, self.settings = len(items), settings
        self.pad_id = int(tokenizer.pad_token_id)
        begin, end = _special_tokens(tokenizer)
        space = _separating_space(
            tokenizer, [items[i]["title"] for i in range(min(8, self.n_items))], settings.separator
        )
        prefix, suffix = (text.replace("{domain}", domain) for text in (settings.prefix, settings.suffix))
        before, after = _tokens(tokenizer, prefix), _tokens(tokenizer, f"{space}{suffix}" if suffix else "")
        self.budget = settings.max_tokens - len(begin) - len(before) - len(after) - len(end)
        if self.budget < 4:
            raise ConfigError(
                f"prompt: {settings.max_tokens} tokens leave {self.budget} for titles beside prefix and suffix; raise "
                "`llm.prompt.max_tokens` or shorten the texts."
            )
        tokenised = items.map(
            _tokenise_titles,
            batched=True,
            remove_columns=items.column_names,
            fn_kwargs={"tokenizer": tokenizer, "space": space, "separator": settings.separator, "longest": self.budget},
            keep_in_memory=True,
            load_from_cache_file=False,
            desc="titles",
        )
        pieces: list[list[int]] = [*tokenised["title_tokens"], begin + before, after + end]
        self._lengths = np.array([len(piece) for piece in pieces], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._tokens = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])
        self._title_only = (begin, end)

    @cached_property
    def identity(self) -> str:
        """Tells apart builders that would make other tokens of the same histories: other titles, texts or limits."""
        digest = hashlib.sha256(f"{self.budget}/{self.settings.max_items}".encode())
        digest.update(self._lengths.tobytes())
        digest.update(self._tokens.tobytes())
        return digest.hexdigest()

    def n_shown(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """How many of each history's most recent items fit into the token budget.

        Args:
            history: Item ids, shape ``(B, L)``, padded on the right.
            lengths: Items per history, shape ``(B,)``.

        Returns:
            Items shown, shape ``(B,)``, at least 1 each.
        """
        ages = np.arange(history.shape[1])
        real = ages < lengths[:, None]
        newest_first = np.where(real, lengths[:, None] - 1 - ages, 0)
        items = np.take_along_axis(history, newest_first, axis=1)
        costs = np.where(real, self._lengths[np.where(real, items, 0)], 0)
        fits = real & (np.cumsum(costs, axis=1) <= self.budget)
        if self.settings.max_items is not None:
            fits &= ages < self.settings.max_items
        return np.maximum(fits.sum(axis=1), 1)

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of each prompt, shape ``(B,)``; arguments as in `n_shown`."""
        pieces, rows = self._pieces(history, lengths)
        return np.bincount(rows, self._lengths[pieces], minlength=len(history)).astype(np.int64)

    def histories(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> TokenBatch:
        """Prompts of histories; arguments as in `n_shown`."""
        pieces, rows = self._pieces(history, lengths)
        return self._assemble(self._starts[pieces], self._lengths[pieces], rows, len(history))

    def titles(self, item_ids: NDArray[np.int64]) -> TokenBatch:
        """Each item's title alone, with its special tokens; ``item_ids`` has shape ``(B,)``."""
        begin, end = (np.asarray(part, np.int64) for part in self._title_only)
        tokens = [
            np.concatenate([begin, self._tokens[self._starts[i] : self._starts[i] + self._lengths[i]], end])
            for i in item_ids
        ]
        lengths = np.array([len(each) for each in tokens])
        ids = np.full((len(tokens), lengths.max()), self.pad_id, np.int64)
        for row, each in enumerate(tokens):
            ids[row, : len(each)] = each
        return _batch(ids, lengths)

    def title_token_counts(self) -> NDArray[np.int64]:
        """Tokens of each title, separator included, shape ``(N,)``."""
        return self._lengths[: self.n_items]

    def _pieces(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Piece numbers of all prompts one after the other, and the row of each."""
        n_rows, shown = len(history), self.n_shown(history, lengths)
        slots = np.arange(history.shape[1])
        kept = (slots < lengths[:, None]) & (slots >= (lengths - shown)[:, None])
        pieces = np.concatenate(
            [np.full((n_rows, 1), self.n_items), history, np.full((n_rows, 1), self.n_items + 1)], axis=1
        )
        always = np.ones((n_rows, 1), bool)
        used = np.concatenate([always, kept, always], axis=1)
        return pieces[used].astype(np.int64), np.nonzero(used)[0]

    def _assemble(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64], n_rows: int
    ) -> TokenBatch:
        ends = np.cumsum(lengths)
        source = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)  # token numbers, prompt by prompt
        per_row = np.bincount(rows, lengths, minlength=n_rows).astype(np.int64)
        row = np.repeat(np.arange(n_rows), per_row)
        column = np.arange(ends[-1]) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        ids = np.full((n_rows, per_row.max()), self.pad_id, np.int64)
        ids[row, column] = self._tokens[source]
        return _batch(ids, per_row)


def _batch(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> TokenBatch:
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))


def batches_by_tokens(token_counts: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """Cut rows into batches of similar length and at most ``max_tokens`` tokens each, padding included.

    Args:
        token_counts: Tokens per row, shape ``(M,)``.
        max_tokens: Bound of rows times longest row; a single longer row is a batch of its own.

    Returns:
        Positions ``0..M-1``, each once, longest rows first (so that running out of memory shows at once).
    """
    order = np.argsort(-token_counts, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // max(1, int(token_counts[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare, whole = _tokens(tokenizer, _PROBE), list(tokenizer(_PROBE)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ConfigError(f"the tokenizer {type(tokenizer).__name__} rewrites a text when it adds special tokens.")


def _separating_space(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], separator: str) -> str:
    """Whether a title inside a text is tokenised as if a space came first (byte-level BPE) or not (the others)."""
    whole = _tokens(tokenizer, _PROBE + "".join(f" {title}{separator}" for title in titles))
    for space in (" ", ""):
        pieces = [_tokens(tokenizer, f"{space}{title}{separator}") for title in titles]
        if _tokens(tokenizer, _PROBE) + [token for piece in pieces for token in piece] == whole:
            return space
    return " "


def _tokenise_titles(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, space: str, separator: str, longest: int
) -> dict[str, list[list[int]]]:
    texts = [f"{space}{title}{separator}" for title in batch["title"]]
    return {"title_tokens": [ids[:longest] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]}
