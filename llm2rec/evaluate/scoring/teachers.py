"""Finished teachers on the test split. Imported only if a teacher is among the runs, as PEFT takes seconds to import.

An item teacher scores the whole catalogue. A title teacher is measured in three ways, each with its own prompts: among
candidates that the prompt lists, by the log-probability of their titles (always valid) and by the title it generates
(valid if it names exactly one candidate); and over the whole catalogue, by the best K items after a prompt without
candidates.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.files import read_json
from llm2rec.core.logging import progress
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.statistics import bootstrap_interval
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.evaluate.scoring.candidates import (
    CANDIDATES_HR,
    GENERATED_HR,
    GENERATED_HR_VALID,
    VALID_RATIO,
    rank_among_candidates,
)
from llm2rec.evaluate.scoring.finished import FinishedModel
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import RowNumbers, batches_within_cost, rank_rows
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.evaluator import rank_answers, rank_targets
from llm2rec.teacher.factory import TeacherRecipe
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.store import load_teacher
from llm2rec.teacher.title.matching import MatchingRule, TitleMatches, judge
from llm2rec.teacher.title.model import TitleRecommender
from llm2rec.teacher.title.objective import UNLISTED_CANDIDATES
from llm2rec.teacher.tokenising import fold_title

__all__ = ["FinishedItemTeacher", "FinishedTitleTeacher", "gates_of_rows", "title_scores"]

_BATCH_TOKENS = 8192
_GATE_ROWS = 4096  # gates per layer of a large model take a kilobyte per row
_GENERATED = {"hr@1": GENERATED_HR, "hr@1_valid": GENERATED_HR_VALID, "valid_ratio": VALID_RATIO}


def gates_of_rows(model: LLMTeacher, rows: TeacherRows, device: torch.device) -> Tensor:
    """Evaluation gates of rows, mean over gate networks.

    Args:
        model: A teacher with experts.
        rows: M rows with their gate inputs.
        device: Where the teacher is.

    Returns:
        Shape ``(M, E)``, float32, on the CPU.
    """
    starts = range(0, len(rows.rows), _GATE_ROWS)
    blocks = [
        model.evaluation_gates(torch.from_numpy(rows.gate_inputs[start : start + _GATE_ROWS]).to(device)).cpu()
        for start in progress(starts, "gates", len(starts), "block")
    ]
    gates = torch.cat(blocks)  # (M, E) or (M, G, E)
    return gates if gates.ndim == 2 else gates.mean(dim=1)


class _FinishedTeacher(FinishedModel):
    """A teacher with its test rows."""

    @cached_property
    def _loaded(self) -> tuple[LLMTeacher, TeacherRecipe]:
        return load_teacher(self._folder / "teacher", self._data, self._engine.device)

    @cached_property
    def _test(self) -> Rows:
        return Rows.of(self._data, "test")

    @cached_property
    def _rows(self) -> TeacherRows:
        """The test rows with their gate inputs; a collective."""
        model, recipe = self._loaded
        cache = GateCache(model, recipe.identity, self._engine, self._gate_dir)
        return cache.rows(self._test, np.arange(len(self._test)))

    def gates(self) -> Tensor | None:
        """See `FinishedModel.gates`."""
        model, _ = self._loaded
        return None if model.tuner is None else gates_of_rows(model, self._rows, self._engine.device)


class FinishedItemTeacher(_FinishedTeacher):
    """A teacher of the `item` objective, which scores the whole catalogue."""

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        """Scores of all items; items of the history are excluded, except a row's target."""
        return self._loaded[0].log_probs(*self._test.histories(rows), self._test.targets.numpy()[rows])

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        model, _ = self._loaded
        assert isinstance(model, ItemTeacher), "title teachers have their own class"
        return rank_targets(model, self._rows, self._engine, seen=seen, batch_tokens=_BATCH_TOKENS)

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`; a separate pass, which computes the gate inputs again."""
        costs = self._loaded[0].token_counts(*self._test.histories())
        return rank_among_candidates(
            self._score, self._test.targets, candidates, self._engine, costs=costs, max_cost=_BATCH_TOKENS
        )

    def recommend(self, k: int) -> None:
        """See `FinishedModel.recommend`."""
        self._score(np.zeros(1, np.int64)).topk(k)


class FinishedTitleTeacher(_FinishedTeacher):
    """A teacher of the `title` objective."""

    ranks_all = False

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return dict(read_json(self._folder / "teacher" / "config.json"))

    def n_titles(self, n_candidates: int) -> int:
        """See `FinishedModel.n_titles`: ``n_candidates``, by default as many as in training.

        A teacher whose prompts list no candidates gets as many as in validation.
        """
        return n_candidates or int(self._recipe["title"]["n_candidates"]) or UNLISTED_CANDIDATES

    @cached_property
    def _model(self) -> TitleRecommender:
        model, _ = self._loaded
        assert isinstance(model, TitleRecommender), "item teachers have their own class"
        return model

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`; a target that is not among the best ``k`` has rank N."""
        model, rows, n_items = self._model, self._rows, self._data.n_items

        def token_counts(numbers: RowNumbers) -> RowNumbers:
            return model.ranking_token_counts(*rows.data.histories(numbers), k)

        def rank(numbers: RowNumbers) -> Tensor:
            gate_inputs = torch.from_numpy(rows.gate_inputs[numbers]).to(self._engine.device)
            items = self._best(numbers, k, seen, gate_inputs)  # (B, k)
            is_target = items == rows.data.targets[torch.from_numpy(numbers)].unsqueeze(1)
            return torch.where(is_target.any(dim=1), is_target.int().argmax(dim=1), n_items)

        return rank_rows(rank, len(rows.rows), self._engine, batches_within_cost(token_counts, _BATCH_TOKENS))

    def _best(self, numbers: NDArray[np.int64], k: int, seen: SeenItems | None, gate_inputs: Tensor | None) -> Tensor:
        """The best k items of some rows, shape ``(B, k)``; N where a row has fewer left."""
        model, rows, n_items = self._model, self._rows, self._data.n_items
        (history, lengths), targets = rows.data.histories(numbers), rows.data.targets.numpy()[numbers]
        left_out, keep = np.empty((len(numbers), 0), np.int64), None
        if seen is not None:
            left_out, keep = seen.padded_without_targets(numbers, targets), targets
        excluded = np.concatenate([model.left_out(history, keep), left_out], axis=1)
        n_wanted = np.minimum(k, n_items - _n_distinct(excluded, n_items))  # (B,)
        best = torch.full((len(numbers), k), n_items)
        for n in np.unique(n_wanted[n_wanted > 0]):  # one search, except for rows with fewer than k items left
            part = np.flatnonzero(n_wanted == n)
            inputs = None if gate_inputs is None else gate_inputs[torch.from_numpy(part).to(gate_inputs.device)]
            kept = None if keep is None else keep[part]
            items, _ = model.best_items(
                history[part], lengths[part], int(n), inputs, excluded=left_out[part], keep=kept
            )
            best[torch.from_numpy(part), :n] = items.cpu()
        return best

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`: by the log-probability of titles, after prompts that list them."""
        model, rows = self._model, self._rows
        if model.lists_candidates:
            model.prompts.check_candidates(candidates.n_candidates, hybrid=model.is_hybrid)
        return rank_answers(model, rows, candidates, self._engine, batch_tokens=_BATCH_TOKENS)

    def choose_titles(self, candidates: CandidateSampler, ks: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
        """See `FinishedModel.choose_titles`."""
        ranks, matches = self.candidate_ranks(candidates), self.matches(candidates)
        columns = (
            [ranks] if matches is None else [ranks, torch.from_numpy(matches.valid), torch.from_numpy(matches.correct)]
        )
        return torch.stack([each.long() for each in columns], dim=1), title_scores(ranks, matches, ks)

    def matches(self, candidates: CandidateSampler) -> TitleMatches | None:
        """Match generated titles with the candidates that prompts list; None if prompts list none; a collective.

        Texts and titles are compared as the tokenizer decodes them, ignoring case and runs of white space.
        """
        model = self._model
        if not model.lists_candidates:
            return None
        rows = self._rows
        mine = self._engine.my_rows(len(rows.rows))
        history, lengths = rows.data.histories(mine)
        drawn = candidates.draw(rows.rows[mine])
        counts = model.prompts.question_token_counts(history, lengths, drawn, hybrid=model.is_hybrid)
        texts = [""] * len(mine)
        with self._engine.rows_progress("generate titles", len(mine)) as bar:
            for part in batches_by_cost(model.settings.generation_beams * counts, _BATCH_TOKENS):
                gate_inputs = torch.from_numpy(rows.gate_inputs[mine[part]]).to(self._engine.device)
                generated = model.generate(history[part], lengths[part], drawn[part], gate_inputs)
                for row, text in zip(part, generated, strict=True):
                    texts[row] = fold_title(text)
                bar.advance(len(part))
        titles = [fold_title(text) for text in model.prompts.decoded(model.prompts.answer_tokens())]
        judged = torch.zeros(len(mine), 2, dtype=torch.bool)
        if len(mine):
            candidate_titles = [[titles[item] for item in row] for row in drawn.tolist()]
            answers = [titles[item] for item in rows.data.targets.numpy()[mine].tolist()]
            matches = judge(texts, candidate_titles, answers, cast(MatchingRule, model.settings.hit_rule))
            judged = torch.from_numpy(np.stack([matches.valid, matches.correct], axis=1))
        judged = self._engine.gather_rows(judged.int(), len(rows.rows)).bool()
        return TitleMatches(judged[:, 0].numpy(), judged[:, 1].numpy())

    def recommend(self, k: int) -> None:
        """See `FinishedModel.recommend`; includes computing the gate inputs, as for a new user."""
        self._best(np.zeros(1, np.int64), k, None, None)


def title_scores(ranks: Tensor, matches: TitleMatches | None, ks: Sequence[int]) -> dict[str, Any]:
    """Metrics of title teachers by name, and their 95 % bootstrap intervals over rows.

    Args:
        ranks: 0-based ranks of the answers among their candidates, shape ``(M,)``.
        matches: Matches of the generated titles, if any.
        ks: Cut-offs.

    Returns:
        ``metrics``: ``candidates_hr@1`` and so on of the ranks, `GENERATED_HR` and related ones of the generated
        titles; and ``intervals`` of some of them.
    """
    metrics = {f"candidates_{name}": value for name, value in ranking_metrics(ranks, sorted({1, *ks})).items()}
    gains = 1 / np.log2(ranks.double().numpy() + 2)
    values = {CANDIDATES_HR: (ranks == 0).double().numpy(), "candidates_mrr": 1 / (ranks.double().numpy() + 1)}
    values |= {f"candidates_ndcg@{k}": np.where(ranks.numpy() < k, gains, 0.0) for k in ks if k > 1}
    intervals = {name: bootstrap_interval(each) for name, each in values.items()}
    if matches is not None:
        metrics |= {_GENERATED[name]: value for name, value in matches.metrics.items()}
        intervals |= {_GENERATED[name]: ends for name, ends in matches.intervals().items()}
    return {"metrics": metrics, "intervals": intervals}


def _n_distinct(items: NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
    """Number of distinct items in each row of ``(B, S)``, padding N aside, shape ``(B,)``."""
    ordered = np.sort(np.pad(items, ((0, 0), (0, 1)), constant_values=n_items), axis=1)
    # Sorted rows end with padding, so there are as many changes as items before it.
    return (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
