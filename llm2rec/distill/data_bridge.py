"""Read teacher outputs (DESIGN 4.3) and validate them against the dataset.

Files without a manifest, such as those of the released DLLM2Rec program, are read as distances. A teacher with a budget
labels a subset of the rows: its tables have one line per labelled row, and ``rows.npy`` lists the row numbers. The
released program does not support ``rows.npy``; its tables have one line per training row.
"""

import logging
import math
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import DataError, TeacherOutputsError
from llm2rec.core.files import read_object, sha256_of_file

__all__ = ["TeacherBatch", "TeacherOutputs", "outputs_hash", "read_outputs"]

logger = logging.getLogger(__name__)

# Valid range of each kind of confidence; `_SLACK` allows for rounding of sums to 1.
_SLACK = 1e-3
_RANGES = {
    "neg_log_prob": ("0 or more", -_SLACK, math.inf),
    "log_prob": ("0 or less", -math.inf, _SLACK),
    "prob": ("above 0 and up to 1", 0.0, 1 + _SLACK),
}
_BLOCK_ROWS = 65536
EMBEDDINGS, RANKING, CONFIDENCE, ROWS = "all_embeddings.pt", "myrank_train", "confidence_train", "rows.npy"


@dataclass(frozen=True)
class TeacherBatch:
    """The teacher's outputs for some training rows.

    Attributes:
        ranking: Item ids, best first, shape ``(B, K)``, int64.
        distance: Lower means more confident, shape ``(B, K)``, float32.
        target_distance: Distance of each row's target, shape ``(B,)``, float32; the distance of the last stored item if
            the target is not stored. None unless ``targets`` was given.
    """

    ranking: Tensor
    distance: Tensor
    target_distance: Tensor | None = None

    def first(self, top_k: int) -> "TeacherBatch":
        """Keep the best ``top_k`` candidates only."""
        return replace(self, ranking=self.ranking[:, :top_k], distance=self.distance[:, :top_k])


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs, row by row of the training split.

    Attributes:
        embeddings: Item vectors, shape ``(N, d_teacher)``, float32.
        ranking: Item ids, best first, shape ``(M, K)``, int32; memory-mapped if the ``.npy`` file exists.
        distance: Lower means more confident, shape ``(M, K)``, float32.
        manifest: Content of the manifest; empty without one.
        labelled: Training rows of the lines of ``ranking`` and ``distance``, ascending; None if they cover all rows.
    """

    embeddings: Tensor
    ranking: NDArray[np.int32]
    distance: NDArray[np.float32]
    manifest: dict[str, Any]
    labelled: NDArray[np.int64] | None = None

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """Records of the text encoders whose vectors of titles, side by side, are the embeddings.

        Empty if any of the embeddings is something else than the vector of a title.
        """
        parts = self.manifest.get("vectors")
        parts = [each if isinstance(each, dict) else {} for each in (parts if isinstance(parts, list) else [])]
        read = all(each.get("kind") == "titles" and isinstance(each.get("text"), dict) for each in parts)
        return [each["text"] for each in parts] if read else []

    def rows_labelled(self, n_rows: int) -> NDArray[np.int64]:
        """Numbers of the labelled rows among ``n_rows`` training rows, ascending."""
        return np.arange(n_rows) if self.labelled is None else self.labelled

    def batch(
        self,
        rows: NDArray[np.int64],
        top_k: int,
        device: torch.device | str = "cpu",
        targets: NDArray[np.int64] | None = None,
    ) -> TeacherBatch:
        """Gather the best ``top_k`` candidates of ``rows``, and the distances of ``targets``; both ``(B,)``.

        Unlabelled rows get the outputs of another row; their weight must be 0.
        """
        if self.labelled is not None:
            rows = np.searchsorted(self.labelled, rows).clip(max=len(self.labelled) - 1)
        batch = TeacherBatch(
            torch.from_numpy(self.ranking[rows, :top_k].astype(np.int64)).to(device),
            torch.from_numpy(np.ascontiguousarray(self.distance[rows, :top_k])).to(device),
        )
        if targets is None:
            return batch
        is_target = self.ranking[rows] == targets[:, None]  # (B, all stored)
        place = np.where(is_target.any(axis=1), is_target.argmax(axis=1), -1)
        return replace(batch, target_distance=torch.from_numpy(self.distance[rows, place]).to(device))


def read_outputs(folder: Path, *, n_rows: int, n_items: int, fingerprint: str, top_k: int) -> TeacherOutputs:
    """Read and check a teacher's outputs before anything expensive starts.

    Args:
        folder: ``data/teacher_outputs/<dataset>/<name>``.
        n_rows: Training rows of the dataset, M.
        n_items: Items of the dataset, N.
        fingerprint: The dataset's fingerprint.
        top_k: Candidates needed per row.

    Returns:
        The outputs; confidences of any kind are converted to distances.

    Raises:
        TeacherOutputsError: If files are missing, damaged, of another dataset, or have fewer than ``top_k`` candidates.
    """
    if not folder.is_dir():
        raise TeacherOutputsError(
            f"no teacher outputs in {folder}; run `python -m llm2rec.teacher` with the same dataset, llm and teacher "
            "first (for an ensemble `python -m llm2rec.ensemble`), or set `distill.teacher_outputs=FOLDER`."
        )
    manifest = _manifest(folder, fingerprint)
    ranking = _table(folder, RANKING, manifest, np.int32)
    confidence = _table(folder, CONFIDENCE, manifest, np.float32)
    embeddings = _embeddings(folder, n_items)
    if ranking.shape != confidence.shape:
        raise _invalid(folder, f"{RANKING} has shape {ranking.shape} but {CONFIDENCE} has {confidence.shape}")
    labelled = _labelled(folder, manifest, n_rows)
    n_labelled = n_rows if labelled is None else len(labelled)
    if len(ranking) != n_labelled:
        expected = f"the training split has {n_rows}" if labelled is None else f"{ROWS} lists {n_labelled}"
        raise _invalid(folder, f"they have {len(ranking)} rows, but {expected}")
    if ranking.shape[1] < top_k:
        raise _invalid(
            folder, f"they have {ranking.shape[1]} candidates per row, but `distill.ranking.top_k` is {top_k}; "
            "lower it or export more with `teacher.export.top_k` or `ensemble.top_k`"
        )  # fmt: skip
    sizes = {
        "rows": len(ranking), "top_k": ranking.shape[1], "n_items": len(embeddings), "width": embeddings.shape[1]
    }  # fmt: skip
    for name, value in sizes.items():
        if manifest.get(name, value) != value:
            raise _invalid(folder, f"`{name}` in manifest.json is {manifest[name]}, but the files have {value}")
    if manifest.get("train_rows", n_rows) != n_rows:
        raise _invalid(
            folder, f"`train_rows` in manifest.json is {manifest['train_rows']}, but the training split has {n_rows}"
        )
    _check_items(folder, ranking, n_items)
    if not np.isfinite(confidence).all():
        row = int(np.argmax(~np.isfinite(confidence).all(axis=1)))
        raise _invalid(folder, f"line {row + 1} of {CONFIDENCE} is not finite: {confidence[row].tolist()}")
    _check_repeated(folder, ranking)
    kind = manifest.get("confidence", "distance")
    distance = _as_distance(confidence, kind, folder)
    _check_direction(folder, distance, kind, has_kind="confidence" in manifest)
    return TeacherOutputs(embeddings, ranking, distance, manifest, labelled)


def outputs_hash(folder: Path) -> str:
    """Hash of a teacher's outputs: SHA-256 of the manifest, or of the hashes of the files if there is no manifest."""
    if (manifest := folder / "manifest.json").is_file():
        return sha256_of_file(manifest)
    files = (folder / name for name in (EMBEDDINGS, f"{RANKING}.txt", f"{CONFIDENCE}.txt"))
    return sha256("".join(sha256_of_file(file) for file in files if file.is_file()).encode()).hexdigest()


