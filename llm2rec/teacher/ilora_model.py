"""The iLoRA recommender: a frozen LLM, LoRA experts mixed per sequence, and scores over the whole catalogue.

    h = pool(LLM with adapter, experts mixed by g; prompt)      user vector, scaled to unit length
    g = softmax(W z),  z = pool(LLM without adapter; prompt)    gate, cached: z does not change in training;
                       or a recommender's user vector           see `llm2rec.teacher.gate_source`
    s = head(h)                                                 scores of all items: see `llm2rec.teacher.heads`

In hybrid prompts each title is followed by the item's vector of a trained recommender, projected to the width of the
LLM. Trained are the LoRA experts, the gate, the projector and what the head has to train.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.vectors import standardised
from llm2rec.ilora import Gate, ILoraModel, frozen_base
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.gate_source import GateSource
from llm2rec.teacher.heads import ItemHead
from llm2rec.teacher.injection import ItemProjector, embedded
from llm2rec.teacher.interfaces import ITeacherRecommender
from llm2rec.teacher.prompts import PromptBuilder, TokenBatch

__all__ = ["EXCLUDED", "ItemTeacher", "LLMTeacher", "UserInputs", "pool", "title_vectors", "without_history"]

EXCLUDED = 1e4  # far below any score, yet finite, so that ranks and log-probabilities stay defined


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


def without_history(scores: Tensor, history: Tensor, keep: Tensor | None) -> Tensor:
    """Put the items of histories out of the running.

    Args:
        scores: Logits or log-probabilities of all items, shape ``(B, N)``.
        history: Items shown, shape ``(B, L)``, int64, padded with N.
        keep: One item a row that stays in the running all the same, shape ``(B,)``, int64; None for none.

    Returns:
        Shape ``(B, N)``.
    """
    penalty = scores.new_zeros(len(scores), scores.shape[1] + 1).scatter(1, history, EXCLUDED)
    if keep is not None:
        penalty = penalty.scatter(1, keep.unsqueeze(1), 0.0)
    return scores - penalty[:, :-1]


@dataclass(frozen=True)
class UserInputs:
    """What the model is given about some users, on its device.

    Attributes:
        input_ids: Prompts, shape ``(B, T)``, padded on the right.
        attention_mask: Shape ``(B, T)``.
        item_ids: Items injected, shape ``(B, T)``, N where none is; None for text alone.
        history: Items shown, shape ``(B, L)``, padded with N.
        recommender_users: The trained recommender's user vectors, shape ``(B, D)``; None where no head reads them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    item_ids: Tensor | None
    history: Tensor
    recommender_users: Tensor | None


