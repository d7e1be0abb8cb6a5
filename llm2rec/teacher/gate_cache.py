"""Gate inputs of many rows, computed once and cached on disk.

They depend on their source (the frozen language model or a student), the prompts and the data, not on trained weights,
so all runs with the same three share them. Finished blocks are kept: a killed pass resumes at the next block.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.files import replaced_file
from llm2rec.core.logging import Progress
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.ilora_model import LLMTeacher

__all__ = ["GateCache", "TeacherRows"]

_VERSION = 2  # increase when the same model, prompts and rows give other gate inputs


@dataclass(frozen=True)
class TeacherRows:
    """Rows of a split with their gate inputs.

    Attributes:
        data: The split.
        rows: Row numbers in it, shape ``(M,)``.
        gate_inputs: Shape ``(M, d)``, float32, in the order of ``rows``; d is 0 without experts.
        token_counts: Tokens of each row's prompt, slots of injected vectors included, shape ``(M,)``.
    """

    data: Rows
    rows: NDArray[np.int64]
    gate_inputs: NDArray[np.float32]
    token_counts: NDArray[np.int64]


class GateCache:
    """Reads gate inputs from disk, or computes and stores them.

    Args:
        model: Unwrapped teacher.
        identity: `TeacherRecipe.identity`: language model, prompt and number format.
        engine: Splits blocks among processes.
        folder: Folder of the caches.
        block_rows: Rows per file.
        batch_tokens: Tokens per forward pass, padding included.
    """

    def __init__(
        self,
        model: LLMTeacher,
        identity: str,
        engine: Engine,
        folder: Path,
        *,
        block_rows: int = 2048,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.identity, self.engine, self.folder = model, identity, engine, folder
        self.block_rows, self.batch_tokens = block_rows, batch_tokens

    def rows(self, data: Rows, rows: NDArray[np.int64]) -> TeacherRows:
        """Add gate inputs to ``rows`` (shape ``(M,)``) of a split; a collective."""
        history, lengths = data.histories(rows)
        token_counts = self.model.token_counts(history, lengths)
        if self.model.tuner is None:  # no gate, nothing to compute
            return TeacherRows(data, rows, np.empty((len(rows), 0), np.float32), token_counts)
        # The prompts' own identity: the same item ids may have other titles.
        model = f"{self.identity}/{self.model.prompts.identity}"
        digest = hashlib.sha256(f"{_VERSION}/{model}/{self.block_rows}{_source_of(self.model)}".encode())
        digest.update(history.tobytes())
        digest.update(lengths.tobytes())
        folder = self.folder / digest.hexdigest()[:16]
        files = [folder / f"block_{number:06d}.npy" for number in range(-(-len(rows) // self.block_rows))]
        mine = self.engine.my_missing(files)
        parts = {number: slice(number * self.block_rows, (number + 1) * self.block_rows) for number in mine}
        with self.engine.rows_progress("gate inputs", sum(len(history[part]) for part in parts.values())) as progress:
            for number, part in parts.items():
                vectors = _compute(self.model, history[part], lengths[part], self.batch_tokens, progress)
                with replaced_file(files[number]) as aside, open(aside, "wb") as file:
                    np.save(file, vectors, allow_pickle=False)
        self.engine.wait()
        inputs = np.concatenate([np.load(file, allow_pickle=False) for file in files])
        return TeacherRows(data, rows, inputs, token_counts)


def _source_of(model: LLMTeacher) -> str:
    """The trained recommender that the gate reads; empty for the language model."""
    if model.gate_input != "sequence":
        return ""
    assert model.recommender is not None, "the factory loads the recommender"
    return f"/sequence/{model.recommender.identity}"


def _compute(
    model: LLMTeacher,
    history: NDArray[np.int32],
    lengths: NDArray[np.int32],
    batch_tokens: int,
    progress: Progress,
) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] | None = None
    counts = model.prompts.token_counts(history, lengths)
    for rows in batches_by_cost(counts, batch_tokens):
        computed = model.gate_inputs(history[rows], lengths[rows]).cpu().numpy()
        vectors = np.empty((len(history), computed.shape[1]), np.float32) if vectors is None else vectors
        vectors[rows] = computed
        progress.advance(len(rows), tokens=int(counts[rows].sum()))
    assert vectors is not None, "a block holds at least one row"
    return vectors
