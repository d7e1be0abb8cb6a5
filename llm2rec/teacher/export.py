"""Rank the catalogue for training rows with the teacher, block by block: what `llm2rec.teacher.outputs` writes down."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llm2rec.core.files import replaced_file
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.ilora_model import LLMTeacher
from llm2rec.teacher.settings import ExportSettings

__all__ = ["rank_blocks"]


def rank_blocks(
    model: LLMTeacher, rows: TeacherRows, engine: Engine, folder: Path, settings: ExportSettings
) -> list[Path]:
    """Rank the catalogue for every row and keep the top K, block by block; a collective.

    Finished blocks are kept, so that a killed export goes on where it stopped. Blocks are divided among processes.

    Args:
        model: Unwrapped teacher, in evaluation mode.
        rows: Rows to label, M of them.
        engine: Divides the blocks.
        folder: Where blocks are written.
        settings: K and sizes.

    Returns:
        Files ``block_*.safetensors`` in row order, each with ``items`` (rows, K) int32 and ``log_probs`` (rows, K)
        float32, best first; negative distances, under that name too, of a teacher that ranks by distance.
    """
    size, n_rows = settings.block_rows, len(rows.rows)
    files = [folder / f"block_{number:06d}.safetensors" for number in range(-(-n_rows // size))]
    mine = engine.my_missing(files)
    for number in engine.progress(mine, "export", len(mine), "block"):
        block = slice(number * size, min((number + 1) * size, n_rows))
        items, log_probs = _rank(model, rows, block, engine, settings)
        with replaced_file(files[number]) as aside:
            save_file({"items": items, "log_probs": log_probs}, aside)
    engine.wait()
    return files


def _rank(
    model: LLMTeacher, rows: TeacherRows, block: slice, engine: Engine, settings: ExportSettings
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    numbers, gate_inputs = rows.rows[block], rows.gate_inputs[block]
    history, lengths = rows.data.histories(numbers)
    k = min(settings.top_k, rows.data.n_items)
    items, log_probs = np.empty((len(numbers), k), np.int32), np.empty((len(numbers), k), np.float32)
    counts = model.ranking_token_counts(history, lengths, k)
    with torch.inference_mode():
        for part in batches_by_cost(counts, settings.batch_tokens):
            gates = torch.from_numpy(gate_inputs[part]).to(engine.device)
            best, scores = model.best_items(history[part], lengths[part], k, gates)
            items[part], log_probs[part] = best.cpu().numpy(), scores.cpu().numpy()
    return items, log_probs
