"""Write down what the teacher knows, in DLLM2Rec's layout (DESIGN 4.3).

all_embeddings.pt      tensor (N, d_teacher), row = item id
myrank_train.txt       (training rows, K) item ids, best first
confidence_train.txt   (training rows, K), their scores
*.npy                  memory-mapped twins of the two text files
manifest.json          what the scores are, shapes, fingerprint, hashes

Where only some training rows are labelled, the tables hold a line for each of these alone, and

rows.npy               (labelled rows,) their numbers, int64, ascending
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llm2rec.core.files import read_json, replaced_folder, sha256_of_file, write_json
from llm2rec.core.processes import is_first_process
from llm2rec.core.run import Run
from llm2rec.teacher.settings import ExportSettings

__all__ = ["rows_to_label", "tell_labelling", "write_outputs"]

logger = logging.getLogger(__name__)


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
    """Put the blocks together and write the teacher outputs; for one process.

    Args:
        folder: ``data/teacher_outputs/<dataset>/<name>``; replaced as a whole.
        blocks: What `llm2rec.teacher.export.rank_blocks` returned, or files like it.
        item_vectors: Shape ``(N, d_teacher)``.
        settings: What the confidences are.
        about: What the manifest says besides shapes and hashes: dataset, fingerprint, teacher, commit.
        by_distance: Whether the scores are negative distances; the confidences are then distances.
        labelled: Numbers of the training rows that were ranked, ascending; None if all were.
    """
    kind = "distance" if by_distance else settings.confidence
    with replaced_folder(folder) as aside:
        torch.save(item_vectors.detach().cpu().contiguous(), aside / "all_embeddings.pt")
        if labelled is not None:
            np.save(aside / "rows.npy", labelled)
        n_rows, top_k = _write_table(aside / "myrank_train", "%d", (load_file(each)["items"] for each in blocks))
        confidences = (_as_confidence(load_file(each)["log_probs"], kind) for each in blocks)
        _write_table(aside / "confidence_train", "%.9g", confidences)  # 9 digits give every float32 back
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
    """Write a table as text and as its memory-mapped twin, block by block, so that no more than one is in memory.

    Returns:
        Its shape.
    """
    n_rows, top_k = 0, 0
    with open(f"{stem}.txt", "w", encoding="latin1") as text, open(f"{stem}.npy", "wb") as twin:
        for block in blocks:
            if not n_rows:  # the number of rows comes last; the header has room for it
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
    """The training rows that a selection policy wants labelled, ascending; asked before anything is trained.

    Whoever has given a budget that bounds what is distilled and not what is labelled is told so.

    Args:
        policy: An `llm2rec.distill.selection_policy.SelectionPolicy`; distillation lies above the teacher.
        run: Keeps what a policy of one's own is written in.
        n_rows: Training rows, all of which are labelled where the policy chooses among whatever is.

    Raises:
        ConfigError: If the policy's answer cannot be used.
        CheckpointError: If the run was begun with another source of the policy.
    """
    asked: NDArray[np.int64] | None = policy.checked_rows_to_label(n_rows)
    run.keep(selection_source=policy.source())
    if asked is None and 0 < (most := policy.most_chosen(n_rows)) < n_rows and is_first_process():
        logger.warning(
            "%s distils at most %d rows and chooses them among labelled ones: all %d are labelled. `active.pool=PART` "
            "has that part of them labelled and chosen among",
            type(policy).__name__,
            most,
            n_rows,
        )
    return np.arange(n_rows) if asked is None else asked


def tell_labelling(run: Run, phases: Sequence[str], n_labelled: int, n_rows: int) -> None:
    """Tell and write down what labelling took, and about how much a budget has saved; for one process.

    Seconds are those of all attempts of this run. Gate inputs that an earlier run has left on disk cost none, so that
    the saving is rather told too small.

    Args:
        run: The run.
        phases: Those of its phases that were spent on labels.
        n_labelled: Rows labelled.
        n_rows: Training rows.
    """
    seconds = read_json(run.folder / "metrics" / "time.json")
    spent = sum(seconds[phase] for phase in phases)
    saved = spent / n_labelled * (n_rows - n_labelled)
    if n_labelled < n_rows:
        told = "labelled %d of %d rows in %.1f s; the others would have taken about %.1f s"
        logger.info(told, n_labelled, n_rows, spent, saved)
    figures = {"train_rows": n_rows, "labelled": n_labelled, "seconds": spent, "seconds_saved": round(saved, 3)}
    run.write_metrics("labelling", figures)
