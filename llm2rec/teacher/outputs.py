"""Teacher outputs: rank the catalogue for training rows, and export the result in DLLM2Rec's layout (DESIGN 4.3).

all_embeddings.pt      tensor (N, d_teacher), row = item id
myrank_train.txt       (training rows, K) item ids, best first
confidence_train.txt   (training rows, K), their scores
*.npy                  memory-mapped twins of the two text files
manifest.json          kind of scores, shapes, fingerprint, hashes

If only some training rows are labelled, the tables have one line for each of these, and

rows.npy               (labelled rows,) their numbers, int64, ascending
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from llm2rec.core.files import read_json, replaced_file, replaced_folder, sha256_of_file, write_json
from llm2rec.core.logging import Progress, progress
from llm2rec.core.processes import is_first_process
from llm2rec.core.run import Run
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.teacher.settings import ExportSettings

if TYPE_CHECKING:  # ensembles write outputs too, without PEFT and transformers
    from llm2rec.teacher.gate_cache import TeacherRows
    from llm2rec.teacher.ilora_model import LLMTeacher

__all__ = ["log_labelling", "rank_blocks", "rows_to_label", "write_outputs"]

logger = logging.getLogger(__name__)


def rank_blocks(
    model: LLMTeacher, rows: TeacherRows, engine: Engine, folder: Path, settings: ExportSettings
) -> list[Path]:
    """Rank the catalogue for every row and save the top K, block by block; a collective.

    Finished blocks are kept, so a killed export resumes at the next one. Blocks are split among processes.

    Args:
        model: Unwrapped teacher, in evaluation mode.
        rows: Rows to label, M of them.
        engine: Splits the blocks among processes.
        folder: Folder for the blocks.
        settings: K and sizes.

    Returns:
        Files ``block_*.safetensors`` in row order, each with ``items`` (rows, K) int32 and ``log_probs`` (rows, K)
        float32, best first. A teacher that ranks by distance stores negative distances under ``log_probs``.
    """
    size, n_rows = settings.block_rows, len(rows.rows)
    files = [folder / f"block_{number:06d}.safetensors" for number in range(-(-n_rows // size))]
    mine = engine.my_missing(files)
    blocks = {number: slice(number * size, min((number + 1) * size, n_rows)) for number in mine}
    with engine.rows_progress("export", sum(block.stop - block.start for block in blocks.values())) as progress:
        for number, block in blocks.items():
            items, log_probs = _rank(model, rows, block, engine, settings, progress)
            with replaced_file(files[number]) as aside:
                save_file({"items": items, "log_probs": log_probs}, aside)
    engine.wait()
    return files


def _rank(
    model: LLMTeacher, rows: TeacherRows, block: slice, engine: Engine, settings: ExportSettings, progress: Progress
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
            progress.advance(len(part), tokens=int(counts[part].sum()))
    return items, log_probs


def write_outputs(
    folder: Path,
    blocks: list[Path],
    item_vectors: torch.Tensor,
    settings: ExportSettings,
    about: dict[str, Any],
    *,
    by_distance: bool = False,
    labelled: NDArray[np.int64] | None = None,
) -> None:
    """Combine the blocks and write the teacher outputs; on one process.

    Args:
        folder: ``data/teacher_outputs/<dataset>/<name>``; replaced atomically.
        blocks: Return value of `rank_blocks`, or files in the same format.
        item_vectors: Shape ``(N, d_teacher)``.
        settings: Kind of confidences.
        about: Manifest entries besides shapes and hashes: dataset, fingerprint, teacher, commit.
        by_distance: Whether the scores are negative distances; the confidences are then distances.
        labelled: Numbers of the training rows that were ranked, ascending; None if all were.
    """
    kind = "distance" if by_distance else settings.confidence
    with replaced_folder(folder) as aside:
        torch.save(item_vectors.detach().cpu().contiguous(), aside / "all_embeddings.pt")
        if labelled is not None:
            np.save(aside / "rows.npy", labelled)
        items = progress(blocks, "write candidates", len(blocks), "block")
        n_rows, top_k = _write_table(aside / "myrank_train", "%d", (load_file(each)["items"] for each in items))
        scores = progress(blocks, "write confidences", len(blocks), "block")
        confidences = (_as_confidence(load_file(each)["log_probs"], kind) for each in scores)
        _write_table(aside / "confidence_train", "%.9g", confidences)  # 9 digits are exact for float32
        manifest = {
            "format": 1,
            "confidence": kind,
            "top_k": top_k,
            "rows": n_rows,
            "n_items": len(item_vectors),
            "width": item_vectors.shape[1],
            **about,
            "sha256": {file.name: sha256_of_file(file) for file in sorted(aside.iterdir())},
        }
        write_json(aside / "manifest.json", manifest)
    logger.info("teacher outputs: %d rows x %d items in %s", n_rows, top_k, folder)


def _as_confidence(scores: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    if kind == "prob":
        return np.exp(scores)
    return scores if kind == "log_prob" else -scores


def _write_table(stem: Path, form: str, blocks: Iterable[NDArray[Any]]) -> tuple[int, int]:
    """Write a table as text and as its memory-mapped twin, holding one block in memory at a time.

    Returns:
        Its shape.
    """
    n_rows, top_k = 0, 0
    with open(f"{stem}.txt", "w", encoding="latin1") as text, open(f"{stem}.npy", "wb") as twin:
        for block in blocks:
            if not n_rows:  # the number of rows is written last; the header has room for it
                top_k, kind = block.shape[1], np.lib.format.dtype_to_descr(block.dtype)
                about = {"descr": kind, "fortran_order": False}
                np.lib.format.write_array_header_1_0(twin, about | {"shape": (0, top_k)})
            n_rows += len(block)
            np.savetxt(text, block, fmt=form)
            block.tofile(twin)
        twin.seek(0)
        np.lib.format.write_array_header_1_0(twin, about | {"shape": (n_rows, top_k)})
    return n_rows, top_k


def rows_to_label(policy: Any, run: Run, n_rows: int) -> NDArray[np.int64]:
    """Training rows that a selection policy needs labelled, ascending; computed before training.

    Warns if the policy's budget limits the distilled rows but not the labelled ones.

    Args:
        policy: An `llm2rec.distill.selection_policy.SelectionPolicy` (`Any`, since distillation imports the teacher).
        run: Records the policy's source code.
        n_rows: Number of training rows; all are labelled if the policy does not choose before labelling.

    Raises:
        ConfigError: If the policy returns invalid rows.
        CheckpointError: If the run was started with another source code of the policy.
    """
    rows: NDArray[np.int64] | None = policy.checked_rows_to_label(n_rows)
    run.keep(selection_source=policy.source())
    if rows is None and 0 < (most := policy.most_chosen(n_rows)) < n_rows and is_first_process():
        logger.warning(
            "%s distils at most %d rows and chooses them among labelled ones: all %d are labelled. "
            "`active.pool=FRACTION` labels only that fraction and chooses from it",
            type(policy).__name__,
            most,
            n_rows,
        )
    return np.arange(n_rows) if rows is None else rows


def log_labelling(run: Run, phases: Sequence[str], n_labelled: int, n_rows: int) -> None:
    """Log and save the time of labelling and an estimate of the time saved by a budget; on one process.

    Seconds include all attempts of this run. Cached gate inputs of earlier runs take no time, so the estimate of the
    saving is a lower bound.

    Args:
        run: The run.
        phases: Its phases that belong to labelling.
        n_labelled: Rows labelled.
        n_rows: Training rows.
    """
    seconds = read_json(run.folder / "metrics" / "time.json")
    spent = sum(seconds[phase] for phase in phases)
    saved = spent / n_labelled * (n_rows - n_labelled)
    if n_labelled < n_rows:
        message = "labelled %d of %d rows in %.1f s; the others would have taken about %.1f s"
        logger.info(message, n_labelled, n_rows, spent, saved)
    figures = {"train_rows": n_rows, "labelled": n_labelled, "seconds": spent, "seconds_saved": round(saved, 3)}
    run.write_metrics("labelling", figures)
