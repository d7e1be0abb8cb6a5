"""The iLoRA recommender: a frozen LLM, LoRA experts mixed per sequence, and scores over the whole catalogue.

    z = pool(LLM without adapter; prompt)                       gate input, of unit length: `LLMTeacher.gate_inputs`;
        or a trained recommender's user vector                  fixed in training, so `gate_cache` stores it
    g = softmax(W z)                                            gates: `LLMTeacher.use_gates`
    h = pool(LLM with adapter, experts mixed by g; prompt)      user vector, of unit length: `ItemTeacher.forward`
    s = head(h)                                                 scores of all items: `llm2rec.teacher.heads`

In hybrid prompts each title is followed by the item's vector of a trained recommender, projected to the width of the
LLM. LoRA experts, gate, projector and the head's own parameters are trained.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2rec.ilora import Gate, ILoraModel, frozen_base
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.heads import ItemHead
from llm2rec.teacher.injection import ItemProjector, embedded
from llm2rec.teacher.interfaces import ITeacherRecommender
from llm2rec.teacher.prompts import PromptBuilder, TokenBatch
from llm2rec.teacher.text_vectors import pool, title_vectors

__all__ = ["EXCLUDED", "GATE_INPUTS", "ItemTeacher", "LLMTeacher", "UserInputs", "without_history"]

EXCLUDED = 1e4  # far below any score, yet finite, so that ranks and log-probabilities stay defined
GATE_INPUTS = ("llm", "sequence", "none")  # "none": plain LoRA or no adapter


def without_history(scores: Tensor, history: Tensor, keep: Tensor | None) -> Tensor:
    """Exclude the items of histories.

    Args:
        scores: Logits or log-probabilities of all items, shape ``(B, N)``.
        history: Items shown, shape ``(B, L)``, int64, padded with N.
        keep: One item per row that is not excluded, shape ``(B,)``, int64; None for none.

    Returns:
        Shape ``(B, N)``.
    """
    penalty = scores.new_zeros(len(scores), scores.shape[1] + 1).scatter(1, history, EXCLUDED)
    if keep is not None:
        penalty = penalty.scatter(1, keep.unsqueeze(1), 0.0)
    return scores - penalty[:, :-1]


@dataclass(frozen=True)
class UserInputs:
    """Inputs of the model for some users, on its device.

    Attributes:
        input_ids: Prompts, shape ``(B, T)``, padded on the right.
        attention_mask: Shape ``(B, T)``.
        item_ids: Items injected, shape ``(B, T)``, N where none is; None for text-only prompts.
        history: Items shown, shape ``(B, L)``, padded with N.
        recommender_users: The trained recommender's user vectors, shape ``(B, D)``; None if the head ignores them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    item_ids: Tensor | None
    history: Tensor
    recommender_users: Tensor | None