class LLMTeacher(nn.Module, ITeacherRecommender):
    """What teachers of all objectives share: a language model, its prompts, its gates and the vectors put into it.

    Args:
        llm: Language model, with an iLoRA or LoRA adapter or without any.
        prompts: Turns histories into tokens.
        pooling: ``last``, ``mean`` or ``cls``.
        gate_source: Where the gate's input comes from.
        recommender: The trained recommender that gate, projector or head read; None where none does.
        projector: Makes the injected vectors of hybrid prompts; None for text alone.
    """

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        prompts: PromptBuilder,
        *,
        pooling: str,
        gate_source: GateSource,
        recommender: BorrowedStudent | None = None,
        projector: ItemProjector | None = None,
    ) -> None:
        super().__init__()
        self.llm, self.prompts, self.pooling = llm, prompts, pooling
        self.gate_source, self.recommender, self.projector = gate_source, recommender, projector

    @property
    def is_hybrid(self) -> bool:
        """Whether prompts carry injected vectors."""
        return self.projector is not None

    @property
    def tuner(self) -> ILoraModel | None:
        """The PEFT tuner, which owns the gates; None for plain LoRA and for no adapter."""
        tuner = self.llm.base_model if isinstance(self.llm, PeftModel) else None
        return tuner if isinstance(tuner, ILoraModel) else None

    def use_gates(self, gate_input: Tensor) -> AbstractContextManager[Tensor | None]:
        """Hold the gates of a batch while its forward AND backward pass run; ``gate_input`` has shape ``(B, d)``.

        The context gives them: ``(B, E)``, or ``(B, G, E)`` for G adapted layers with gates of their own; None for a
        language model without experts.
        """
        if self.tuner is None:
            return nullcontext()
        return cast(AbstractContextManager[Tensor], self.tuner.use_gates(gate_input))  # one adapter is active

    @torch.no_grad()
    def evaluation_gates(self, gate_input: Tensor) -> Tensor:
        """Gates as evaluation has them, without noise, dropout or statistics of the batch, whatever the mode is.

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
        assert self.projector is not None, "only hybrid prompts have vectors to inject"
        table = cast(nn.Module, self.llm.get_input_embeddings())
        return embedded(table, self.projector, input_ids, item_ids, self.prompts.pad_id)

    def unused_projector(self, values: Tensor) -> Tensor:
        """Add nothing to ``values``, but a path to the projector for gradients of zero.

        A text-only batch of a hybrid teacher leaves the projector out, and DDP waits for the gradient of every trained
        parameter.
        """
        if self.projector is None or not torch.is_grad_enabled():
            return values
        return values + sum(0.0 * parameter.sum() for parameter in self.projector.parameters())

    def frozen_vectors(self, tokens: TokenBatch) -> Tensor:
        """Pooled states of the model without adapter, scaled to unit length: the gate inputs z of `FrozenBase`.

        Hidden states grow with the width of the model, and so does what one step of Adam does to ``W z``: with inputs
        of unit mean square the gates of MiniLM had collapsed onto single experts after 50 steps.

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
        """The language model without its language-model head: gives last hidden states."""
        return self.llm

    def gate_inputs(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Inputs of the gate, shape ``(B, d)``, float32; arguments as in `ITeacherRecommender.log_probs`."""
        return self.gate_source.vectors(self, history, lengths)

    def text_prompts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> TokenBatch:
        """Prompts of histories without injected vectors, on the model's device; arguments as in `gate_inputs`."""
        return self.prompts.histories(history, lengths).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return cast(nn.Module, self.llm.get_input_embeddings()).weight.device  # type: ignore[return-value]

    @property
    @abstractmethod
    def item_tensors(self) -> dict[str, Tensor]:
        """What the teacher knows of the items and does not train: what ``items.safetensors`` holds."""

    def refresh_titles(self) -> None:
        """Read the titles anew; nothing for a teacher that does not score them."""

    def token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int64]:
        """Tokens of each row's prompt, shape ``(B,)``; arguments as in `ITeacherRecommender.log_probs`."""
        return self.prompts.token_counts(history, lengths, hybrid=self.is_hybrid)

    def ranking_token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int) -> NDArray[np.int64]:
        """Tokens that `best_items` keeps in memory at once for each row, shape ``(B,)``; arguments as there."""
        return self.token_counts(history, lengths)


