"""Finished LLM teachers as members of an ensemble: their best items for each row, stored or computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from llm2rec.core.errors import DataError
from llm2rec.core.files import read_object
from llm2rec.core.logging import quiet_libraries
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.distill.data_bridge import TeacherOutputs, read_outputs
from llm2rec.ensemble.batch import EnsembleBatch
from llm2rec.ensemble.members import Member
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.outputs import rank_blocks
from llm2rec.teacher.settings import ExportSettings

if TYPE_CHECKING:  # PEFT and transformers take seconds to import, and teachers are rarely members
    from llm2rec.teacher.factory import TeacherRecipe
    from llm2rec.teacher.ilora_model import LLMTeacher

__all__ = ["LLMTeacherMember", "Ranked", "exported_ranking", "lazily_loaded", "rank_rows_of", "ranked_training_rows"]

_BATCH_TOKENS = 8192
Loader = Callable[[], "tuple[LLMTeacher, TeacherRecipe]"]


@dataclass(frozen=True)
class Ranked:
    """The best items of some rows of a split.

    Attributes:
        rows: Row numbers, ascending, shape ``(M,)``.
        items: Item ids, best first, shape ``(M, K)``, int32.
        scores: Their log-probabilities, or negative distances, shape ``(M, K)``, float32.
    """

    rows: NDArray[np.int64]
    items: NDArray[np.int32]
    scores: NDArray[np.float32]

    def at(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Items, int64, and scores of some of the rows, both ``(B, K)``."""
        places = np.searchsorted(self.rows, rows)
        return torch.from_numpy(self.items[places].astype(np.int64)), torch.from_numpy(self.scores[places])


class LLMTeacherMember(Member):
    """A finished LLM teacher: the scores of its best K items, which exclude all others.

    Args:
        load: Loads the teacher and its recipe; called when a row is not in ``ranked``, or for item vectors.
        about: Its run and label, and ``top_k``, K.
        n_parameters: Its parameters, those of the language model included.
        history_length: Items of the dataset's histories.
        ranked: Rankings by split; other splits are computed.
    """

    kind = "teacher"

    def __init__(
        self,
        load: Loader,
        about: Mapping[str, Any],
        n_parameters: int,
        history_length: int,
        ranked: Mapping[str, Ranked] | None = None,
    ) -> None:
        super().__init__(f"teacher {about['run']}", about, history_length, n_parameters)
        self.load, self._ranked = load, dict(ranked or {})

    @cached_property
    def _model(self) -> "LLMTeacher":
        return self.load()[0]

    @property
    def item_vectors(self) -> Tensor:
        """The teacher's item vectors."""
        return self._model.item_vectors.detach()

    def add(self, split: str, ranked: Ranked) -> None:
        """Use a ranking for rows of a split instead of the model."""
        self._ranked[split] = ranked

    def has(self, split: str) -> bool:
        """Whether there is a ranking for rows of a split."""
        return split in self._ranked

    def scores(self, batch: EnsembleBatch) -> Tensor:
        """See `Member.scores`."""
        ranked = self._ranked.get(batch.split)
        items, values = self._compute(batch) if ranked is None else ranked.at(batch.rows)
        scores = torch.full((len(batch.rows), batch.n_items), -torch.inf, device=batch.history.device)
        return scores.scatter_(1, items.to(scores.device), values.to(scores.device))

    def _compute(self, batch: EnsembleBatch) -> tuple[Tensor, Tensor]:
        history, lengths = (each.cpu().numpy().astype(np.int32) for each in batch.recent(self.max_length))
        k = int(self.about["top_k"])
        items, values = torch.empty(len(lengths), k, dtype=torch.int64), torch.empty(len(lengths), k)
        counts = self._model.ranking_token_counts(history, lengths, k)
        for part in batches_by_cost(counts, _BATCH_TOKENS):
            best, scores = self._model.best_items(history[part], lengths[part], k)
            items[torch.from_numpy(part)], values[torch.from_numpy(part)] = best.cpu(), scores.float().cpu()
        return items, values


def lazily_loaded(folder: Path, data: RecData, device: torch.device) -> Loader:
    """Loads the teacher in a folder at the first call, once."""
    found: list[tuple[LLMTeacher, TeacherRecipe]] = []

    def load() -> "tuple[LLMTeacher, TeacherRecipe]":
        if not found:
            from llm2rec.teacher.store import load_teacher

            quiet_libraries()
            found.append(load_teacher(folder, data, device))
        return found[0]

    return load


def rank_rows_of(
    load: Loader,
    data: RecData,
    split: str,
    rows: NDArray[np.int64],
    k: int,
    engine: Engine,
    folder: Path,
    gate_dir: Path,
) -> Ranked:
    """Rank rows of a split with a teacher, in blocks that are kept for resuming; a collective.

    Args:
        load: Loads the teacher.
        data: The dataset.
        split: Name of the split.
        rows: Row numbers, ascending, shape ``(M,)``.
        k: Items per row.
        engine: Splits the blocks among processes.
        folder: Folder of the blocks.
        gate_dir: Folder of cached gate inputs.
    """
    from llm2rec.teacher.gate_cache import GateCache

    model, recipe = load()
    settings = ExportSettings(top_k=k, batch_tokens=_BATCH_TOKENS)
    cache = GateCache(model, recipe.identity, engine, gate_dir)
    files = rank_blocks(model, cache.rows(Rows.of(data, split), rows), engine, folder, settings)
    blocks = [load_file(file) for file in files]
    return Ranked(rows, *(np.concatenate([block[name] for block in blocks]) for name in ("items", "log_probs")))


def exported_ranking(folder: Path, run: str, data: RecData) -> TeacherOutputs | None:
    """The teacher outputs in a folder if they are those of a run and cover all training rows; else None.

    Raises:
        TeacherOutputsError: If they are that run's and damaged.
    """
    try:
        manifest = read_object(folder / "manifest.json", "run", "top_k")
    except DataError:
        return None
    if manifest["run"] != run:
        return None
    outputs = read_outputs(
        folder,
        n_rows=len(data.splits["train"]),
        n_items=data.n_items,
        fingerprint=data.fingerprint,
        top_k=int(manifest["top_k"]),
    )
    return outputs if outputs.labelled is None else None


def ranked_training_rows(outputs: TeacherOutputs, k: int) -> Ranked:
    """The best ``k`` items of all training rows by exported outputs, which stay memory-mapped."""
    return Ranked(np.arange(len(outputs.ranking)), outputs.ranking[:, :k], -outputs.distance[:, :k])
