"""The iLoRA recommender: a frozen LLM, LoRA experts mixed per sequence, and scores over the whole catalogue.

    h    = pool(LLM with adapter, experts mixed by g; prompt)       user vector
    g    = softmax(W z),  z = pool(LLM without adapter; prompt)     gate, cached: z does not change in training;
                          or a student's user vector                see `llm2rec.teacher.gate_source`
    s_i  = logit_scale · cos(h, v_i) + bias_i                       v_i: what the LLM without adapter makes of a title

Only the LoRA experts and the gate are trained.
"""

from contextlib import AbstractContextManager
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from llm2rec.core.vectors import standardised
from llm2rec.ilora import Gate, ILoraModel, frozen_base
from llm2rec.teacher.gate_source import GateSource
from llm2rec.teacher.interfaces import ITeacherRecommender
from llm2rec.teacher.prompts import PromptBuilder, TokenBatch, batches_by_tokens

__all__ = ["ILoraRecommender", "frozen_title_vectors", "pool"]

_EXCLUDED = 1e4  # far below any score, yet finite, so that ranks and log-probabilities stay defined


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


class ILoraRecommender(nn.Module, ITeacherRecommender):
    """A language model as a recommender over a whole catalogue.

    Args:
        llm: Language model with an iLoRA adapter.
        prompts: Turns histories into tokens.
        pooling: ``last``, ``mean`` or ``cls``.
        item_vectors: What items are scored with, shape ``(N, d)``, unit length; not trained.
        logit_scale: Factor on the cosine.
        item_bias: Added to each item's score, shape ``(N,)``; not trained.
        exclude_history: Whether the items of a history are out of the running.
        gate_source: Where the gate's input comes from.
    """

    _item_vectors: Tensor
    item_bias: Tensor

    def __init__(
        self,
        llm: PeftModel,
        prompts: PromptBuilder,
        *,
        pooling: str,
        item_vectors: Tensor,
        logit_scale: float,
        item_bias: Tensor,
        exclude_history: bool,
        gate_source: GateSource,
    ) -> None:
        super().__init__()
        self.gate_source = gate_source
        self.llm, self.prompts, self.pooling = llm, prompts, pooling
        self.logit_scale, self.exclude_history = logit_scale, exclude_history
        self.register_buffer("_item_vectors", item_vectors.float(), persistent=False)
        self.register_buffer("item_bias", item_bias.float(), persistent=False)

    @property
    def item_vectors(self) -> Tensor:
        """Item vectors, shape ``(N, d)``."""
        return self._item_vectors

    @property
    def tuner(self) -> ILoraModel:
        """The PEFT tuner, which owns the gates."""
        return cast(ILoraModel, self.llm.base_model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Represent users; gates must be held (see `mixing`).

        Args:
            input_ids: Prompts, shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``.

        Returns:
            User vectors of shape ``(B, d)``, float32, unit length.
        """
        hidden = self.llm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return nn.functional.normalize(pool(hidden, attention_mask, self.pooling), dim=1)

    def mixing(self, gate_input: Tensor) -> AbstractContextManager[Tensor]:
        """Hold the gates of a batch while its forward AND backward pass run; ``gate_input`` has shape ``(B, d)``.

        The context gives them: ``(B, E)``, or ``(B, G, E)`` for G adapted layers with gates of their own.
        """
        return cast(AbstractContextManager[Tensor], self.tuner.instance(gate_input))  # one adapter is active

    @torch.no_grad()
    def evaluation_gates(self, gate_input: Tensor) -> Tensor:
        """Gates as evaluation has them, without noise, dropout or statistics of the batch, whatever the mode is.

        Args:
            gate_input: Shape ``(B, d)``.

        Returns:
            Shape ``(B, E)`` or ``(B, G, E)``, float32, without gradient.
        """
        training = [module for module in self.tuner.modules() if isinstance(module, Gate) and module.training]
        for network in training:
            network.eval()
        try:
            return self.tuner.gate(gate_input)
        finally:
            for network in training:
                network.train()

    def score(self, users: Tensor, history: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Score all items.

        Args:
            users: User vectors of shape ``(B, d)``.
            history: Items shown, shape ``(B, L)``, padded with N; out of the running where `exclude_history` is set.
            keep: Items that stay in the running all the same, shape ``(B,)``: the targets, in training.

        Returns:
            Logits of shape ``(B, N)``, float32.
        """
        logits = self.logit_scale * users.float() @ self._item_vectors.float().T + self.item_bias.float()
        if history is None or not self.exclude_history:
            return logits
        penalty = logits.new_zeros(len(logits), logits.shape[1] + 1).scatter(1, history, _EXCLUDED)
        if keep is not None:
            penalty = penalty.scatter(1, keep.unsqueeze(1), 0.0)
        return logits - penalty[:, :-1]

    def frozen_vectors(self, tokens: TokenBatch) -> Tensor:
        """Pooled states of the model without adapter, scaled to unit length: the gate inputs z of `FrozenBase`.

        Hidden states grow with the width of the model, and so does what one step of Adam does to ``W z``: with inputs
        of unit mean square the gates of MiniLM had collapsed onto single experts after 50 steps.

        Returns:
            Shape ``(B, d)``, float32.
        """
        with frozen_base(self.llm):
            hidden = self.llm(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return nn.functional.normalize(pool(hidden, tokens.attention_mask, self.pooling), dim=1)

    @torch.no_grad()
    def log_probs(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Log-probabilities over the catalogue; see `ITeacherRecommender.log_probs`. Needs evaluation mode."""
        device = self._item_vectors.device
        tokens = self.prompts.histories(history, lengths).to(device)
        with self.mixing(self.gate_source.vectors(self, history, lengths, tokens)):
            users = self(tokens.input_ids, tokens.attention_mask)
        return self.score(users, torch.from_numpy(history).to(device, torch.int64)).log_softmax(dim=1)


def frozen_title_vectors(
    llm: nn.Module, prompts: PromptBuilder, pooling: str, device: torch.device, batch_tokens: int = 8192
) -> Tensor:
    """What the language model, before any adapter, makes of each title.

    Args:
        llm: Language model without adapter, or inside `frozen_base`, in evaluation mode.
        prompts: Holds the titles' tokens.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Where the model is.
        batch_tokens: Tokens per forward pass, padding included.

    Returns:
        Shape ``(N, d)``, float32, centred over the catalogue and of unit length, on the CPU.
    """
    vectors: Tensor | None = None
    with torch.no_grad():
        for items in batches_by_tokens(prompts.title_token_counts(), batch_tokens):
            tokens = prompts.titles(items).to(device)
            hidden = llm(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            pooled = pool(hidden, tokens.attention_mask, pooling).cpu()
            vectors = pooled.new_empty(prompts.n_items, pooled.shape[1]) if vectors is None else vectors
            vectors[torch.from_numpy(items)] = pooled
    assert vectors is not None, "a dataset has at least one item"
    return standardised(vectors)
