"""Models of finished runs on the test split: rank targets, rank them among candidates, time a request."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.model import Ensemble
from llm2rec.ensemble.model import rank_targets as rank_ensemble_targets
from llm2rec.ensemble.store import load_ensemble
from llm2rec.evaluate.scoring.candidates import rank_among_candidates
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import SequentialRecommender, load_student
from llm2rec.student.negatives import CandidateSampler

__all__ = ["FinishedEnsemble", "FinishedModel", "FinishedStudent"]

_LATENCY_REPEATS = 50
_BATCH_ROWS = 512


class FinishedModel(ABC):
    """The model of a finished run on the test split, loaded on first use.

    Args:
        folder: Run folder.
        data: The dataset.
        engine: Splits rows among processes.
        gate_dir: Where the gate inputs of teachers are cached.
    """

    ranks_all: ClassVar = True
    """Whether ranks are exact beyond any cut-off."""

    def __init__(self, folder: Path, data: RecData, engine: Engine, gate_dir: Path) -> None:
        self._folder, self._data, self._engine, self._gate_dir = folder, data, engine, gate_dir

    @abstractmethod
    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """0-based ranks of all test targets in the catalogue without ``seen``, shape ``(M,)``; a collective.

        Ranks below ``k`` are exact; a model that does not score every item gives N for the others.
        """

    @abstractmethod
    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """0-based ranks of all test targets among their candidates, shape ``(M,)``; a collective."""

    @abstractmethod
    def recommend(self, k: int) -> None:
        """Find the best ``k`` items for the first test row."""

    def gates(self) -> Tensor | None:
        """Gates of all test rows, mean over gate networks, shape ``(M, E)``; None without experts."""
        return None

    def n_titles(self, n_candidates: int) -> int:
        """Number of candidate titles to choose among; 0 for models other than title teachers.

        Args:
            n_candidates: The number requested; 0 for the model's own.
        """
        return 0

    def choose_titles(self, candidates: CandidateSampler, ks: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
        """Choose among candidate titles and generate one, if `n_titles` is not 0; a collective.

        Returns:
            Columns to store for each test row, shape ``(M, C)``, int64: the 0-based rank of the target and, if titles
            are generated, whether the title is valid and correct; and metrics with intervals, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} generates no titles")

    def milliseconds(self, k: int) -> float:
        """Median time to recommend ``k`` items to one user, on this machine."""
        device, seconds = self._engine.device, []
        with torch.inference_mode():
            for _ in range(_LATENCY_REPEATS + 5):  # the first few warm up
                start = time.perf_counter()
                self.recommend(k)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        return round(1000 * float(np.median(seconds[5:])), 4)


class _Sequential(FinishedModel):
    """A model that reads item ids and scores the whole catalogue at once."""

    @property
    @abstractmethod
    def _max_length(self) -> int:
        """Length of the longest history that the model reads."""

    @abstractmethod
    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        """Scores of all items for some test rows, shape ``(B, N)``."""

    @cached_property
    def _test(self) -> Rows:
        return Rows.of(self._data, "test", self._max_length)

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`."""
        costs = np.ones(len(self._test), np.int64)
        return rank_among_candidates(
            self._score, self._test.targets, candidates, self._engine, costs=costs, max_cost=_BATCH_ROWS
        )

    def recommend(self, k: int) -> None:
        """See `FinishedModel.recommend`."""
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
    """An ensemble; its members may read longer histories than the dataset's."""

    @cached_property
    def _model(self) -> Ensemble:
        return load_ensemble(self._folder / "ensemble", self._data, self._engine.device)

    @property
    def _max_length(self) -> int:
        return self._model.max_length

    @cached_property
    def _split(self) -> SplitRows:
        return SplitRows(self._data, "test", self._max_length)

    @cached_property
    def _test(self) -> Rows:
        return self._split.rows

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        return self._model.probabilities(self._split.batch(rows, self._engine.device))

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        return rank_ensemble_targets(self._model, self._split, self._engine, seen=seen, batch_rows=_BATCH_ROWS)
