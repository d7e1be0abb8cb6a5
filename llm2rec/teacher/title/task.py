"""Prompts that ask for the title of the next item, and the answers to them."""

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompt_layout import Padding, PromptLayout, PromptRows, TokenBatch
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.title.titles import distinct_titles
from llm2rec.teacher.tokenising import PieceTokenizer
from llm2rec.teacher.wording import Wordings

__all__ = ["TitleTask"]


class TitleTask:
    """Lays out questions, with candidates or without, and answers.

    An answer is a title as it stands in histories and candidates, without separator, and the end token. A question
    shows the same items whether its answer follows or not: room is left for the longest answer. What the tokenizer puts
    behind a text is left out, since the answer comes there.

    Args:
        titles: Title of each item.
        pieces: Makes their tokens.
        settings: Separator and limits.
        wordings: Texts around history and candidates.
        seed: Seed of the choice of wordings.

    Raises:
        ConfigError: If the tokenizer has no end token, a title is blank, or two cannot be told apart.
    """

    def __init__(
        self, titles: list[str], pieces: PieceTokenizer, settings: PromptSettings, wordings: Wordings, seed: int
    ) -> None:
        self.settings, self.end_id = settings, _end_id(pieces)
        self.texts, self.tokens = distinct_titles(titles, pieces, settings.max_title_tokens)
        shown = pieces.all([f"{pieces.space}{text}{settings.separator}" for text in self.texts], split_special=True)
        answers = [[*tokens, self.end_id] for tokens in self.tokens]

        def layout(wordings: tuple[tuple[str, ...], ...]) -> PromptLayout:
            return PromptLayout(
                shown,
                [
                    [pieces.begin + pieces.first(first), *(pieces.next(text) for text in others)]
                    for first, *others in wordings
                ],
                answers,
                placeholder_id=pieces.placeholder_id,
                pad_id=pieces.pad_id,
                max_tokens=settings.max_tokens,
                max_items=settings.max_items,
                seed=seed,
            )

        self._open, self._closed = layout(wordings.histories), layout(wordings.questions)

    def check_candidates(self, n_candidates: int | None, *, hybrid: bool) -> None:
        """Refuse limits under which some prompt would not fit; see `PromptBuilder.check_candidates`."""
        layout = self._layout_for(n_candidates is not None)
        lengths = np.sort(layout.lengths[: layout.n_items] + hybrid)[::-1]
        texts, candidates = int(layout.text_tokens.max()), int(lengths[: n_candidates or 0].sum())
        needed = texts + candidates + int(lengths[0]) + layout.longest_answer
        if needed > self.settings.max_tokens:
            raise ConfigError(
                f"`llm.prompt.max_tokens` is {self.settings.max_tokens}, but a prompt may take {needed}: {texts} for "
                f"its texts, {candidates} for {n_candidates or 0} candidates, {lengths[0]} for one item of the history "
                f"and {layout.longest_answer} for the answer. {self._remedy(needed)}"
            )

    def batch(self, rows: PromptRows, targets: NDArray[np.integer] | None, padding: Padding) -> TokenBatch:
        """Questions, and where ``targets`` are given their answers; see `PromptBuilder.answered`."""
        return self._layout(rows).batch(rows, targets, padding)

    def token_counts(self, rows: PromptRows, targets: NDArray[np.integer] | None) -> NDArray[np.int64]:
        """Tokens of what `batch` makes, shape ``(B,)``."""
        return self._layout(rows).token_counts(rows, targets)

    def _layout_for(self, with_candidates: bool) -> PromptLayout:
        return self._closed if with_candidates else self._open

    def _layout(self, rows: PromptRows) -> PromptLayout:
        """The layout of such prompts; the rows must have room for one item of their histories."""
        history, lengths, layout = rows.history, rows.lengths, self._layout_for(rows.candidates is not None)
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
        longest = max(map(len, self.tokens))
        return (
            f"Raise `llm.prompt.max_tokens` to {needed}, or lower `llm.prompt.max_title_tokens` (the longest title has "
            f"{longest} tokens)."
        )


def _end_id(pieces: PieceTokenizer) -> int:
    for end in (pieces.tokenizer.eos_token_id, pieces.tokenizer.sep_token_id):
        if end is not None:
            return int(end)
    raise ConfigError(
        f"the tokenizer {type(pieces.tokenizer).__name__} has neither an end-of-text nor a separator token, and an "
        "answer needs one to end with; set `eos_token` in the model's tokenizer_config.json, or take another `llm`."
    )
