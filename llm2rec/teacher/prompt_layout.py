"""Prompt layout: segments of text, titles, placeholders of injected vectors, and an answer.

Each segment is tokenised once. The prompts of a batch are a matrix of segment numbers, concatenated with array
operations; no loop runs over rows or tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.seed import derived_seed, mixed_words

__all__ = ["IGNORED_LABEL", "Padding", "PromptLayout", "PromptRows", "TokenBatch", "hashed", "padded_batch"]

IGNORED_LABEL = -100  # ignored by `torch.nn.functional.cross_entropy`

Padding = Literal["left", "right"]


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences, padded on one side.

    Attributes:
        input_ids: Shape ``(B, T)``, int64.
        attention_mask: Shape ``(B, T)``, int64, 1 for real tokens.
        item_ids: Shape ``(B, T)``, int64, the item whose vector is injected at a position, N for none; None for
            text-only prompts.
        labels: Shape ``(B, T)``, int64, the answer's tokens and -100 elsewhere; None for prompts without answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    item_ids: Tensor | None = None
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "TokenBatch":
        """Copy to a device."""
        return TokenBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            None if self.item_ids is None else self.item_ids.to(device),
            None if self.labels is None else self.labels.to(device),
        )


class PromptRows(NamedTuple):
    """Contents of B prompts.

    Attributes:
        history: Item ids, shape ``(B, L)``, padded on the right.
        lengths: Items per history, shape ``(B,)``.
        candidates: Items listed after the history, shape ``(B, C)``; None for prompts without candidates.
        hybrid: Whether each title is followed by its item's vector, at the position of one placeholder token.
    """

    history: NDArray[np.int32]
    lengths: NDArray[np.int32]
    candidates: NDArray[np.integer] | None = None
    hybrid: bool = False


@dataclass(frozen=True)
class _Columns:
    """Some segments of every row, in reading order; all of shape ``(B, P)``.

    Attributes:
        segments: Segment numbers.
        lengths: Tokens taken of each segment, 0 if it is left out.
        items: Item whose vector is injected, N for none.
        answer: Whether the segment is the answer, the same for all rows, shape ``(P,)``.
    """

    segments: NDArray[np.int64]
    lengths: NDArray[np.int64]
    items: NDArray[np.int64]
    answer: NDArray[np.bool_]


class PromptLayout:
    """Lays out the prompts of one task.

    A prompt is ``text, history, text`` or ``text, history, text, candidates, text``, and an answer may follow. The
    oldest items of a history are left out first; candidates and answers are always complete. A title that does not fit
    even alone is cut.

    Args:
        titles: Tokens of each title with its separator, N of them.
        texts: Tokens of the texts of each wording, special tokens included; two texts each, or three for prompts with
            candidates.
        answers: Tokens of each answer with its end token, N of them; empty for tasks without.
        placeholder_id: Token at the position of an injected vector.
        pad_id: Padding token.
        max_tokens: Maximum tokens of a prompt, the longest answer included.
        max_items: Maximum items of a history; None for all.
        seed: Seed of the choice of wordings.
    """

    def __init__(
        self,
        titles: Sequence[Sequence[int]],
        texts: Sequence[Sequence[Sequence[int]]],
        answers: Sequence[Sequence[int]] = (),
        *,
        placeholder_id: int,
        pad_id: int,
        max_tokens: int,
        max_items: int | None,
        seed: int = 0,
    ) -> None:
        self.n_items, self.n_wordings, self.n_texts = len(titles), len(texts), len(texts[0])
        self.pad_id, self.max_items, self.seed = pad_id, max_items, seed
        flat_texts = [text for wording in texts for text in wording]
        segments = [*titles, *flat_texts, *answers, [placeholder_id]]
        self.lengths = np.array([len(segment) for segment in segments], np.int64)
        self.tokens = np.concatenate([np.asarray(segment, np.int64) for segment in segments])
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._first_answer = self.n_items + len(flat_texts)
        self._placeholder = len(segments) - 1
        self.text_tokens = self.lengths[self.n_items : self._first_answer].reshape(len(texts), -1).sum(axis=1)
        self.longest_answer = max(map(len, answers), default=0)
        self.rooms = max_tokens - self.text_tokens - self.longest_answer  # tokens left for titles, by wording

    def segment(self, number: int) -> NDArray[np.int64]:
        """Tokens of one segment; segments 0 to N-1 are the titles."""
        return self.tokens[self._starts[number] : self._starts[number] + self.lengths[number]]

    def wordings(self, rows: PromptRows) -> NDArray[np.int64]:
        """The wording of each row, shape ``(B,)``: a function of the seed and the items of its history alone."""
        return (hashed(rows.history, rows.lengths, self.seed) % np.uint64(self.n_wordings)).astype(np.int64)

    def room(self, rows: PromptRows) -> NDArray[np.int64]:
        """Tokens left for each row's history, shape ``(B,)``."""
        room = self.rooms[self.wordings(rows)]
        return room if rows.candidates is None else room - (self.lengths[rows.candidates] + rows.hybrid).sum(axis=1)

    def n_shown(self, rows: PromptRows) -> NDArray[np.int64]:
        """How many of each history's most recent items are shown, shape ``(B,)``, at least 1 each."""
        return self._shown(rows)[0]

    def token_counts(self, rows: PromptRows, answers: NDArray[np.integer] | None = None) -> NDArray[np.int64]:
        """Tokens of each prompt, with its answer where there is one, shape ``(B,)``."""
        counts = self.text_tokens[self.wordings(rows)] + self._shown(rows)[1]
        if rows.candidates is not None:
            counts += (self.lengths[rows.candidates] + rows.hybrid).sum(axis=1)
        return counts if answers is None else counts + self.lengths[self._first_answer + answers]

    def batch(
        self, rows: PromptRows, answers: NDArray[np.integer] | None = None, padding: Padding = "right"
    ) -> TokenBatch:
        """Tokens of prompts.

        Args:
            rows: Contents of the prompts.
            answers: Items whose answers follow, shape ``(B,)``; None for prompts without answer.
            padding: Side of the padding.
        """
        texts = self.n_items + self.wordings(rows)[:, None] * self.n_texts + np.arange(self.n_texts)
        parts = [self._plain(texts[:, :1]), self._history(rows), self._plain(texts[:, 1:2])]
        if rows.candidates is not None:
            shown = rows.candidates.astype(np.int64)
            parts += [self._titles(shown, self.lengths[shown], np.ones(shown.shape, bool), rows.hybrid)]
            parts += [self._plain(texts[:, 2:])]
        if answers is not None:
            parts.append(self._plain(self._first_answer + answers[:, None].astype(np.int64), answer=True))
        columns = _Columns(
            np.concatenate([part.segments for part in parts], axis=1),
            np.concatenate([part.lengths for part in parts], axis=1),
            np.concatenate([part.items for part in parts], axis=1),
            np.concatenate([part.answer for part in parts]),
        )
        return self._assemble(columns, padding, with_items=rows.hybrid, with_labels=answers is not None)

    def _shown(self, rows: PromptRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many items of each history are shown, and the tokens they take."""
        history, lengths, room = rows.history, rows.lengths, self.room(rows)[:, None]
        ages = np.arange(history.shape[1])
        real = ages < lengths[:, None]
        newest_first = np.where(real, lengths[:, None] - 1 - ages, 0)
        items = np.take_along_axis(history, newest_first, axis=1)
        costs = np.where(real, np.minimum(self.lengths[np.where(real, items, 0)] + rows.hybrid, room), 0)
        totals = np.cumsum(costs, axis=1)
        fits = real & (totals <= room)
        if self.max_items is not None:
            fits &= ages < self.max_items
        shown = np.maximum(fits.sum(axis=1), 1)
        return shown, np.take_along_axis(totals, shown[:, None] - 1, axis=1)[:, 0]

    def _history(self, rows: PromptRows) -> _Columns:
        history, lengths, room = rows.history, rows.lengths, self.room(rows)[:, None]
        shown = self._shown(rows)[0]
        places = np.arange(history.shape[1])
        kept = (places < lengths[:, None]) & (places >= (lengths - shown)[:, None])
        items = np.where(kept, history, 0).astype(np.int64)
        return self._titles(items, np.minimum(self.lengths[items], room - rows.hybrid), kept, rows.hybrid)

    def _titles(
        self, items: NDArray[np.int64], lengths: NDArray[np.int64], kept: NDArray[np.bool_], hybrid: bool
    ) -> _Columns:
        """Titles, each followed by a placeholder in hybrid prompts; all arguments have shape ``(B, K)``."""
        lengths, injected = np.where(kept, lengths, 0), np.where(kept, items, self.n_items)
        nothing = np.full_like(items, self.n_items)
        if not hybrid:
            return _Columns(items, lengths, nothing, np.zeros(items.shape[1], bool))
        wide = (len(items), 2 * items.shape[1])
        return _Columns(
            np.stack([items, np.full_like(items, self._placeholder)], axis=2).reshape(wide),
            np.stack([lengths, kept.astype(np.int64)], axis=2).reshape(wide),
            np.stack([nothing, injected], axis=2).reshape(wide),
            np.zeros(wide[1], bool),
        )

    def _plain(self, segments: NDArray[np.int64], *, answer: bool = False) -> _Columns:
        """Complete segments, shape ``(B, P)``."""
        nothing = np.full_like(segments, self.n_items)
        return _Columns(segments, self.lengths[segments], nothing, np.full(segments.shape[1], answer))

    def _assemble(self, columns: _Columns, padding: Padding, *, with_items: bool, with_labels: bool) -> TokenBatch:
        lengths, per_row = columns.lengths.ravel(), columns.lengths.sum(axis=1)
        ends = np.cumsum(lengths)
        starts = self._starts[columns.segments.ravel()]
        source = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)  # token numbers, prompt by prompt
        row = np.repeat(np.arange(len(per_row)), per_row)
        column = np.arange(ends[-1]) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        shape = (len(per_row), int(per_row.max()))
        if padding == "left":
            column += (shape[1] - per_row)[row]

        def spread(values: NDArray[np.int64], elsewhere: int) -> NDArray[np.int64]:
            spread = np.full(shape, elsewhere, np.int64)
            spread[row, column] = values
            return spread

        tokens = self.tokens[source]
        items = labels = None
        if with_items:
            items = torch.from_numpy(spread(np.repeat(columns.items.ravel(), lengths), self.n_items))
        if with_labels:
            of_answer = np.repeat(np.tile(columns.answer, len(per_row)), lengths)
            labels = torch.from_numpy(spread(np.where(of_answer, tokens, IGNORED_LABEL), IGNORED_LABEL))
        mask = spread(np.ones_like(tokens), 0)
        return TokenBatch(torch.from_numpy(spread(tokens, self.pad_id)), torch.from_numpy(mask), items, labels)


def hashed(history: NDArray[np.int32], lengths: NDArray[np.int32], seed: int) -> NDArray[np.uint64]:
    """A seeded 64-bit hash of each history, in its order, independent of padding and other rows.

    Args:
        history: Item ids, shape ``(B, L)``, padded on the right.
        lengths: Items per history, shape ``(B,)``.
        seed: Any integer.

    Returns:
        Shape ``(B,)``, uniform over all values.
    """
    places = np.arange(1, history.shape[1] + 1, dtype=np.uint64)
    keyed = (history.astype(np.uint64) << np.uint64(32)) ^ places ^ np.uint64(derived_seed("wording", seed))
    real = np.arange(history.shape[1]) < lengths[:, None]
    return mixed_words(np.where(real, mixed_words(keyed), np.uint64(0)).sum(axis=1, dtype=np.uint64))


def padded_batch(rows: Sequence[NDArray[np.int64]], pad_id: int) -> TokenBatch:
    """Stack token sequences, padded on the right."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad_id, np.int64)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    ids[mask] = np.concatenate(rows)
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))
