"""Where the gate's input z comes from: the frozen language model, or a trained sequential recommender (the paper)."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.prompts import TokenBatch

__all__ = ["FrozenBase", "GateSource", "NoGate", "StudentVectors", "gate_source_of"]


class Encoder(Protocol):
    """A teacher, as far as the source of its gate's input needs it."""

    def text_prompts(self, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> TokenBatch:
        """Prompts of histories, text only, on its device."""

    def frozen_vectors(self, tokens: TokenBatch) -> Tensor:
        """Pooled states of the model without adapter, shape ``(B, d)``, unit length."""


class GateSource(ABC):
    """Gives each history a vector of unit length, which does not change while the teacher is trained.

    Attributes:
        name: What ``teacher.gate_input`` calls it.
        width: Width d of the vectors; None for that of the language model.
        identity: What decides the vectors besides language model, prompts and histories; empty for nothing.
        label: What it adds to the teacher's name in results.
    """

    name: ClassVar[str]
    width: int | None = None
    identity: str = ""
    label: str = ""

    @abstractmethod
    def vectors(self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Gate inputs of a batch.

        Args:
            teacher: The teacher whose gate it is.
            history: Item ids, shape ``(B, L)``, oldest first, padded on the right with N.
            lengths: Items per history, shape ``(B,)``, at least 1.

        Returns:
            Shape ``(B, d)``, float32, without gradient.
        """


class FrozenBase(GateSource):
    """The teacher's own language model, without its adapter, reads the prompt."""

    name = "llm"

    def vectors(self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """See `GateSource.vectors`."""
        return teacher.frozen_vectors(teacher.text_prompts(history, lengths))


class StudentVectors(GateSource):
    """User vectors of a trained recommender, scaled to unit length as those of the language model are."""

    name = "sequence"

    def __init__(self, recommender: BorrowedStudent) -> None:
        self._recommender = recommender
        self.width, self.label = recommender.width, f" ({recommender.name} gate)"
        self.identity = f"/{self.name}/{recommender.identity}"

    def vectors(self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """See `GateSource.vectors`."""
        return nn.functional.normalize(self._recommender.users(history, lengths), dim=1)


class NoGate(GateSource):
    """For language models without a mixture of experts: plain LoRA, or no adapter at all."""

    name = "none"
    width = 0

    def vectors(self, teacher: Encoder, history: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        """Nothing, in shape ``(B, 0)``."""
        return torch.empty(len(history), 0)


def gate_source_of(name: str, recommender: BorrowedStudent | None) -> GateSource:
    """The source called ``name``.

    Raises:
        CheckpointError: If there is no such source, or what it reads is not there.
    """
    if name == StudentVectors.name and recommender is not None:
        return StudentVectors(recommender)
    if name in (FrozenBase.name, NoGate.name):
        return FrozenBase() if name == FrozenBase.name else NoGate()
    raise CheckpointError(
        f"the gate reads {name!r}, expected {FrozenBase.name}, {NoGate.name}, or {StudentVectors.name} with a trained "
        "recommender beside it; load the teacher with the version that wrote it, and its folder as a whole."
    )
