"""Prompts of the title objective: the answer is the title of the next item."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompt_layout import Padding, PromptLayout, PromptRows, TokenBatch, padded_batch
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.tokenising import distinct_titles

__all__ = ["TitlePrompts"]


class TitlePrompts(PromptBuilder):
    """Adds questions, with or without listed candidates, and their answers.

    An answer is a title as it stands in histories and candidates, without separator, and `end_id`. A question shows the
    same items whether its answer follows or not: room for the longest answer is always left. The tokenizer's final
    special tokens are omitted, since the answer follows there.

    Args:
        tokenizer: As in `PromptBuilder`, like all further arguments.
        items: Items of `llm2rec.data`.
        settings: Texts around the titles and the token budget.
        domain: The dataset's word for one item.
        seed: Seed of the choice of wordings.

    Attributes:
        end_id: Token that ends an answer.
        titles_shown: Titles as prompts show them: shortened if too long, numbered if repeated.

    Raises:
        ConfigError: If titles cannot be answers: the tokenizer has no end token, a title is blank, or two titles have
            the same tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: Dataset,
        settings: PromptSettings,
        domain: str,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, items, settings, domain, seed)
        end_id = next((each for each in (tokenizer.eos_token_id, tokenizer.sep_token_id) if each is not None), None)
        if end_id is None:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} has neither an end-of-text nor a separator token, and an "
                "answer needs one to end with; set `eos_token` in the model's tokenizer_config.json, or use another "
                "`llm`."
            )
        self.end_id = int(end_id)
        segments = self._segments
        self.titles_shown, self._title_tokens = distinct_titles(self._titles, segments, settings.max_title_tokens)
        shown = [f"{segments.space}{title}{settings.separator}" for title in self.titles_shown]
        tokens = segments.all(shown, split_special=True)
        answers = [[*title, self.end_id] for title in self._title_tokens]

        def layout(wordings: tuple[tuple[str, ...], ...]) -> PromptLayout:
            texts = [
                [segments.begin + segments.first(first), *map(segments.next, others)] for first, *others in wordings
            ]
            return self._layout(tokens, texts, answers)

        wordings = self._wordings(title_next=True)
        self._open, self._closed = layout(wordings.histories), layout(wordings.questions)  # without, with candidates

    def questions(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None = None,
        targets: NDArray[np.integer] | None = None,
        *,
        hybrid: bool = False,
        padding: Padding = "right",
    ) -> TokenBatch:
        """Prompts that ask for the next item's title.

        Args:
            history: Item ids, shape ``(B, L)``, padded on the right.
            lengths: Items per history, shape ``(B,)``.
            candidates: Items to choose from, shape ``(B, C)``, listed in this order; None for prompts without list.
            targets: Items whose titles follow as answers, each with `end_id`, shape ``(B,)``; None for prompts alone.
            hybrid: Whether each title of history and candidates is followed by its item's vector.
            padding: Side of the padding: ``left`` for generation and training, where answers are aligned.

        Returns:
            Tokens, as of `histories`; with ``targets`` also ``labels``, which are -100 except on the answers.

        Raises:
            ConfigError: If a prompt does not fit even with one item of its history (see `check_candidates`).
        """
        rows = PromptRows(history, lengths, candidates, hybrid)
        return self._fitting_layout(rows).batch(rows, targets, padding)

    def question_token_counts(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.integer] | None = None,
        targets: NDArray[np.integer] | None = None,
        *,
        hybrid: bool = False,
    ) -> NDArray[np.int64]:
        """Tokens of each row of `questions`, shape ``(B,)``; arguments as there."""
        rows = PromptRows(history, lengths, candidates, hybrid)
        return self._fitting_layout(rows).token_counts(rows, targets)

    def largest_token(self) -> int:
        """As of `PromptBuilder`, answers included."""
        layouts = (self._open, self._closed)
        return max(super().largest_token(), *(int(layout.tokens[:-1].max()) for layout in layouts))

    def answer_tokens(self) -> list[NDArray[np.int64]]:
        """Tokens of each item's answer without the end token; no two are equal."""
        return [np.array(tokens, np.int64) for tokens in self._title_tokens]

    def texts(self, texts: Sequence[str]) -> TokenBatch:
        """Any texts in the format of `titles`; a blank one becomes an end token."""
        begin, end = (np.asarray(part, np.int64) for part in (self._segments.begin, self._segments.end))
        spaced = [f"{self._segments.space}{text}{self.settings.separator}" if text else "" for text in texts]
        rows = [np.array(tokens, np.int64) for tokens in self._segments.all(spaced, split_special=True)]
        blank = np.array([self.end_id])
        return padded_batch([np.concatenate([begin, row if len(row) else blank, end]) for row in rows], self.pad_id)

    def decoded(self, tokens: Sequence[NDArray[np.int64]] | Tensor) -> list[str]:
        """Texts of generated or true answers, on one line and without special tokens.

        Answers are compared in this form, since not every tokenizer reproduces a title when decoding.
        """
        texts = self.tokenizer.batch_decode([each.tolist() for each in tokens], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def check_candidates(self, n_candidates: int | None, *, hybrid: bool = False) -> None:
        """Raise, before any expensive step, if some prompt may not fit.

        The worst case counts: the longest wording, the longest titles as candidates, one more in the history, and the
        longest answer.

        Args:
            n_candidates: Distinct candidates per prompt, C; None for prompts without list.
            hybrid: Whether prompts have injected vectors.

        Raises:
            ConfigError: If the worst case exceeds ``llm.prompt.max_tokens``.
        """
        layout = self._open if n_candidates is None else self._closed
        lengths = np.sort(layout.lengths[: layout.n_items] + hybrid)[::-1]
        texts, candidates = int(layout.text_tokens.max()), int(lengths[: n_candidates or 0].sum())
        needed = texts + candidates + int(lengths[0]) + layout.longest_answer
        if needed > self.settings.max_tokens:
            raise ConfigError(
                f"`llm.prompt.max_tokens` is {self.settings.max_tokens}, but a prompt may take {needed}: {texts} for "
                f"its texts, {candidates} for {n_candidates or 0} candidates, {lengths[0]} for one item of the history "
                f"and {layout.longest_answer} for the answer. {self._remedy(needed)}"
            )

    def _fitting_layout(self, rows: PromptRows) -> PromptLayout:
        """The layout of such prompts; raises if a row has no room for one item of its history."""
        history, lengths = rows.history, rows.lengths
        layout = self._open if rows.candidates is None else self._closed
        newest = np.take_along_axis(history, np.maximum(lengths, 1)[:, None] - 1, axis=1)[:, 0]
        wanted = np.where(lengths > 0, layout.lengths[np.where(lengths > 0, newest, 0)] + rows.hybrid, 0)
        missing = wanted - layout.room(rows)
        if missing.size and missing.max() > 0:
            row, needed = int(missing.argmax()), self.settings.max_tokens + int(missing.max())
            raise ConfigError(
                f"`llm.prompt.max_tokens` is {self.settings.max_tokens}, but the prompt of row {row} of the batch "
                f"takes {needed} with one item of its history and room for the longest answer. {self._remedy(needed)}"
            )
        return layout

    def _remedy(self, needed: int) -> str:
        longest = max(map(len, self._title_tokens))
        return (
            f"Raise `llm.prompt.max_tokens` to {needed}, or lower `llm.prompt.max_title_tokens` (the longest title has "
            f"{longest} tokens)."
        )
