"""The models of finished runs, as far as measuring them needs: rank, rank among candidates, answer once."""

import time
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.engine import Engine
from llm2rec.data import RecData
from llm2rec.ensemble.model import Ensemble, load_ensemble
from llm2rec.ensemble.model import rank_targets as rank_ensemble_targets
from llm2rec.evaluate.candidates import rank_among_candidates
from llm2rec.student.candidates import CandidateSampler
from llm2rec.student.datamodule import SeenItems, SequenceData
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.store import load_student
from llm2rec.teacher.factory import TeacherRecipe, load_teacher
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ILoraRecommender, LLMTeacher
from llm2rec.teacher.trainer import rank_targets as rank_teacher_targets

__all__ = ["FinishedEnsemble", "FinishedModel", "FinishedStudent", "FinishedTeacher", "gates_of_rows"]

_LATENCY_REPEATS = 50
_BATCH_ROWS = 512
_BATCH_TOKENS = 8192
_GATE_ROWS = 4096  # gates per layer of a large model take a kilobyte a row


def gates_of_rows(model: LLMTeacher, rows: TeacherRows, device: torch.device) -> Tensor:
    """Gates of rows as evaluation has them, mean over gate networks.

    Args:
        model: A teacher with experts.
        rows: M rows with what the gate reads.
        device: Where the teacher is.

    Returns:
        Shape ``(M, E)``, float32, on the CPU.
    """
    blocks = [
        model.evaluation_gates(torch.from_numpy(rows.gate_inputs[start : start + _GATE_ROWS]).to(device)).cpu()
        for start in range(0, len(rows.rows), _GATE_ROWS)
    ]
    gates = torch.cat(blocks)  # (M, E) or (M, G, E)
    return gates if gates.ndim == 2 else gates.mean(dim=1)


class FinishedModel(ABC):
    """A finished run's model on the test split; loaded when it is first needed.

    Args:
        folder: Run folder.
        data: The dataset.
        engine: Divides rows among processes.
        gate_dir: Where the gate inputs of teachers are cached.
    """

    def __init__(self, folder: Path, data: RecData, engine: Engine, gate_dir: Path) -> None:
        self._folder, self._data, self._engine, self._gate_dir = folder, data, engine, gate_dir

    @abstractmethod
    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """0-based ranks of all test targets among the catalogue less ``seen``, shape ``(M,)``; a collective.

        They are exact below ``k``; at or beyond it, a model that does not score every item says N.
        """

    @abstractmethod
    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """0-based ranks of all test targets among their candidates, shape ``(M,)``; a collective."""

    @abstractmethod
    def answer(self, k: int) -> None:
        """Find the best ``k`` items for the first test row."""

    def gates(self) -> Tensor | None:
        """Gates of all test rows, mean over a teacher's gate networks, shape ``(M, E)``; None without experts."""
        return None

    def milliseconds(self, k: int) -> float:
        """Median time of an answer of ``k`` items for one user, on this machine."""
        device, seconds = self._engine.device, []
        with torch.inference_mode():
            for _ in range(_LATENCY_REPEATS + 5):  # the first few warm up
                start = time.perf_counter()
                self.answer(k)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        return round(1000 * float(np.median(seconds[5:])), 4)


class _Sequential(FinishedModel):
    """What reads ids and scores the whole catalogue at once."""

    @property
    @abstractmethod
    def _max_length(self) -> int:
        """The longest history that it reads."""

    @abstractmethod
    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        """Scores of all items for some test rows, shape ``(B, N)``."""

    @cached_property
    def _test(self) -> SequenceData:
        return SequenceData.of(self._data.splits["test"], self._data.n_items, self._max_length)

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`."""
        costs = np.ones(len(self._test), np.int64)
        return rank_among_candidates(
            self._score, self._test.targets, candidates, self._engine, costs=costs, max_cost=_BATCH_ROWS
        )

    def answer(self, k: int) -> None:
        """See `FinishedModel.answer`."""
        self._score(np.zeros(1, np.int64)).topk(k)


class FinishedStudent(_Sequential):
    """A student, distilled or not."""

    @cached_property
    def _model(self) -> SequentialRecommender:
        return load_student(self._folder / "student").to(self._engine.device)

    @property
    def _max_length(self) -> int:
        return self._model.max_length

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        batch = self._test.batch(rows, self._engine.device)
        return self._model.score(self._model(batch.history, batch.lengths)).float()

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        return rank_targets(self._model, self._test, self._engine, seen=seen, batch_size=_BATCH_ROWS)


class FinishedEnsemble(_Sequential):
    """Students and item neighbours, asked together."""

    @cached_property
    def _model(self) -> Ensemble:
        return load_ensemble(self._folder / "ensemble", self._data, self._engine.device)

    @property
    def _max_length(self) -> int:
        return self._model.max_length

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        return self._model.probabilities(self._test.batch(rows, self._engine.device))

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        return rank_ensemble_targets(self._model, self._test, self._engine, seen=seen, batch_rows=_BATCH_ROWS)


class FinishedTeacher(FinishedModel):
    """A teacher of the `item` objective, which scores the whole catalogue."""

    @cached_property
    def _loaded(self) -> tuple[LLMTeacher, TeacherRecipe]:
        return load_teacher(self._folder / "teacher", self._data, self._engine.device)

    @cached_property
    def _test(self) -> SequenceData:
        return SequenceData.of(self._data.splits["test"], self._data.n_items, self._data.history_length)

    @cached_property
    def _rows(self) -> TeacherRows:
        """The test rows with what the gate reads; a collective."""
        model, recipe = self._loaded
        cache = GateCache(model, recipe.identity, self._engine, self._gate_dir)
        return cache.rows(self._test, np.arange(len(self._test)))

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        """Scores of all items; a target stays in the running where the history, which is not, shows it."""
        history, lengths, targets = (
            each.numpy()[rows] for each in (self._test.history, self._test.lengths, self._test.targets)
        )
        return self._loaded[0].log_probs(history, lengths, targets)

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        model, _ = self._loaded
        assert isinstance(model, ILoraRecommender), "other objectives are measured elsewhere"
        return rank_teacher_targets(model, self._rows, self._engine, seen=seen, batch_tokens=_BATCH_TOKENS)

    def gates(self) -> Tensor | None:
        """See `FinishedModel.gates`."""
        model, _ = self._loaded
        return None if model.tuner is None else gates_of_rows(model, self._rows, self._engine.device)

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`; a pass of its own, which computes the gate inputs again."""
        costs = self._loaded[0].token_counts(self._test.history.numpy(), self._test.lengths.numpy())
        return rank_among_candidates(
            self._score, self._test.targets, candidates, self._engine, costs=costs, max_cost=_BATCH_TOKENS
        )

    def answer(self, k: int) -> None:
        """See `FinishedModel.answer`."""
        self._score(np.zeros(1, np.int64)).topk(k)