class LLMTeacher(nn.Module, ITeacherRecommender):
    """Base class of the teachers: a language model with its prompts, gates and injected vectors.

    Args:
        llm: Language model, with an iLoRA or LoRA adapter or without any.
        prompts: Turns histories into tokens.
        pooling: Pooling of hidden states: ``last``, ``mean`` or ``cls``.
        exclude_history: Whether the items of a history are excluded from its ranking.
        gate_input: Source of the gate's input, one of `GATE_INPUTS`.
        recommender: The trained recommender that gate, projector or head read; None if unused.
        projector: Projects the injected vectors of hybrid prompts; None for text-only prompts.
    """

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        prompts: PromptBuilder,
        *,
        pooling: str,
        exclude_history: bool,
        gate_input: str = "none",
        recommender: BorrowedStudent | None = None,
        projector: ItemProjector | None = None,
    ) -> None:
        super().__init__()
        self.llm, self.prompts, self.pooling, self.exclude_history = llm, prompts, pooling, exclude_history
        self.gate_input, self.recommender, self.projector = gate_input, recommender, projector

    @property
    def model_type(self) -> str:
        """Type of the language model, such as ``llama``."""
        return str(getattr(self.llm.config, "model_type", type(self.llm).__name__))

    @property
    def is_hybrid(self) -> bool:
        """Whether prompts carry injected vectors."""
        return self.projector is not None

    @property
    def tuner(self) -> ILoraModel | None:
        """The iLoRA tuner, which owns the gates; None for plain LoRA and without adapter."""
        tuner = self.llm.base_model if isinstance(self.llm, PeftModel) else None
        return tuner if isinstance(tuner, ILoraModel) else None

    def use_gates(self, gate_input: Tensor) -> AbstractContextManager[Tensor | None]:
        """Compute the gates of a batch and hold them while its forward AND backward pass run.

        Args:
            gate_input: Shape ``(B, d)``.

        Returns:
            A context manager that yields the gates: ``(B, E)``, ``(B, G, E)`` for G layers with gates of their own, or
            None for a language model without experts.
        """
        if self.tuner is None:
            return nullcontext()
        return cast(AbstractContextManager[Tensor], self.tuner.use_gates(gate_input))  # one adapter is active

    @torch.no_grad()
    def evaluation_gates(self, gate_input: Tensor) -> Tensor:
        """Gates of evaluation mode (no noise, dropout or batch statistics), whatever the current mode.

        Args:
            gate_input: Shape ``(B, d)``.

        Returns:
            Shape ``(B, E)`` or ``(B, G, E)``, float32, without gradient.
        """
        assert self.tuner is not None, "only a mixture of experts has gates"
        training = [module for module in self.tuner.modules() if isinstance(module, Gate) and module.training]
        for network in training:
            network.eval()
        try:
            return self.tuner.gate(gate_input)
        finally:
            for network in training:
                network.train()

    def embeddings(self, input_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Input embeddings of hybrid prompts; see `embedded`."""
        assert self.projector is not None, "only hybrid prompts have injected vectors"
        table = cast(nn.Module, self.llm.get_input_embeddings())
        return embedded(table, self.projector, input_ids, item_ids, self.prompts.pad_id)

    def unused_projector(self, values: Tensor) -> Tensor:
        """Return ``values`` with a zero-gradient path to the projector.

        A text-only batch of a hybrid teacher does not use the projector, and DDP waits for the gradient of every
        trained parameter.
        """
        if self.projector is None or not torch.is_grad_enabled():
            return values
        return values + sum(0.0 * parameter.sum() for parameter in self.projector.parameters())

    def frozen_vectors(self, tokens: TokenBatch) -> Tensor:
        """Pooled states of the model without adapter, scaled to unit length.

        Hidden states grow with the model's width, and so does the effect of one Adam step on ``W z``: with inputs of
        unit mean square the gates of MiniLM had collapsed onto single experts after 50 steps.

        Args:
            tokens: Text-only prompts.

        Returns:
            Shape ``(B, d)``, float32.
        """
        with frozen_base(cast(PeftModel, self.llm)):
            hidden = self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return nn.functional.normalize(pool(hidden, tokens.attention_mask, self.pooling), dim=1)

    @property
    def encoder(self) -> nn.Module:
        """The language model without its language-model head, which returns last hidden states."""
        return self.llm

    def gate_inputs(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Gate inputs z of a batch; they do not change while the teacher is trained.

        They come from the frozen language model, which reads the text-only prompt, or are the user vectors of the
        trained recommender (the paper), scaled to the same unit length.

        Args:
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right with N.
            lengths: Items per history, shape ``(B,)``, at least 1.

        Returns:
            Shape ``(B, d)``, float32, without gradient; d = 0 without experts.
        """
        if self.gate_input == "none":
            return torch.empty(len(history), 0)
        if self.gate_input == "sequence":
            assert self.recommender is not None, "the factory loads the recommender"
            return nn.functional.normalize(self.recommender.users(history, lengths), dim=1)
        return self.frozen_vectors(self.prompts.histories(history, lengths).to(self.device))

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return cast(nn.Module, self.llm.get_input_embeddings()).weight.device  # type: ignore[return-value]

    @property
    @abstractmethod
    def item_tensors(self) -> dict[str, Tensor]:
        """Untrained tensors of the items, as saved in ``items.safetensors``."""

    def refresh_titles(self) -> None:
        """Recompute the title vectors; a no-op for a teacher that does not score them."""

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of each row's prompt, shape ``(B,)``; arguments as in `ITeacherRecommender.log_probs`."""
        return self.prompts.token_counts(history, lengths, hybrid=self.is_hybrid)

    def ranking_token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int) -> NDArray[np.int64]:
        """Tokens per row that `best_items` holds in memory at once, shape ``(B,)``; arguments as there."""
        return self.token_counts(history, lengths)


