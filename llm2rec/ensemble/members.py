"""Members of an ensemble that need no language model at run time: students, item neighbours and title neighbours.

`llm2rec.ensemble.llm_teacher` adds finished LLM teachers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from llm2rec.core.vectors import Preparation
from llm2rec.ensemble.batch import EnsembleBatch
from llm2rec.ensemble.neighbours import Neighbours
from llm2rec.student.models import SequentialRecommender

__all__ = ["ItemNeighbours", "Member", "Student", "TitleNeighbours", "distribution"]


class Member(ABC):
    """Scores the catalogue after a history.

    Attributes:
        kind: ``student``, ``neighbours``, ``titles`` or ``teacher``.
        group: Members of one group share a temperature and split a share equally.
        about: What identifies the member in manifests, plain values.
        max_length: Items of a history that it reads, at most.
        n_parameters: Numbers that serving it needs.
    """

    kind: ClassVar[str]

    def __init__(self, group: str, about: Mapping[str, Any], max_length: int, n_parameters: int) -> None:
        self.group, self.about, self.max_length, self.n_parameters = group, dict(about), max_length, n_parameters

    @abstractmethod
    def scores(self, batch: EnsembleBatch) -> Tensor:
        """Score all items.

        Returns:
            Shape ``(B, N)``, float32, on the device of the batch; ``softmax(scores / temperature)`` is the member's
            distribution. -inf excludes an item; a row of -inf only means that the member does not know the history.
        """

    @property
    def item_vectors(self) -> Tensor | None:
        """Item vectors, shape ``(N, d)``; None if the member has none."""
        return None

    def changed(self, options: Mapping[str, float]) -> "Member":
        """The member with other options besides its temperature, which most members do not have."""
        assert not options, f"{self.kind} has no options {sorted(options)}"
        return self


def distribution(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``softmax(scores / temperature)``, zeros for a history that a member does not know.

    Args:
        scores: Return value of `Member.scores`.
        temperature: Above 0; below 1 sharpens.

    Returns:
        Probabilities, shape ``(B, N)``, and whether each history is known, shape ``(B, 1)``.
    """
    known = (scores > -torch.inf).any(dim=1, keepdim=True)
    return (scores / temperature).softmax(dim=1).masked_fill(~known, 0.0), known


class Student(Member):
    """A trained student.

    Args:
        model: The student, moved to ``device`` in evaluation mode.
        about: Its run, label and seed.
        device: Device of the ensemble.
    """

    kind = "student"

    def __init__(
        self, model: SequentialRecommender, about: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        n_parameters = sum(each.numel() for each in model.weights_to_serve().values())
        super().__init__("students", about, model.max_length, n_parameters)
        self._model = model.eval().to(device)

    def scores(self, batch: EnsembleBatch) -> Tensor:
        """See `Member.scores`: the student's logits."""
        return self._model.score(self._model(*batch.recent(self.max_length))).float()

    @property
    def item_vectors(self) -> Tensor:
        """The student's item vectors."""
        return self._model.output_items.vectors().detach()


class ItemNeighbours(Member):
    """Item-to-item counts; a temperature of 2/3 raises their scores to the power of 1.5.

    A training row is scored without the sequence of its own user, so that its scores are comparable with those of
    rows that were not counted.

    Args:
        neighbours: The counts.
        max_length: Items of a history that are read.
    """

    kind = "neighbours"

    def __init__(self, neighbours: Neighbours, max_length: int) -> None:
        super().__init__("neighbours", {}, max_length, neighbours.n_pairs)
        self._neighbours = neighbours

    def scores(self, batch: EnsembleBatch) -> Tensor:
        """See `Member.scores`: logarithms of the sums of similarities."""
        history, lengths = batch.recent(self.max_length)
        return self._neighbours.scores(history, lengths, batch.users).log().to(batch.history.device)


class TitleNeighbours(Member):
    """Items whose titles are like those of the history, by a language model without training.

    Title vectors are centred or softly whitened and scaled to unit length. A history is the sum of its items' vectors,
    weighted by ``decay`` to the power of their age, scaled to unit length; an item's score is the cosine of both.

    Args:
        vectors: Raw title vectors, shape ``(N, d)``.
        about: ``text`` (what identifies the encoder) and ``llm`` (its name).
        whitening: 0 only centres, 1 scales all principal components to a variance of 1; see `Preparation`.
        decay: Weight of an item relative to the next one, 0 to 1.
        history: Items of a history that are read.
        device: Device of the ensemble.
    """

    kind = "titles"

    def __init__(
        self,
        vectors: Tensor,
        about: Mapping[str, Any],
        *,
        whitening: float = 0.0,
        decay: float = 0.7,
        history: int = 20,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__("titles", about, history, vectors.numel())
        self._raw, self._device, self._decay = vectors, device, decay
        self._whitening = whitening
        prepared = Preparation.fit(vectors, whitening=whitening)(vectors)
        # The padding id N has the last row, of zeros.
        self._items = torch.cat([prepared, prepared.new_zeros(1, prepared.shape[1])]).to(device)

    def scores(self, batch: EnsembleBatch) -> Tensor:
        """See `Member.scores`: cosines."""
        history, lengths = batch.recent(self.max_length)
        ages = lengths.unsqueeze(1) - 1 - torch.arange(history.shape[1], device=history.device)
        weights = torch.where(ages >= 0, self._decay ** ages.clamp(min=0).float(), 0.0)  # (B, L)
        users = torch.bmm(weights.unsqueeze(1), self._items[history]).squeeze(1)
        return functional.normalize(users, dim=1) @ self._items[:-1].T

    @property
    def item_vectors(self) -> Tensor:
        """The raw title vectors."""
        return self._raw

    def changed(self, options: Mapping[str, float]) -> "TitleNeighbours":
        """The member with another ``whitening`` or ``decay``."""
        now = {"whitening": self._whitening, "decay": self._decay} | dict(options)
        if now == {"whitening": self._whitening, "decay": self._decay}:
            return self
        return TitleNeighbours(self._raw, self.about, **now, history=self.max_length, device=self._device)
