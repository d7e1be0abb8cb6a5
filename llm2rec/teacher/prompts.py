"""Histories as text, tokenised title by title.

Each title is tokenised once; a prompt is then a concatenation of pieces, put together for a whole batch with array
operations. No prompt is stored, and no loop runs over rows or tokens.
"""

import hashlib
from functools import cached_property

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.pieces import PromptLayout, TokenBatch, padded_batch
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.tokenising import PieceTokenizer

__all__ = ["PromptBuilder", "TokenBatch", "batches_by_tokens"]


class PromptBuilder:
    """Turns histories and items into token batches.

    Args:
        tokenizer: The language model's tokenizer, kept as `tokenizer`. It is given one token more, for the positions
            of injected vectors, unless it has it; the model never looks that token up.
        items: Items of `llm2rec.data`, with column ``title``.
        settings: Texts around the titles and the token budget.
        domain: The dataset's word for one item.

    Raises:
        ConfigError: If the texts around the titles leave no room for a title.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, items: Dataset, settings: PromptSettings, domain: str
    ) -> None:
        self.tokenizer, self.settings, self.n_items = tokenizer, settings, len(items)
        titles: list[str] = list(items["title"])
        self._pieces = pieces = PieceTokenizer(tokenizer, titles[:8], settings.separator)
        self.pad_id, self.placeholder_id = pieces.pad_id, pieces.placeholder_id
        prefix, suffix = (text.replace("{domain}", domain) for text in (settings.prefix, settings.suffix))
        texts = [(pieces.begin + pieces.first(prefix), pieces.next(suffix) + pieces.end)]
        room = settings.max_tokens - min(sum(map(len, each)) for each in texts)
        if room < 4:
            raise ConfigError(
                f"prompt: {settings.max_tokens} tokens leave {room} for titles beside prefix and suffix; raise "
                "`llm.prompt.max_tokens` or shorten the texts."
            )
        tokens = pieces.all([f"{pieces.space}{title}{settings.separator}" for title in titles])
        self._histories = PromptLayout(
            [each[:room] for each in tokens],
            texts,
            placeholder_id=self.placeholder_id,
            pad_id=self.pad_id,
            max_tokens=settings.max_tokens,
            max_items=settings.max_items,
        )

    @cached_property
    def identity(self) -> str:
        """Tells apart builders that would make other tokens of the same histories: other titles, texts or limits."""
        layout = self._histories
        digest = hashlib.sha256(f"{layout.rooms[0]}/{self.settings.max_items}".encode())
        digest.update(layout.lengths[:-1].tobytes())  # all but the placeholder, which text-only prompts do without
        digest.update(layout.tokens[:-1].tobytes())
        return digest.hexdigest()

    def n_shown(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False
    ) -> NDArray[np.int64]:
        """How many of each history's most recent items fit into the token budget.

        Args:
            history: Item ids, shape ``(B, L)``, padded on the right.
            lengths: Items per history, shape ``(B,)``.
            hybrid: Whether each title is followed by a slot for its item's vector, which takes one token.

        Returns:
            Items shown, shape ``(B,)``, at least 1 each.
        """
        return self._histories.n_shown(history, lengths, hybrid=hybrid)

    def token_counts(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False
    ) -> NDArray[np.int64]:
        """Tokens of each prompt, shape ``(B,)``; arguments as in `n_shown`."""
        return self._histories.token_counts(history, lengths, hybrid=hybrid)

    def histories(self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False) -> TokenBatch:
        """Prompts of histories, padded on the right; arguments as in `n_shown`.

        Returns:
            Tokens; in hybrid prompts `placeholder_id` stands at each slot and ``item_ids`` says for which item.
        """
        return self._histories.batch(history, lengths, hybrid=hybrid)

    def titles(self, item_ids: NDArray[np.int64]) -> TokenBatch:
        """Each item's title alone, with its special tokens; ``item_ids`` has shape ``(B,)``."""
        begin, end = (np.asarray(part, np.int64) for part in (self._pieces.begin, self._pieces.end))
        rows = [np.concatenate([begin, self._histories.piece(item), end]) for item in item_ids.tolist()]
        return padded_batch(rows, self.pad_id)

    def title_token_counts(self) -> NDArray[np.int64]:
        """Tokens of each title, separator included, shape ``(N,)``."""
        return self._histories.lengths[: self.n_items]


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
