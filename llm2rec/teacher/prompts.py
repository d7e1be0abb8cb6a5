"""Prompts of histories: settings, wordings and titles become a `PromptLayout`, which makes the batches.

`llm2rec.teacher.title.prompts.TitlePrompts` adds the prompts of the title objective.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompt_layout import PromptLayout, PromptRows, TokenBatch, padded_batch
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.tokenising import SegmentTokenizer, shortened
from llm2rec.teacher.wording import Wordings, plain_wordings, wordings_for

__all__ = ["PromptBuilder", "TokenBatch"]


class PromptBuilder:
    """Turns histories and items into token batches.

    Args:
        tokenizer: The language model's tokenizer, available as `tokenizer`. A placeholder token for injected vectors
            is added if missing; the model never looks it up.
        items: Items of `llm2rec.data`, with column ``title``.
        settings: Texts around the titles and the token budget.
        domain: The dataset's word for one item.
        seed: Seed of the choice of wordings, if ``settings.wording`` is ``domain``.

    Raises:
        ConfigError: If the texts around the titles leave no room for a title.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: Dataset,
        settings: PromptSettings,
        domain: str,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.settings, self.n_items = tokenizer, settings, len(items)
        self._domain, self._seed, self._titles = domain, seed, list(items["title"])
        self._segments = segments = SegmentTokenizer(tokenizer, self._titles[:8], settings.separator)
        self.pad_id, self.placeholder_id = segments.pad_id, segments.placeholder_id
        texts = [
            (segments.begin + segments.first(before), segments.next(after) + segments.end)
            for before, after in self._wordings(title_next=False).histories
        ]
        rooms = [settings.max_tokens - len(before) - len(after) for before, after in texts]
        if min(rooms) < 4:
            raise ConfigError(
                f"`llm.prompt.max_tokens` is {settings.max_tokens}, which leaves {min(rooms)} tokens for titles "
                "besides prefix and suffix; raise it, or shorten the texts."
            )
        titles = shortened(self._titles, segments, settings.max_title_tokens)
        tokens = segments.all([f"{segments.space}{title}{settings.separator}" for title in titles])
        self._histories = self._layout([each[: max(rooms)] for each in tokens], texts)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides the tokens of a history: titles, texts and limits."""
        layout = self._histories
        digest = hashlib.sha256(f"{layout.rooms[0]}/{self.settings.max_items}".encode())
        if layout.n_wordings > 1:
            digest.update(f"/{layout.rooms.tolist()}/{self._seed}".encode())
        digest.update(layout.lengths[:-1].tobytes())  # without the placeholder, which text-only prompts do not have
        digest.update(layout.tokens[:-1].tobytes())
        return digest.hexdigest()

    def n_shown(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False
    ) -> NDArray[np.int64]:
        """How many of each history's most recent items fit into the token budget.

        Args:
            history: Item ids, shape ``(B, L)``, padded on the right.
            lengths: Items per history, shape ``(B,)``.
            hybrid: Whether each title is followed by its item's vector, at the position of one placeholder token.

        Returns:
            Items shown, shape ``(B,)``, at least 1 each.
        """
        return self._histories.n_shown(PromptRows(history, lengths, hybrid=hybrid))

    def token_counts(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False
    ) -> NDArray[np.int64]:
        """Tokens of each prompt, shape ``(B,)``; arguments as in `n_shown`."""
        return self._histories.token_counts(PromptRows(history, lengths, hybrid=hybrid))

    def histories(self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False) -> TokenBatch:
        """Prompts of histories, padded on the right; arguments as in `n_shown`.

        Returns:
            Tokens; hybrid prompts have `placeholder_id` at the positions of injected vectors, and ``item_ids``.
        """
        return self._histories.batch(PromptRows(history, lengths, hybrid=hybrid))

    def titles(self, item_ids: NDArray[np.int64]) -> TokenBatch:
        """Each item's title alone, with its special tokens; ``item_ids`` has shape ``(B,)``."""
        begin, end = (np.asarray(part, np.int64) for part in (self._segments.begin, self._segments.end))
        rows = [np.concatenate([begin, self._histories.segment(item), end]) for item in item_ids.tolist()]
        return padded_batch(rows, self.pad_id)

    def readable(self, tokens: TokenBatch) -> list[str]:
        """Prompts as texts, with special tokens and placeholders, without padding."""
        rows = zip(tokens.input_ids, tokens.attention_mask.bool(), strict=True)
        return self.tokenizer.batch_decode([ids[is_real].tolist() for ids, is_real in rows])

    def largest_token(self) -> int:
        """The largest number among the tokens of all prompts, without the placeholder, which is never looked up."""
        return max(int(self._histories.tokens[:-1].max()), self.pad_id)

    def title_token_counts(self) -> NDArray[np.int64]:
        """Tokens of each title, separator included, shape ``(N,)``."""
        return self._histories.lengths[: self.n_items]

    def _layout(
        self, titles: list[list[int]], texts: Sequence[Sequence[list[int]]], answers: Sequence[list[int]] = ()
    ) -> PromptLayout:
        """A layout with this builder's limits; arguments as in `PromptLayout`."""
        return PromptLayout(
            titles,
            texts,
            answers,
            placeholder_id=self.placeholder_id,
            pad_id=self.pad_id,
            max_tokens=self.settings.max_tokens,
            max_items=self.settings.max_items,
            seed=self._seed,
        )

    def _wordings(self, *, title_next: bool) -> Wordings:
        if self.settings.wording == "domain":
            return wordings_for(self._domain)
        return plain_wordings(self.settings.prefix, self.settings.suffix, self._domain, title_next=title_next)
