"""The `title` teacher (the iLoRA paper): a language model that generates the title of the next item.

It is trained on the answer's log-probability after a prompt with history and candidates, hybrid or text. Candidates are
compared by the log-probabilities of their titles, which is always valid, or by free generation, which is valid if it
names one candidate. The whole catalogue is ranked by a search over its titles (`llm2rec.teacher.title.beam`), or by
what lies nearest to the generated title (`llm2rec.teacher.title.matching`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2rec.core.errors import ConfigError
from llm2rec.ilora import frozen_base
from llm2rec.teacher.ilora_model import LLMTeacher, without_history
from llm2rec.teacher.llm import without_head
from llm2rec.teacher.prompt_layout import IGNORED_LABEL
from llm2rec.teacher.prompts import TokenBatch
from llm2rec.teacher.settings import TitleSettings
from llm2rec.teacher.text_vectors import TitleVectors, read_texts
from llm2rec.teacher.title.beam import TitleTrie, constrained_beam_search
from llm2rec.teacher.title.likelihood import title_log_probs
from llm2rec.teacher.title.matching import ground
from llm2rec.teacher.title.prompts import TitlePrompts

__all__ = ["TitleRecommender"]


class TitleRecommender(LLMTeacher):
    """A language model that writes the next item's title: the ``title`` objective.

    Args:
        llm: Causal language model; see `LLMTeacher`.
        prompts: Turns histories, candidates and answers into tokens.
        titles: Vectors of the titles by the language model without adapter; not trained.
        settings: Candidates, generation and search.
        **common: Further arguments of `LLMTeacher`.
    """

    prompts: TitlePrompts

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        prompts: TitlePrompts,
        titles: TitleVectors,
        settings: TitleSettings,
        **common: Any,
    ) -> None:
        super().__init__(llm, prompts, **common)
        self.titles, self.settings = titles, settings

    @property
    def encoder(self) -> nn.Module:
        """The language model without its language-model head."""
        model = self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm
        return without_head(cast(PreTrainedModel, model))

    @property
    def item_vectors(self) -> Tensor:
        """The language model's vectors of the titles, shape ``(N, d)``, on the CPU: only grounding reads them."""
        return self.titles.vectors

    @property
    def item_tensors(self) -> dict[str, Tensor]:
        """See `LLMTeacher.item_tensors`."""
        return self.titles._asdict()

    @property
    def lists_candidates(self) -> bool:
        """Whether prompts list candidates; prompts for ranking the whole catalogue never do."""
        return self.settings.n_candidates > 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, item_ids: Tensor | None, labels: Tensor) -> Tensor:
        """Negative log-probability of the answers; gates must be held (see `use_gates`).

        Args:
            input_ids: Prompts with answers, shape ``(B, T)``, padded on either side.
            attention_mask: Shape ``(B, T)``.
            item_ids: Items injected, shape ``(B, T)``, or None.
            labels: The answers' tokens, shape ``(B, T)``, -100 elsewhere.

        Returns:
            Mean over each answer's tokens, including its end token, shape ``(B,)``, float32, nats.
        """
        inputs = self._model_inputs(TokenBatch(input_ids, attention_mask, item_ids))
        answer = labels != IGNORED_LABEL
        # Logits over the vocabulary dominate memory: keep them only from the first answer's start on.
        n_kept = labels.shape[1] - int(answer.any(dim=0).nonzero()[0]) + 1
        logits = self.llm(**inputs, logits_to_keep=n_kept, use_cache=False).logits[:, :-1]  # (B, n_kept - 1, V)
        if item_ids is None:
            logits = self.unused_projector(logits)
        kept, answer = labels[:, 1 - n_kept :], answer[:, 1 - n_kept :]
        losses = nn.functional.cross_entropy(
            logits[answer].float(), kept[answer], reduction="none"
        )  # (answer tokens of all rows,)
        sums = losses.new_zeros(len(labels)).index_add(0, answer.nonzero()[:, 0], losses)
        return sums / answer.sum(dim=1)

    def _model_inputs(self, tokens: TokenBatch) -> dict[str, Tensor]:
        """Arguments of the language model: ids, or embeddings if vectors are injected."""
        positions = (tokens.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {"attention_mask": tokens.attention_mask, "position_ids": positions}
        if tokens.item_ids is None:
            return inputs | {"input_ids": tokens.input_ids}
        return inputs | {"inputs_embeds": self.embeddings(tokens.input_ids, tokens.item_ids)}

    def hold(self, gates: Tensor | None) -> AbstractContextManager[None]:
        """Hold gates of shape ``(B, E)`` or ``(B, G, E)``; None without experts."""
        if self.tuner is None or gates is None:
            return nullcontext()
        return cast(AbstractContextManager[None], self.tuner.hold(gates))

    def _gates(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], gate_inputs: Tensor | None
    ) -> Tensor | None:
        if self.tuner is None:
            return None
        return self.tuner.gate(self.gate_inputs(history, lengths) if gate_inputs is None else gate_inputs)

    def ranking_token_counts(self, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int) -> NDArray[np.int64]:
        """See `LLMTeacher.ranking_token_counts`.

        Tokens of a row's prompt, without candidates, times the beams, each of which holds the prompt's keys and values.
        """
        beams = self._search_beams(k) if self.settings.ranking == "search" else self.settings.generation_beams
        return beams * self.prompts.question_token_counts(history, lengths, None, hybrid=self.is_hybrid)

    def _search_beams(self, k: int) -> int:
        """Beams per row to find k titles."""
        return max(self.settings.search_beams, k)

    @torch.no_grad()
    def candidate_log_probs(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.int64] | None,
        gate_inputs: Tensor | None = None,
        answers: NDArray[np.int64] | None = None,
        mean: bool | None = None,
    ) -> Tensor:
        """Log-probabilities of the candidates' titles, end tokens included.

        Args:
            history: As in `ITeacherRecommender.log_probs`.
            lengths: As in `ITeacherRecommender.log_probs`.
            candidates: Items the prompt lists, shape ``(B, C)``, or None.
            gate_inputs: Gate inputs, if already known, shape ``(B, d)``.
            answers: Items whose titles are scored, shape ``(B, A)``; None for the candidates.
            mean: Whether to average over a title's tokens instead of summing; None for ``settings.mean_log_prob``.

        Returns:
            Shape ``(B, C)`` or ``(B, A)``, float32, nats.
        """
        scored = candidates if answers is None else answers
        assert scored is not None, "there are items to score"
        tokens, n_tokens = (torch.from_numpy(each[scored]).to(self.device) for each in self._answers)
        return title_log_probs(
            self.llm,
            self.hold,
            self._gates(history, lengths, gate_inputs),
            *self._prompts(history, lengths, candidates),
            tokens,
            n_tokens,
            mean=self.settings.mean_log_prob if mean is None else mean,
        )

    @torch.no_grad()
    def log_probs(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], keep: NDArray[np.int32] | None = None
    ) -> Tensor:
        """See `ITeacherRecommender.log_probs`; scores every title of the catalogue, which is exact but slow."""
        items = np.tile(np.arange(self.prompts.n_items), (len(history), 1))
        scores = self.candidate_log_probs(history, lengths, None, None, items, mean=False)
        if not self.exclude_history:
            return scores
        kept = None if keep is None else torch.from_numpy(keep).to(self.device, torch.int64)
        return without_history(scores, torch.from_numpy(history).to(self.device, torch.int64), kept)

    @torch.no_grad()
    def left_out(self, history: NDArray[np.int32], keep: NDArray[np.int32] | None = None) -> NDArray[np.int64]:
        """Items excluded by `exclude_history`, shape ``(B, L)``, padded with N; arguments as in `best_items`."""
        if not self.exclude_history:
            return np.empty((len(history), 0), np.int64)
        items = history.astype(np.int64)
        return items if keep is None else np.where(items == keep[:, None], self.prompts.n_items, items)

    def best_items(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        k: int,
        gate_inputs: Tensor | None = None,
        *,
        excluded: NDArray[np.int64] | None = None,
        keep: NDArray[np.int32] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The items with the most probable titles, or nearest to the generated one; the prompt lists no candidates.

        Args:
            history: As in `ITeacherRecommender.best_items`, as are the next three.
            lengths: Shape ``(B,)``.
            k: Number of items, at most the number that remains for each row.
            gate_inputs: Shape ``(B, d)``.
            excluded: Items to exclude besides those of `exclude_history`, shape ``(B, S)``, padded with N.
            keep: One item per row that `exclude_history` does not exclude, shape ``(B,)``; None for none.

        Returns:
            Item ids and log-probabilities, ``(B, k)`` each, best first; for ``ranking=grounding`` negative distances.

        Raises:
            ConfigError: If fewer than k items remain for a row.
        """
        items = np.concatenate([self.left_out(history, keep), *([] if excluded is None else [excluded])], axis=1)
        barred = torch.from_numpy(items).to(self.device) if items.shape[1] else None
        if self.settings.ranking == "grounding":
            return self._grounded(history, lengths, k, gate_inputs, barred)
        found = constrained_beam_search(
            self.llm,
            self.hold,
            self._gates(history, lengths, gate_inputs),
            *self._prompts(history, lengths, None),
            self._trie,
            beams=self._search_beams(k),
            k=k,
            excluded=barred,
        )
        return found.items, found.log_probs

    def _grounded(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        k: int,
        gate_inputs: Tensor | None,
        barred: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The items nearest to the generated title, by vectors of the language model without adapter."""
        predictions = self.text_vectors(self.generate(history, lengths, None, gate_inputs))
        n_barred = 0 if barred is None else barred.shape[1]
        found = ground(predictions, self.item_vectors, min(k + n_barred, self.prompts.n_items))
        if barred is None:
            return found.items, -found.distances
        left_out = _is_among(found.items, barred)
        if bool(((~left_out).sum(dim=1) < k).any()):
            n_left = int((~left_out).sum(dim=1).min())
            raise ConfigError(
                f"`k` is {k} but only {n_left} items remain for one row after exclusions; use k <= {n_left}."
            )
        order = left_out.int().argsort(dim=1, stable=True)[:, :k]  # stable: nearest first
        return found.items.gather(1, order), -found.distances.gather(1, order)

    @torch.no_grad()
    def text_vectors(self, texts: list[str]) -> Tensor:
        """Vectors of texts on the scale of `item_vectors`, shape ``(B, d)``, on the model's device."""
        with self._without_adapter():
            raw = read_texts(self.encoder, self.prompts, texts, self.pooling, self.device)
        return self.titles.scaled(raw.to(self.device))

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        if self.tuner is not None:
            with frozen_base(cast(PeftModel, self.llm)):
                yield
        elif isinstance(self.llm, PeftModel):
            with self.llm.disable_adapter():
                yield
        else:
            yield

    @torch.no_grad()
    def generate(
        self,
        history: NDArray[np.int32],
        lengths: NDArray[np.int32],
        candidates: NDArray[np.int64] | None,
        gate_inputs: Tensor | None = None,
    ) -> list[str]:
        """Generate titles, greedily or with beams, until the end token or the length of the longest title.

        Args:
            history: As in `ITeacherRecommender.log_probs`.
            lengths: As in `ITeacherRecommender.log_probs`.
            candidates: Items the prompt lists, shape ``(B, C)``, or None.
            gate_inputs: Gate inputs, if already known, shape ``(B, d)``.

        Returns:
            One text per row, in the form of `TitlePrompts.decoded`.
        """
        embeds, mask = self._prompts(history, lengths, candidates)
        with self.hold(self._gates(history, lengths, gate_inputs)):
            generated = cast(Any, self.llm).generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=self._answers[0].shape[1],
                num_beams=self.settings.generation_beams,
                do_sample=False,
                eos_token_id=self.prompts.end_id,
                pad_token_id=self.prompts.pad_id,
            )
        return self.prompts.decoded(generated)

    def _prompts(
        self, history: NDArray[np.int32], lengths: NDArray[np.int32], candidates: NDArray[np.int64] | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings ``(B, T, d)`` and attention mask ``(B, T)`` of prompts, padded on the left."""
        tokens = self.prompts.questions(history, lengths, candidates, hybrid=self.is_hybrid, padding="left")
        tokens = tokens.to(self.device)
        if tokens.item_ids is not None:
            return self.embeddings(tokens.input_ids, tokens.item_ids), tokens.attention_mask
        return cast(nn.Module, self.llm.get_input_embeddings())(tokens.input_ids), tokens.attention_mask

    @cached_property
    def _trie(self) -> TitleTrie:
        return TitleTrie(self.prompts.answer_tokens(), self.prompts.end_id).to(self.device)

    @cached_property
    def _answers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of all titles with end tokens, padded, shape ``(N, t)``, and their numbers, shape ``(N,)``."""
        titles = [np.append(tokens, self.prompts.end_id) for tokens in self.prompts.answer_tokens()]
        n_tokens = np.array([len(title) for title in titles])
        padded = np.full((len(titles), n_tokens.max()), self.prompts.pad_id, np.int64)
        padded[np.arange(padded.shape[1]) < n_tokens[:, None]] = np.concatenate(titles)
        return padded, n_tokens


def _is_among(items: Tensor, barred: Tensor) -> Tensor:
    """Whether each of a row's ``items``, shape ``(B, K)``, is one of its ``barred``, shape ``(B, S)``."""
    barred = barred.sort(dim=1).values
    places = torch.searchsorted(barred, items.contiguous()).clamp(max=barred.shape[1] - 1)
    return barred.gather(1, places) == items
