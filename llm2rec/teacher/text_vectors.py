"""What the language model without adapter makes of any text, on the scale of the catalogue's titles."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llm2rec.core.train.batching import batches_by_cost
from llm2rec.teacher.ilora_model import pool
from llm2rec.teacher.prompts import PromptBuilder

__all__ = ["TitleVectors", "read_texts", "read_titles"]


class TitleVectors(NamedTuple):
    """The catalogue as `llm2rec.teacher.title.grounding` sees it.

    Attributes:
        vectors: Of all titles, shape ``(N, d)``, float32, centred over the catalogue and of unit length; on the CPU,
            where a catalogue of any size has room.
        mean: What they were centred by, shape ``(d,)``, for other texts to be put on the same scale.
    """

    vectors: Tensor
    mean: Tensor

    def scaled(self, raw: Tensor) -> Tensor:
        """Centre and scale vectors of `read_texts`, shape ``(B, d)``, as those of the titles were."""
        return nn.functional.normalize(raw - self.mean.to(raw.device), dim=1)


@torch.no_grad()
def read_texts(
    encoder: nn.Module,
    prompts: PromptBuilder,
    texts: Sequence[str],
    pooling: str,
    device: torch.device,
    batch_tokens: int = 8192,
) -> Tensor:
    """Pooled states of each text, read alone as titles are: special tokens around it, a separator behind.

    Args:
        encoder: The language model without language-model head, in evaluation mode, its adapter off.
        prompts: Tokenises.
        texts: M texts; equal ones give equal vectors, but for rounding.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Where the model is.
        batch_tokens: Tokens per forward pass, padding included.

    Returns:
        Shape ``(M, d)``, float32, on the model's device, neither centred nor scaled.
    """
    tokens = prompts.texts(texts)
    counts = tokens.attention_mask.sum(dim=1).numpy()
    vectors: Tensor | None = None
    for part in batches_by_cost(counts, batch_tokens):
        rows, width = torch.from_numpy(part), int(counts[part].max())
        ids, mask = (each[rows, :width].to(device) for each in (tokens.input_ids, tokens.attention_mask))
        pooled = pool(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask, pooling)
        vectors = pooled.new_empty(len(texts), pooled.shape[1]) if vectors is None else vectors
        vectors[rows.to(device)] = pooled
    assert vectors is not None, "there is a text to read"
    return vectors


def read_titles(encoder: nn.Module, prompts: PromptBuilder, pooling: str, device: torch.device) -> TitleVectors:
    """Read all titles in the form in which they are written as answers; arguments as in `read_texts`.

    Titles that the title task numbers, since others have the same, differ here too. For all others the vectors are
    those of `llm2rec.teacher.ilora_model.title_vectors`, wherever the tokenizer gives back what went in.
    """
    raw = read_texts(encoder, prompts, prompts.decoded(prompts.answer_tokens()), pooling, device).cpu()
    mean = raw.mean(dim=0)
    return TitleVectors(nn.functional.normalize(raw - mean, dim=1), mean)
