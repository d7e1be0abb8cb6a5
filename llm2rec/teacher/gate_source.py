"""Where the gate's input z comes from: the frozen language model, or a trained sequential recommender (the paper)."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import read_json
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.store import load_student, save_student
from llm2rec.teacher.prompts import TokenBatch

__all__ = ["FrozenBase", "GateSource", "StudentVectors", "load_gate_source", "open_gate_source"]


class Encoder(Protocol):
    """A teacher, as far as the source of its gate's input needs it."""

    def frozen_vectors(self, tokens: TokenBatch) -> Tensor:
        """Pooled states of the model without adapter, shape ``(B, d)``, unit length."""


class GateSource(ABC):
    """Gives each history a vector of unit length, which does not change while the teacher is trained.

    Attributes:
        name: What ``teacher.gate_input`` calls it.
        width: Width d of the vectors; None for that of the language model.
        identity: What decides the vectors besides language model, prompts and histories; empty for nothing.
        label: What it adds to the teacher's name in results.
        n_parameters: Parameters besides those of the teacher.
    """

    name: ClassVar[str]
    width: int | None = None
    identity: str = ""
    label: str = ""
    n_parameters: int = 0

    @abstractmethod
    def vectors(
        self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32], tokens: TokenBatch
    ) -> Tensor:
        """Gate inputs of a batch; each source reads what it needs of it.

        Args:
            teacher: The teacher whose gate it is.
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right with N.
            lengths: Items per history, shape ``(B,)``, at least 1.
            tokens: The histories' prompts, on the teacher's device.

        Returns:
            Shape ``(B, d)``, float32, without gradient.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write into a teacher's ``folder`` what `load_gate_source` needs besides the teacher."""


class FrozenBase(GateSource):
    """The teacher's own language model, without its adapter, reads the prompt."""

    name = "llm"

    def vectors(
        self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32], tokens: TokenBatch
    ) -> Tensor:
        """See `GateSource.vectors`."""
        return teacher.frozen_vectors(tokens)

    def save(self, folder: Path) -> None:
        """Nothing: the language model is named by the teacher's recipe."""


class StudentVectors(GateSource):
    """User vectors of a trained SASRec or GRU4Rec, scaled to unit length as those of the language model are.

    The student is no module of the teacher: nothing trains it, casts it or turns its dropout on.

    Args:
        student: The student, in evaluation mode, on the device it is to run on.
        config: What `save_student` wrote about it: ``model``, its name, and ``arguments``.
    """

    name = "sequence"
    _folder = "gate_student"

    def __init__(self, student: SequentialRecommender, config: dict[str, Any]) -> None:
        self._student, self._config = student.eval().requires_grad_(False), config
        self.width, self.label = student.width, f" ({config['model']} gate)"
        weights = {name: tensor.cpu().contiguous() for name, tensor in student.weights_to_serve().items()}
        self.n_parameters = sum(tensor.numel() for tensor in weights.values())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].numpy().tobytes())
        self.identity = f"/{self.name}/{digest.hexdigest()}"

    @torch.no_grad()
    def vectors(
        self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32], tokens: TokenBatch
    ) -> Tensor:
        """See `GateSource.vectors`; a history longer than the student's keeps its most recent items."""
        device = next(self._student.parameters()).device
        items, kept = _most_recent(history, lengths, self._student.max_length, self._student.n_items)
        users = self._student(
            torch.from_numpy(items).to(device, torch.int64), torch.from_numpy(kept).to(device, torch.int64)
        )
        return nn.functional.normalize(users.float(), dim=1)

    def save(self, folder: Path) -> None:
        """Write the student, so that the run it came from is needed no more."""
        save_student(folder / self._folder, self._student, self._config["model"], self._config["arguments"])

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "StudentVectors":
        """Load what `save` wrote into ``folder``.

        Raises:
            CheckpointError: If it is not there or cannot be read.
        """
        if not cls.is_in(folder):
            raise CheckpointError(
                f"{folder} says that its gate reads a student, but {cls._folder}/ is missing; copy the folder of a "
                "teacher as a whole."
            )
        return cls.of_student(folder / cls._folder, device)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether `save` has written into ``folder``."""
        return (folder / cls._folder / "config.json").is_file()

    @classmethod
    def of_student(cls, folder: Path, device: torch.device) -> "StudentVectors":
        """Load the student that `save_student` wrote into ``folder``.

        Raises:
            CheckpointError: If there is none or it cannot be read.
        """
        try:
            return cls(load_student(folder).to(device), read_json(folder / "config.json"))
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"the student in {folder}, which the gate reads, cannot be loaded ({str(error).splitlines()[0]}); "
                "put its files back, or train it again."
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


def load_gate_source(name: str, folder: Path, device: torch.device) -> GateSource:
    """Load the source of a finished teacher's gate inputs.

    Args:
        name: What its recipe says.
        folder: What `save_teacher` wrote.
        device: Where to load it.

    Raises:
        CheckpointError: If there is no such source, or it is not in the folder.
    """
    sources = {FrozenBase.name: lambda: FrozenBase(), StudentVectors.name: lambda: StudentVectors.load(folder, device)}
    if name not in sources:
        raise CheckpointError(
            f"the gate of {folder} reads {name!r}, expected one of {', '.join(sources)}; load it with the version that "
            "wrote it."
        )
    return sources[name]()


def open_gate_source(run: Path | None, kept: Path, dataset: str, fingerprint: str, device: torch.device) -> GateSource:
    """Open the source for training; for the first process first, which may write.

    Args:
        run: Finished run of a student, or None for the language model.
        kept: Where a copy of the student is kept, so that a resumed run reads the one it began with, whatever has
            become of its run since.
        dataset: Name of the teacher's dataset.
        fingerprint: Its fingerprint.
        device: Where to load a student.

    Raises:
        CheckpointError: If there is no finished student of this dataset in ``run``.
    """
    if run is None:
        return FrozenBase()
    if not StudentVectors.is_in(kept):
        _check_run(run, dataset, fingerprint)
        StudentVectors.of_student(run / "student", device).save(kept)
    return StudentVectors.load(kept, device)


def _check_run(folder: Path, dataset: str, fingerprint: str) -> None:
    """Refuse what is no finished run of a student on this dataset."""
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"`teacher.gate_run` is {str(folder)!r}, which holds no run.json; expected the folder of a finished run of "
            "student or distill. Train one with the same dataset overrides (`python -m llm2rec.student`)."
        )
    record = read_json(folder / "run.json")
    if record["stage"] not in ("student", "distill") or record["status"] != "finished":
        raise CheckpointError(
            f"`teacher.gate_run` is {str(folder)!r}, a {record['status']} run of stage {record['stage']!r}; expected a "
            "finished run of student or distill. Name one, or resume this run if it is a student's."
        )
    of = record["dataset"]
    if of["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"`teacher.gate_run` is {str(folder)!r}, trained on dataset {of['name']!r} (fingerprint "
            f"{of['fingerprint'][:12]}), expected that of the teacher, {dataset!r} ({fingerprint[:12]}); give the same "
            "dataset overrides as in its training, or name a run on this dataset."
        )