class ItemTeacher(LLMTeacher):
    """A language model as a recommender over a whole catalogue: the ``item`` objective.

    Args:
        llm: See `LLMTeacher`, as all that is not explained here.
        prompts: Turns histories into tokens.
        pooling: How a text is represented.
        head: Scores all items.
        exclude_history: Whether the items of a history are out of the running.
        gate_source: Where the gate's input comes from.
        recommender: The trained recommender, if any.
        projector: For hybrid prompts.
    """

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        prompts: PromptBuilder,
        *,
        pooling: str,
        head: ItemHead,
        exclude_history: bool,
        gate_source: GateSource,
        recommender: BorrowedStudent | None = None,
        projector: ItemProjector | None = None,
    ) -> None:
        super().__init__(
            llm, prompts, pooling=pooling, gate_source=gate_source, recommender=recommender, projector=projector
        )
        self.head, self.exclude_history = head, exclude_history

    @property
    def item_vectors(self) -> Tensor:
        """What the language model makes of the titles, shape ``(N, d)``."""
        return self.head.titles

    @property
    def item_tensors(self) -> dict[str, Tensor]:
        """See `LLMTeacher.item_tensors`; ``bias`` is added to each item's score, shape ``(N,)``."""
        return {"vectors": self.head.titles, "bias": self.head.bias}

    def read(self, history: NDArray[np.int32], lengths: NDArray[np.int32], *, hybrid: bool | None = None) -> UserInputs:
        """Put together what the model is given; arguments as in `ITeacherRecommender.log_probs`.

        Args:
            history: Item ids, shape ``(B, L)``.
            lengths: Items per history, shape ``(B,)``.
            hybrid: Whether vectors are injected; None for whatever the teacher does at its best.
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
        """Score all items; gates must be held (see `mixing`).

        Args:
            input_ids: See `UserInputs`, as all but the last.
            attention_mask: Shape ``(B, T)``.
            item_ids: Shape ``(B, T)`` or None.
            history: Items shown, shape ``(B, L)``; out of the running where `exclude_history` is set.
            recommender_users: Shape ``(B, D)`` or None.
            keep: Items that stay in the running all the same, shape ``(B,)``: the targets, in training.

        Returns:
            Logits of shape ``(B, N)``, float32.
        """
        if item_ids is None:
            hidden = self.llm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            hidden = self.unused_projector(hidden)
        else:
            embeddings = self.embeddings(input_ids, item_ids)
            hidden = self.llm(inputs_embeds=embeddings, attention_mask=attention_mask).last_hidden_state
        has_autocast = torch.amp.is_autocast_available(hidden.device.type)  # the meta device has none
        # Scores of thousands of items need float32.
        with torch.autocast(hidden.device.type, enabled=False) if has_autocast else nullcontext():
            users = nn.functional.normalize(pool(hidden, attention_mask, self.pooling), dim=1)
            logits = cast(Tensor, self.head(users, recommender_users))
            return without_history(logits, history, keep) if self.exclude_history else logits

    @torch.no_grad()
    def best_items(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int, gate_inputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `ITeacherRecommender.best_items`. Needs evaluation mode."""
        best = self._log_probs(history, lengths, gate_inputs).topk(k, dim=1)
        return best.indices, best.values

    @torch.no_grad()
    def log_probs(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], keep: NDArray[np.int32] | None = None
    ) -> Tensor:
        """Log-probabilities over the catalogue; see `ITeacherRecommender.log_probs`. Needs evaluation mode."""
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
        """Let the language model of now, adapter and all, read the titles again; a function of its weights alone.

        The gate of a title is that of a history that holds this item only. Evaluation mode while it runs.
        """

        def use_gates_of(items: NDArray[np.int64]) -> AbstractContextManager[Tensor | None]:
            return self.use_gates(self.gate_inputs(items[:, None].astype(np.int32), np.ones(len(items), np.int32)))

        was_training = self.training
        self.eval()
        vectors = title_vectors(self.llm, self.prompts, self.pooling, self.device, batch_tokens, use_gates_of)
        self.head.titles.copy_(vectors)
        self.train(was_training)


def title_vectors(
    llm: nn.Module,
    prompts: PromptBuilder,
    pooling: str,
    device: torch.device,
    batch_tokens: int = 8192,
    mixing: Callable[[NDArray[np.int64]], AbstractContextManager[Tensor | None]] = lambda items: nullcontext(),
) -> Tensor:
    """What a language model in evaluation mode makes of each title.

    Args:
        llm: Language model without language-model head.
        prompts: Holds the titles' tokens.
        pooling: ``last``, ``mean`` or ``cls``.
        device: Where the model is.
        batch_tokens: Tokens per forward pass, padding included.
        mixing: Holds the gates of some items' titles, item ids ``(B,)``; nothing for a model without adapter.

    Returns:
        Shape ``(N, d)``, float32, centred over the catalogue and of unit length, on the CPU.
    """
    vectors: Tensor | None = None
    with torch.no_grad():
        for items in batches_by_cost(prompts.title_token_counts(), batch_tokens):
            tokens = prompts.titles(items).to(device)
            with mixing(items):
                hidden = llm(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            pooled = pool(hidden, tokens.attention_mask, pooling).cpu()
            vectors = pooled.new_empty(prompts.n_items, pooled.shape[1]) if vectors is None else vectors
            vectors[torch.from_numpy(items)] = pooled
    assert vectors is not None, "a dataset has at least one item"
    return standardised(vectors)
