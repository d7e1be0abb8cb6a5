"""Text vectors: pooled hidden states of prompts, item titles and generated titles."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.logging import Progress
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.vectors import standardised
from llm2rec.teacher.prompts import PromptBuilder, TokenBatch
from llm2rec.teacher.title.prompts import TitlePrompts

__all__ = ["TitleVectors", "pool", "pooled_states", "read_texts", "read_titles", "title_vectors"]


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Represent each text by one vector.

    Args:
        hidden: Last hidden states, shape ``(B, T, d)``.
        attention_mask: Shape ``(B, T)``, padding on the right.
        pooling: ``last`` real token, ``mean`` of real tokens, or ``cls`` (first token).

    Returns:
        Shape ``(B, d)``, float32.
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, attention_mask.sum(dim=1) - 1].float()
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1).float() / mask.sum(dim=1).float()


def title_vectors(
    llm: nn.Module,
    prompts: PromptBuilder,
    pooling: str,
    device: torch.device,
    batch_tokens: int = 8192,
    use_gates: Callable[[NDArray[np.int64]], AbstractContextManager[Any]] = lambda items: nullcontext(),
) -> Tensor:
    """Vectors of all item titles as they stand in histories.

    Args:
        llm: Language model without language-model head, in evaluation mode.
        prompts: Tokenises the titles.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Device of the model.
        batch_tokens: Tokens per forward pass, padding included.
        use_gates: Holds the gates of the titles of some items, item ids ``(B,)``; unused without adapter.

    Returns:
        Shape ``(N, d)``, float32, centred over the catalogue and of unit length, on the CPU.
    """
    counts = prompts.title_token_counts()
    return standardised(pooled_states(llm, counts, prompts.titles, pooling, device, batch_tokens, use_gates))


class TitleVectors(NamedTuple):
    """Catalogue of a title teacher, for grounding.

    Attributes:
        vectors: Vectors of all titles, shape ``(N, d)``, float32, centred over the catalogue and of unit length; on the
            CPU, so that large catalogues fit.
        mean: Mean that was subtracted, shape ``(d,)``, to put other texts on the same scale.
    """

    vectors: Tensor
    mean: Tensor

    def scaled(self, raw: Tensor) -> Tensor:
        """Centre and scale vectors of `read_texts`, shape ``(B, d)``, like those of the titles."""
        return nn.functional.normalize(raw - self.mean.to(raw.device), dim=1)


def read_texts(
    encoder: nn.Module,
    prompts: TitlePrompts,
    texts: Sequence[str],
    pooling: str,
    device: torch.device,
    batch_tokens: int = 8192,
) -> Tensor:
    """Vectors of texts in the format of titles: special tokens around each, a separator behind.

    Args:
        encoder: Language model without language-model head, in evaluation mode, its adapter off.
        prompts: Tokenises the texts.
        texts: M texts; equal texts get equal vectors up to rounding.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Device of the model.
        batch_tokens: Tokens per forward pass, padding included.

    Returns:
        Shape ``(M, d)``, float32, neither centred nor scaled, on the CPU.
    """
    tokens = prompts.texts(texts)
    counts = tokens.attention_mask.sum(dim=1).numpy()

    def batch(part: NDArray[np.int64]) -> TokenBatch:
        rows, width = torch.from_numpy(part), int(counts[part].max())
        return TokenBatch(tokens.input_ids[rows, :width], tokens.attention_mask[rows, :width])

    return pooled_states(encoder, counts, batch, pooling, device, batch_tokens)


def read_titles(encoder: nn.Module, prompts: TitlePrompts, pooling: str, device: torch.device) -> TitleVectors:
    """Vectors of all titles in the form of generated answers; arguments as in `read_texts`.

    Equal titles, which the title task numbers, get different vectors here. All other vectors equal those of
    `title_vectors` if the tokenizer reproduces its input when decoding.
    """
    raw = read_texts(encoder, prompts, prompts.decoded(prompts.answer_tokens()), pooling, device)
    mean = raw.mean(dim=0)
    return TitleVectors(nn.functional.normalize(raw - mean, dim=1), mean)


@torch.no_grad()
def pooled_states(
    encoder: nn.Module,
    counts: NDArray[np.int64],
    batch: Callable[[NDArray[np.int64]], TokenBatch],
    pooling: str,
    device: torch.device,
    batch_tokens: int,
    use_gates: Callable[[NDArray[np.int64]], AbstractContextManager[Any]] = lambda rows: nullcontext(),
    progress: Progress | None = None,
) -> Tensor:
    """Pooled hidden states of texts.

    Args:
        encoder: Language model without language-model head, in evaluation mode.
        counts: Tokens of each text, shape ``(M,)``, M at least 1.
        batch: Tokens of some texts, given their numbers ``(B,)``.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Device of the model.
        batch_tokens: Tokens per forward pass, padding included.
        use_gates: Holds the gates of some texts; unused without adapter.
        progress: An open one counts the texts; None shows one, with speed and time left.

    Returns:
        Shape ``(M, d)``, float32, neither centred nor scaled, on the CPU.
    """
    vectors: Tensor | None = None
    with Progress("read texts", len(counts), "text") if progress is None else nullcontext(progress) as bar:
        for rows in batches_by_cost(counts, batch_tokens):
            tokens = batch(rows).to(device)
            with use_gates(rows):
                hidden = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            pooled = pool(hidden, tokens.attention_mask, pooling).cpu()
            vectors = pooled.new_empty(len(counts), pooled.shape[1]) if vectors is None else vectors
            vectors[torch.from_numpy(rows)] = pooled
            bar.advance(len(rows), tokens=int(counts[rows].sum()))
    assert vectors is not None, "there is at least one text"
    return vectors
