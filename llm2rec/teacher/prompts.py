"""Histories as text, tokenised title by title.

Each title is tokenised once; a prompt is then a concatenation of pieces, put together for a whole batch with array
operations. No prompt is stored, and no loop runs over rows or tokens.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompt_layout import Padding, PromptLayout, PromptRows, TokenBatch, padded_batch
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.title.task import TitleTask
from llm2rec.teacher.title.titles import shortened
from llm2rec.teacher.tokenising import PieceTokenizer
from llm2rec.teacher.wording import Wordings, plain_wordings, wordings_for

__all__ = ["PromptBuilder", "TokenBatch"]


class PromptBuilder:
    """Turns histories and items into token batches.

    Args:
        tokenizer: The language model's tokenizer, kept as `tokenizer`. It is given one token more, for the positions
            of injected vectors, unless it has it; the model never looks that token up.
        items: Items of `llm2rec.data`, with column ``title``.
        settings: Texts around the titles and the token budget.
        domain: The dataset's word for one item.
        seed: Seed of the choice among wordings, read where ``settings.wording`` is ``domain``.

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
        self._pieces = pieces = PieceTokenizer(tokenizer, self._titles[:8], settings.separator)
        self.pad_id, self.placeholder_id = pieces.pad_id, pieces.placeholder_id
        wordings = self._wordings(title_next=False).histories
        texts = [(pieces.begin + pieces.first(before), pieces.next(after) + pieces.end) for before, after in wordings]
        rooms = [settings.max_tokens - len(before) - len(after) for before, after in texts]
        if min(rooms) < 4:
            raise ConfigError(
                f"prompt: {settings.max_tokens} tokens leave {min(rooms)} for titles beside prefix and suffix; raise "
                "`llm.prompt.max_tokens` or shorten the texts."
            )
        titles = shortened(self._titles, pieces, settings.max_title_tokens)
        tokens = pieces.all([f"{pieces.space}{title}{settings.separator}" for title in titles])
        self._histories = PromptLayout(
            [each[: max(rooms)] for each in tokens],
            texts,
            placeholder_id=self.placeholder_id,
            pad_id=self.pad_id,
            max_tokens=settings.max_tokens,
            max_items=settings.max_items,
            seed=seed,
        )

    @cached_property
    def identity(self) -> str:
        """Tells apart builders that would make other tokens of the same histories: other titles, texts or limits."""
        layout = self._histories
        digest = hashlib.sha256(f"{layout.rooms[0]}/{self.settings.max_items}".encode())
        if layout.n_wordings > 1:
            digest.update(f"/{layout.rooms.tolist()}/{self._seed}".encode())
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
        return self._histories.n_shown(PromptRows(history, lengths, hybrid=hybrid))

    def token_counts(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False
    ) -> NDArray[np.int64]:
        """Tokens of each prompt, shape ``(B,)``; arguments as in `n_shown`."""
        return self._histories.token_counts(PromptRows(history, lengths, hybrid=hybrid))

    def histories(self, history: NDArray[np.int32], lengths: NDArray[np.int32], hybrid: bool = False) -> TokenBatch:
        """Prompts of histories, padded on the right; arguments as in `n_shown`.

        Returns:
            Tokens; in hybrid prompts `placeholder_id` stands at each slot and ``item_ids`` says for which item.
        """
        return self._histories.batch(PromptRows(history, lengths, hybrid=hybrid))

    def titles(self, item_ids: NDArray[np.int64]) -> TokenBatch:
        """Each item's title alone, with its special tokens; ``item_ids`` has shape ``(B,)``."""
        begin, end = (np.asarray(part, np.int64) for part in (self._pieces.begin, self._pieces.end))
        rows = [np.concatenate([begin, self._histories.piece(item), end]) for item in item_ids.tolist()]
        return padded_batch(rows, self.pad_id)

    def texts(self, texts: Sequence[str]) -> TokenBatch:
        """Any texts, each as `titles` would have it if an item were called so; a blank one is an end token alone."""
        begin, end = (np.asarray(part, np.int64) for part in (self._pieces.begin, self._pieces.end))
        spaced = [f"{self._pieces.space}{text}{self.settings.separator}" if text else "" for text in texts]
        rows = [np.array(tokens, np.int64) for tokens in self._pieces.all(spaced, split_special=True)]
        blank = np.array([self.end_id])
        return padded_batch([np.concatenate([begin, row if len(row) else blank, end]) for row in rows], self.pad_id)

    def decoded(self, tokens: Sequence[NDArray[np.int64]] | Tensor) -> list[str]:
        """Texts of answers, written or `answer_tokens`, on one line and without special tokens.

        Answers are compared in this form: not every tokenizer gives back the title that went in.
        """
        texts = self.tokenizer.batch_decode([each.tolist() for each in tokens], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def readable(self, tokens: TokenBatch) -> list[str]:
        """Prompts as texts, special tokens and slots included, padding left out."""
        rows = zip(tokens.input_ids, tokens.attention_mask.bool(), strict=True)
        return self.tokenizer.batch_decode([ids[is_real].tolist() for ids, is_real in rows])

    def title_token_counts(self) -> NDArray[np.int64]:
        """Tokens of each title, separator included, shape ``(N,)``."""
        return self._histories.lengths[: self.n_items]

    def questions(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None = None,
        *,
        hybrid: bool = False,
        padding: Padding = "right",
    ) -> TokenBatch:
        """Prompts after which the next item's title comes.

        Args:
            history: Item ids, shape ``(B, L)``, padded on the right.
            lengths: Items per history, shape ``(B,)``.
            candidates: Items to choose among, shape ``(B, C)``, listed in this order; None for a prompt without list.
            hybrid: Whether each title, of history and candidates, is followed by a slot for its item's vector.
            padding: Side of the padding: ``left`` for generation, where the answers begin side by side.

        Returns:
            Tokens, as of `histories`.

        Raises:
            ConfigError: If a prompt does not fit even with one item of its history (see `check_candidates`), or titles
                cannot be answers: a blank one, two that the tokenizer cannot tell apart, no token to end with.
        """
        return self._title_task.batch(PromptRows(history, lengths, candidates, hybrid), None, padding)

    def answered(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None,
        targets: NDArray[np.integer],
        *,
        hybrid: bool = False,
        padding: Padding = "right",
    ) -> TokenBatch:
        """The same prompts, token by token, each followed by its answer: a title and `end_id`.

        Args:
            history: As in `questions`; so are ``lengths``, ``candidates``, ``hybrid`` and ``padding``.
            lengths: See there.
            candidates: See there.
            targets: Items whose titles are the answers, shape ``(B,)``.
            hybrid: See there.
            padding: See there.

        Returns:
            Tokens, with ``labels`` that are -100 but on the answers.
        """
        return self._title_task.batch(PromptRows(history, lengths, candidates, hybrid), targets, padding)

    def question_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None = None,
        *,
        hybrid: bool = False,
    ) -> NDArray[np.int64]:
        """Tokens of each row of `questions`, shape ``(B,)``."""
        return self._title_task.token_counts(PromptRows(history, lengths, candidates, hybrid), None)

    def answered_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None,
        targets: NDArray[np.integer],
        *,
        hybrid: bool = False,
    ) -> NDArray[np.int64]:
        """Tokens of each row of `answered`, shape ``(B,)``."""
        return self._title_task.token_counts(PromptRows(history, lengths, candidates, hybrid), targets)

    def check_candidates(self, n_candidates: int | None, *, hybrid: bool = False) -> None:
        """Make sure, before anything expensive, that every prompt of the title task will fit.

        The worst case counts: the longest wording, the longest titles as candidates, one more in the history, and the
        longest answer.

        Args:
            n_candidates: Distinct candidates per prompt, C; None for prompts without list.
            hybrid: Whether prompts will have slots.

        Raises:
            ConfigError: If it may not fit, or as in `questions`.
        """
        self._title_task.check_candidates(n_candidates, hybrid=hybrid)

    def answer_tokens(self) -> list[NDArray[np.int64]]:
        """Tokens of each item's answer without the end token; no two are equal."""
        return [np.array(tokens, np.int64) for tokens in self._title_task.tokens]

    @property
    def end_id(self) -> int:
        """Token that ends an answer."""
        return self._title_task.end_id

    @cached_property
    def _title_task(self) -> TitleTask:
        # made when asked for: teachers of the item objective need neither distinct titles nor an end token
        return TitleTask(self._titles, self._pieces, self.settings, self._wordings(title_next=True), self._seed)

    def _wordings(self, *, title_next: bool) -> Wordings:
        if self.settings.wording == "domain":
            return wordings_for(self._domain)
        return plain_wordings(self.settings.prefix, self.settings.suffix, self._domain, title_next=title_next)