class ItemTeacher(LLMTeacher):
    """A language model that scores the whole catalogue: the ``item`` objective.

    Args:
        llm: See `LLMTeacher`.
        prompts: See `LLMTeacher`.
        head: Scores all items.
        **common: Further arguments of `LLMTeacher`.
    """

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        prompts: PromptBuilder,
        head: ItemHead,
        **common: Any,
    ) -> None:
        super().__init__(llm, prompts, **common)
        self.head = head

    @property
    def item_vectors(self) -> Tensor:
        """The language model's vectors of the titles, shape ``(N, d)``."""
        return self.head.titles

    @property
    def item_tensors(self) -> dict[str, Tensor]:
        """See `LLMTeacher.item_tensors`; ``bias`` is added to each item's score, shape ``(N,)``."""
        return {"vectors": self.head.titles, "bias": self.head.bias}

    def read(self, history: NDArray[np.int32], lengths: NDArray[np.int32], *, hybrid: bool | None = None) -> UserInputs:
        """Build the model's inputs.

        Args:
            history: Item ids, shape ``(B, L)``.
            lengths: Items per history, shape ``(B,)``.
            hybrid: Whether vectors are injected; None for the teacher's default, `is_hybrid`.
        """
        tokens = self.prompts.histories(history, lengths, hybrid=self.is_hybrid if hybrid is None else hybrid)
        tokens = tokens.to(self.device)
        users = None
        if self.recommender is not None and self.head.reads_recommender:
            users = self.recommender.users(history, lengths)
        shown = torch.from_numpy(history).to(self.device, torch.int64)
        return UserInputs(tokens.input_ids, tokens.attention_mask, tokens.item_ids, shown, users)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        item_ids: Tensor | None,
        history: Tensor,
        recommender_users: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Score all items; gates must be held (see `use_gates`).

        Args:
            input_ids: Shape ``(B, T)``; see `UserInputs` for this and the next four.
            attention_mask: Shape ``(B, T)``.
            item_ids: Shape ``(B, T)`` or None.
            history: Items shown, shape ``(B, L)``; excluded if `exclude_history` is set.
            recommender_users: Shape ``(B, D)`` or None.
            keep: Items that are not excluded, shape ``(B,)``: the targets, in training.

        Returns:
            Logits of shape ``(B, N)``, float32.
        """
        if item_ids is None:
            hidden = self.llm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            hidden = self.unused_projector(hidden)
        else:
            embeddings = self.embeddings(input_ids, item_ids)
            hidden = self.llm(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
        has_autocast = torch.amp.is_autocast_available(hidden.device.type)  # not on meta
        # Scores of thousands of items need float32.
        with torch.autocast(hidden.device.type, enabled=False) if has_autocast else nullcontext():
            users = nn.functional.normalize(pool(hidden, attention_mask, self.pooling), dim=1)
            logits = cast(Tensor, self.head(users, recommender_users))
            return without_history(logits, history, keep) if self.exclude_history else logits

    @torch.no_grad()
    def best_items(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int, gate_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `ITeacherRecommender.best_items`; requires evaluation mode."""
        best = self._log_probs(history, lengths, gate_inputs).topk(k, dim=1)
        return best.indices, best.values

    @torch.no_grad()
    def log_probs(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], keep: NDArray[np.int32] | None = None
    ) -> Tensor:
        """See `ITeacherRecommender.log_probs`; requires evaluation mode."""
        return self._log_probs(history, lengths, None, keep)

    def _log_probs(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        gate_inputs: Tensor | None,
        keep: NDArray[np.int32] | None = None,
    ) -> Tensor:
        kept = None if keep is None else torch.from_numpy(keep).to(self.device, torch.int64)
        with self.use_gates(self.gate_inputs(history, lengths) if gate_inputs is None else gate_inputs):
            return cast(Tensor, self(**vars(self.read(history, lengths)), keep=kept)).log_softmax(dim=1)

    @torch.no_grad()
    def refresh_titles(self, batch_tokens: int = 8192) -> None:
        """Recompute the title vectors with the current adapter, in evaluation mode; a function of the weights alone.

        The gate of a title is that of a history with this item only.
        """

        def use_gates_of(items: NDArray[np.int64]) -> AbstractContextManager[Tensor | None]:
            return self.use_gates(self.gate_inputs(items[:, None].astype(np.int32), np.ones(len(items), np.int32)))

        was_training = self.training
        self.eval()
        vectors = title_vectors(self.llm, self.prompts, self.pooling, self.device, batch_tokens, use_gates_of)
        self.head.titles.copy_(vectors)
        self.train(was_training)
