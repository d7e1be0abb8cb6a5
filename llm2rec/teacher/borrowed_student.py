"""A trained sequential recommender inside a teacher: its user and item vectors, and its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import read_json
from llm2rec.core.run import described, read_record
from llm2rec.student.models import SequentialRecommender, load_student
from llm2rec.student.store import save_student

__all__ = ["BorrowedStudent", "open_recommender"]

_FOLDER = "recommender"


class BorrowedStudent:
    """A trained SASRec, GRU4Rec or Caser, frozen.

    It is not a submodule of the teacher, so it is not trained, cast or put into training mode with it.

    Args:
        student: The student, on its device.
        config: Its configuration from `save_student`: ``model``, its name, and ``arguments``.

    Attributes:
        name: Name of the student's model, such as ``sasrec``.
        width: Width D of its user and item vectors.
        n_parameters: Number of its parameters.
        identity: Hash of its weights and configuration.
    """

    def __init__(self, student: SequentialRecommender, config: dict[str, Any]) -> None:
        self._student, self._config = student.eval().requires_grad_(False), config
        self.name, self.width = str(config["model"]), student.width
        weights = {name: tensor.cpu().contiguous() for name, tensor in student.weights_to_serve().items()}
        self.n_parameters = sum(tensor.numel() for tensor in weights.values())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].numpy().tobytes())
        self.identity = digest.hexdigest()

    @torch.no_grad()
    def users(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """User vectors, from the most recent items that the student reads.

        Args:
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right with N.
            lengths: Items per history, shape ``(B,)``, at least 1.

        Returns:
            Shape ``(B, D)``, float32, on the student's device.
        """
        device = next(self._student.parameters()).device
        items, kept = _most_recent(history, lengths, self._student.max_length, self._student.n_items)
        shown, counts = (torch.from_numpy(each).to(device, torch.int64) for each in (items, kept))
        return self._student(shown, counts).float()

    @torch.no_grad()
    def read_items(self) -> Tensor:
        """Its input item vectors, shape ``(N, D)``, float32."""
        return self._student.input_items.vectors().detach().float().clone()

    @torch.no_grad()
    def scored_items(self) -> Tensor:
        """Its output item vectors, shape ``(N, D)``, float32; equal to `read_items` for tied tables."""
        return self._student.output_items.vectors().detach().float().clone()

    def save(self, folder: Path) -> None:
        """Save it into a teacher's ``folder``, which then no longer needs the student's run."""
        save_student(folder / _FOLDER, self._student, self.name, self._config["arguments"])

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "BorrowedStudent":
        """Load it from a teacher's ``folder``.

        Raises:
            CheckpointError: If it is missing or cannot be read.
        """
        if not cls.is_in(folder):
            raise CheckpointError(
                f"the teacher in {folder} reads a trained recommender, but {_FOLDER}/ is missing; copy the folder of a "
                "teacher as a whole."
            )
        return cls.of_student(folder / _FOLDER, device)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether ``folder`` has a saved recommender."""
        return (folder / _FOLDER / "config.json").is_file()

    @classmethod
    def of_student(cls, folder: Path, device: torch.device) -> "BorrowedStudent":
        """Load a student saved by `save_student`.

        Raises:
            CheckpointError: If it is missing or cannot be read.
        """
        try:
            return cls(load_student(folder).to(device), read_json(folder / "config.json"))
        except (CheckpointError, DataError) as error:
            raise CheckpointError(
                f"the student in {folder}, which the teacher reads, cannot be loaded ({str(error).splitlines()[0]}); "
                "restore its files, or train it again."
            ) from error


def _most_recent(
    history: NDArray[np.int32], lengths: NDArray[np.int32], max_length: int, padding: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut histories ``(B, L)`` to their last ``max_length`` items, still padded on the right."""
    kept = np.minimum(lengths, max_length)
    slots = np.arange(min(max_length, history.shape[1]))
    real = slots < kept[:, None]
    taken = np.take_along_axis(history, np.where(real, (lengths - kept)[:, None] + slots, 0), axis=1)
    return np.where(real, taken, padding).astype(np.int32), kept


def open_recommender(
    run: Path | None, kept: Path, dataset: str, fingerprint: str, device: torch.device
) -> BorrowedStudent | None:
    """Load the recommender for training a teacher; the first process must call this first, since it may write.

    Args:
        run: Finished run of a student, or None for a teacher that reads none.
        kept: Folder for a copy of the student, so that a resumed run reads the same one even if the student's run has
            changed.
        dataset: Name of the teacher's dataset.
        fingerprint: Its fingerprint.
        device: Device of the student.

    Raises:
        CheckpointError: If ``run`` has no finished student of this dataset.
    """
    if run is None:
        return None
    if not BorrowedStudent.is_in(kept):
        _check_run(run, dataset, fingerprint)
        BorrowedStudent.of_student(run / "student", device).save(kept)
    return BorrowedStudent.load(kept, device)


def _check_run(folder: Path, dataset: str, fingerprint: str) -> None:
    """Raise unless ``folder`` is a finished run of a student on this dataset."""
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"`teacher.recommender_run` is {str(folder)!r}, which has no run.json; expected the folder of a finished "
            "run of student or distill. Train one with the same dataset overrides (`python -m llm2rec.student`)."
        )
    record = read_record(folder, "dataset")
    if record["stage"] not in ("student", "distill") or record["status"] != "finished":
        raise CheckpointError(
            f"`teacher.recommender_run` is {str(folder)!r}, {described(record)}; "
            "expected a finished run of student or distill. Use another run, or resume this one if it is a student's."
        )
    of = record["dataset"]
    if of["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"`teacher.recommender_run` is {str(folder)!r}, trained on dataset {of['name']!r} (fingerprint "
            f"{of['fingerprint'][:12]}), expected that of the teacher, {dataset!r} ({fingerprint[:12]}); use the same "
            "dataset overrides as in its training, or a run on this dataset."
        )