def _invalid(folder: Path, why: str) -> TeacherOutputsError:
    return TeacherOutputsError(
        f"invalid teacher outputs in {folder}: {why}. Export them again with `python -m llm2rec.teacher` or "
        "`llm2rec.ensemble`, or set `distill.teacher_outputs=FOLDER`."
    )


def _check_items(folder: Path, ranking: NDArray[np.int32], n_items: int) -> None:
    """Reject items that the catalogue does not have."""
    lowest, highest = int(ranking.min()), int(ranking.max())
    if lowest < 0 or highest >= n_items:
        row = int(np.argmax(((ranking < 0) | (ranking >= n_items)).any(axis=1)))
        raise _invalid(
            folder, f"line {row + 1} of {RANKING} has an item outside 0..{n_items - 1} ({lowest}..{highest})"
        )


def _check_repeated(folder: Path, ranking: NDArray[np.int32]) -> None:
    """Reject rows with repeated items; works in blocks, since the table may be larger than memory."""
    for start in range(0, len(ranking), _BLOCK_ROWS):
        ordered = np.sort(ranking[start : start + _BLOCK_ROWS], axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if repeated.any():
            raise _invalid(folder, f"line {start + int(np.argmax(repeated)) + 1} of {RANKING} has an item twice")


def _check_direction(folder: Path, distance: NDArray[np.float32], kind: str, has_kind: bool) -> None:
    """Reject confidences whose sign contradicts the order of the candidates."""
    first, last = (float(distance[:, place].mean(dtype=np.float64)) for place in (0, -1))
    if last < first:
        source = f"declares kind {kind!r} for" if has_kind else "is missing, so distances are assumed for"
        raise _invalid(
            folder, f"manifest.json {source} {CONFIDENCE}, but the mean distance falls from {first:.3g} for the best "
            f"candidate to {last:.3g} for the last; negate scores, or declare their kind in `confidence`"
        )  # fmt: skip


def _manifest(folder: Path, fingerprint: str) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        logger.warning("%s has no manifest.json: assuming distances, and rows in the order of the split", folder)
        return {}
    try:
        manifest = read_object(path)
    except DataError as error:
        raise _invalid(folder, str(error).rstrip(".")) from error
    if manifest.get("fingerprint") != fingerprint:
        raise _invalid(
            folder, f"they belong to dataset {manifest.get('dataset')!r} with fingerprint "
            f"{str(manifest.get('fingerprint'))[:12]}, expected {fingerprint[:12]}"
        )  # fmt: skip
    if "confidence" not in manifest:
        raise _invalid(folder, "manifest.json lacks `confidence`, the kind of the confidences")
    _check_hashes(folder, manifest)
    return manifest


def _check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare the files with the hashes in the manifest."""
    hashes = manifest.setdefault("sha256", {})
    if not isinstance(hashes, dict) or any(Path(name).name != name for name in hashes):
        raise _invalid(folder, f"`sha256` in manifest.json is {hashes!r}, expected hashes of files of that folder")
    for name in (EMBEDDINGS, f"{RANKING}.txt", f"{CONFIDENCE}.txt"):
        if name not in hashes and (folder / name).is_file():
            raise _invalid(folder, f"`sha256` in manifest.json lacks {name}")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise _invalid(folder, f"{name} is missing, but the manifest lists it")
        if sha256_of_file(folder / name) != expected:
            raise _invalid(folder, f"{name} has changed since it was written (its hash differs from the manifest)")


def _labelled(folder: Path, manifest: dict[str, Any], n_rows: int) -> NDArray[np.int64] | None:
    """Labelled rows, or None if all rows are labelled."""
    if ROWS not in manifest.get("sha256", {}):
        return None
    try:
        rows = np.load(folder / ROWS, allow_pickle=False)
    except ValueError as error:
        raise _invalid(folder, f"{ROWS} is damaged ({error})") from error
    if rows.ndim != 1 or rows.dtype != np.int64 or not len(rows) or (np.diff(rows) <= 0).any():
        raise _invalid(folder, f"{ROWS} is not an ascending list of row numbers")
    if rows[0] < 0 or rows[-1] >= n_rows:
        raise _invalid(folder, f"{ROWS} lists rows {rows[0]} to {rows[-1]}, but the training split has {n_rows}")
    return rows


def _embeddings(folder: Path, n_items: int) -> Tensor:
    path = folder / EMBEDDINGS
    if not path.is_file():
        raise _invalid(folder, f"{EMBEDDINGS} is missing")
    try:
        embeddings = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises about ten classes for damaged files
        # torch's message recommends unpickling the file, which is unsafe; it is left out.
        raise _invalid(folder, f"{EMBEDDINGS} is damaged, or not a tensor saved by torch.save") from error
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or len(embeddings) != n_items:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise _invalid(folder, f"{EMBEDDINGS} is {shape}, expected ({n_items}, width)")
    if embeddings.layout != torch.strided or embeddings.is_quantized:
        raise _invalid(folder, f"{EMBEDDINGS} is a sparse or quantized tensor, expected a dense one")
    if not embeddings.is_floating_point() or embeddings.shape[1] == 0:
        raise _invalid(
            folder, f"{EMBEDDINGS} is {tuple(embeddings.shape)} of {embeddings.dtype}, expected floating point"
        )
    embeddings = embeddings.detach().float()  # a saved nn.Parameter requires a gradient
    if not bool(torch.isfinite(embeddings).all()):
        raise _invalid(folder, f"{EMBEDDINGS} has values that are not finite, or too large for float32")
    return embeddings


def _table(folder: Path, name: str, manifest: dict[str, Any], dtype: type) -> NDArray[Any]:
    """Read the memory-mapped ``.npy`` file if the manifest lists it, else the text file."""
    twin, text = folder / f"{name}.npy", folder / f"{name}.txt"
    if twin.name in manifest.get("sha256", {}):
        try:
            mapped = np.load(twin, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise _invalid(folder, f"{twin.name} is damaged ({error})") from error
        if mapped.ndim != 2 or mapped.dtype != dtype:
            expected = f"(rows, K) of {np.dtype(dtype)}"
            raise _invalid(folder, f"{twin.name} is {mapped.shape} of {mapped.dtype}, expected {expected}")
        return mapped
    if not text.is_file():
        raise _invalid(folder, f"{text.name} is missing")
    try:
        table = pd.read_csv(text, sep=r"\s+", header=None, dtype=np.float64, skip_blank_lines=False)
    except (ValueError, OverflowError, IndexError, TypeError) as error:  # a ParserError is a ValueError
        problem = _first_bad_line(text) or f"{text.name} is not a table of numbers ({str(error).strip()})"
        raise _invalid(folder, problem) from error
    values = table.to_numpy()
    if np.isnan(values).any() and (bad := _first_bad_line(text)):
        raise _invalid(folder, bad)
    is_id = (values == np.round(values)) & (np.abs(values) < 2**31)
    if dtype is np.int32 and not is_id.all():
        line = int(np.argmax(~is_id.all(axis=1))) + 1
        raise _invalid(folder, f"line {line} of {text.name} has a number that is not an item id")
    return values.astype(dtype)


def _first_bad_line(text: Path) -> str | None:
    """Describe the first line whose length differs from line 1 or that has a value which is not a number."""
    expected = None
    with open(text, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            values = line.split()
            expected = len(values) if expected is None else expected
            if len(values) != expected:
                return f"line {number} of {text.name} has {len(values)} values and line 1 has {expected}"
            for place, value in enumerate(values, start=1):
                try:
                    is_nan = math.isnan(float(value))
                except ValueError:
                    return f"value {place} in line {number} of {text.name} is {value[:40]!r}, expected a number"
                if is_nan:
                    return f"value {place} in line {number} of {text.name} is NaN, expected a number"
    return None if expected else f"{text.name} is empty"


def _as_distance(confidence: NDArray[np.float32], kind: str, folder: Path) -> NDArray[np.float32]:
    """Convert confidences to distances, where lower means more confident."""
    if kind == "distance":
        return confidence
    if kind not in _RANGES:
        raise _invalid(folder, f"unknown kind of confidence {kind!r}; expected distance, {', '.join(_RANGES)}")
    what, low, high = _RANGES[kind]
    lowest, highest = float(confidence.min()), float(confidence.max())
    if lowest < low or highest > high or (kind == "prob" and lowest == 0):
        raise _invalid(
            folder, f"manifest.json declares kind {kind!r} for {CONFIDENCE}, expected {what}, but its numbers lie "
            f"within {lowest:.6g} and {highest:.6g}"
        )  # fmt: skip
    if kind == "prob":
        return -np.log(confidence)
    return -confidence if kind == "log_prob" else confidence
