"""Teachers of the `item` objective on the test split. Other runs need none of the libraries of language models."""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.evaluate.scoring.candidates import rank_among_candidates
from llm2rec.evaluate.scoring.finished import FinishedModel
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.evaluator import rank_targets
from llm2rec.teacher.factory import TeacherRecipe, load_teacher
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher

__all__ = ["FinishedTeacher", "gates_of_rows"]

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


class FinishedTeacher(FinishedModel):
    """A teacher of the `item` objective, which scores the whole catalogue."""

    @cached_property
    def _loaded(self) -> tuple[LLMTeacher, TeacherRecipe]:
        return load_teacher(self._folder / "teacher", self._data, self._engine.device)

    @cached_property
    def _test(self) -> Rows:
        return Rows.of(self._data, "test")

    @cached_property
    def _rows(self) -> TeacherRows:
        """The test rows with what the gate reads; a collective."""
        model, recipe = self._loaded
        cache = GateCache(model, recipe.identity, self._engine, self._gate_dir)
        return cache.rows(self._test, np.arange(len(self._test)))

    def _score(self, rows: NDArray[np.int64]) -> Tensor:
        """Scores of all items; a target stays in the running where the history, which is not, shows it."""
        return self._loaded[0].log_probs(*self._test.histories(rows), self._test.targets.numpy()[rows])

    def ranks(self, seen: SeenItems | None, k: int) -> Tensor:
        """See `FinishedModel.ranks`."""
        model, _ = self._loaded
        assert isinstance(model, ItemTeacher), "other objectives are measured elsewhere"
        return rank_targets(model, self._rows, self._engine, seen=seen, batch_tokens=_BATCH_TOKENS)

    def gates(self) -> Tensor | None:
        """See `FinishedModel.gates`."""
        model, _ = self._loaded
        return None if model.tuner is None else gates_of_rows(model, self._rows, self._engine.device)

    def candidate_ranks(self, candidates: CandidateSampler) -> Tensor:
        """See `FinishedModel.candidate_ranks`; a pass of its own, which computes the gate inputs again."""
        costs = self._loaded[0].token_counts(*self._test.histories())
        return rank_among_candidates(
            self._score, self._test.targets, candidates, self._engine, costs=costs, max_cost=_BATCH_TOKENS
        )

    def answer(self, k: int) -> None:
        """See `FinishedModel.answer`."""
        self._score(np.zeros(1, np.int64)).topk(k)
