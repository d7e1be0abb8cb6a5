"""Inputs of selection policies: the teacher's outputs, and the student at the start of an epoch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.train.engine import Engine
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import SequentialRecommender

__all__ = ["Evidence", "RankingLosses", "ScoredRows", "StudentNow"]


class RankingLosses(Protocol):
    """The ranking losses of the training objective."""

    def __call__(self, logits: Tensor, rows: NDArray[np.int64], targets: Tensor, teacher_batch: TeacherBatch) -> Tensor:
        """Losses ``(B,)`` of rows from ``logits`` ``(B, N)``, row numbers, targets and the teacher's outputs."""


@dataclass(frozen=True)
class ScoredRows:
    """Some labelled training rows, scored by the student without dropout.

    Attributes:
        rows: Row numbers, shape ``(B,)``.
        users: User vectors, shape ``(B, D)``.
        logits: Scores of all items, shape ``(B, N)``; they and ``users`` carry no gradient.
        targets: Shape ``(B,)``.
        teacher_batch: The teacher's outputs for the rows: all stored candidates, and the distances of the targets.
        losses: The ranking losses of the objective as a function of logits; returns shape ``(B,)``. With
            ``distill.dros.in_ranking=broadcast`` they use the mean weight of the rows in the same call.
    """

    rows: NDArray[np.int64]
    users: Tensor
    logits: Tensor
    targets: Tensor
    teacher_batch: TeacherBatch
    losses: Callable[[Tensor], Tensor]

    def ranking_gradient(self) -> Tensor:
        """Gradient of each row's ranking loss with respect to its logits, shape ``(B, N)``."""
        logits = self.logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(logits).sum(), logits)
        return gradient


class StudentNow:
    """The student at the start of an epoch. Its methods are collectives: call them on every process.

    Args:
        model: Unwrapped student.
        train: Training rows.
        validation: Validation rows.
        teacher: The teacher's outputs.
        engine: Splits the rows among processes.
        ranking_losses: The ranking losses of the objective.
        batch_size: Rows scored at once.

    Attributes:
        was_read: Whether any method was called.
    """

    def __init__(
        self,
        model: SequentialRecommender,
        train: Rows,
        validation: Rows,
        teacher: TeacherOutputs,
        engine: Engine,
        ranking_losses: RankingLosses,
        batch_size: int = 512,
    ) -> None:
        self._model, self._train, self._validation = model, train, validation
        self._teacher, self._engine, self._losses = teacher, engine, ranking_losses
        self._batch_size, self.was_read = batch_size, False

    def each_row(self, measure: Callable[[ScoredRows], Tensor]) -> NDArray[np.float32]:
        """Evaluate ``measure`` on every labelled row.

        Args:
            measure: Returns a number per row, shape ``(B,)``, which must not depend on the other rows of the batch.

        Returns:
            Shape ``(labelled,)``, in the order of `Evidence.rows`, the same on every process.
        """
        labelled = self._teacher.rows_labelled(len(self._train))
        values = torch.zeros(len(labelled), device=self._engine.device)
        for places, targets, users, logits in self._scored(self._train, labelled):
            rows = labelled[places]
            teacher_batch = self._teacher.batch(
                rows, self._teacher.ranking.shape[1], self._engine.device, self._train.targets.numpy()[rows]
            )
            losses = partial(self._losses, rows=rows, targets=targets, teacher_batch=teacher_batch)
            measured = measure(ScoredRows(rows, users, logits, targets, teacher_batch, losses))
            values[torch.from_numpy(places).to(values.device)] = measured.to(values)
        return self._engine.sum_tensor(values).cpu().numpy()

    def validation_gradient(self) -> Tensor:
        """Gradient of the mean cross-entropy over the validation rows with respect to the output item vectors.

        Returns:
            Shape ``(N, D)``, the same on every process.
        """
        gradient = torch.zeros(self._validation.n_items, self._model.width, device=self._engine.device)
        for _, targets, users, logits in self._scored(self._validation, np.arange(len(self._validation))):
            errors = torch.softmax(logits.float(), dim=1)  # (B, N)
            errors[torch.arange(len(errors)), targets] -= 1
            gradient += errors.T @ users.float()
        return self._engine.sum_tensor(gradient) / len(self._validation)

    def _scored(
        self, data: Rows, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor, Tensor]]:
        """This process's share of ``rows``, block by block: places in ``rows``, targets, user vectors and logits."""
        self.was_read = True
        mode = self._model.training
        self._model.eval()
        place = np.full(len(data), -1)
        place[rows] = np.arange(len(rows))
        units = rows if data.sizes is None else data.units  # a segment predicts all its rows; the others are dropped
        block = max(1, self._batch_size * len(data.units) // len(data))
        mine = units[self._engine.my_rows(len(units))]
        for start in range(0, len(mine), block):
            batch = data.batch(mine[start : start + block], self._engine.device)
            wanted = torch.from_numpy(place[batch.rows] >= 0)
            if not bool(wanted.any()):
                continue
            with torch.no_grad():
                users = self._model(*batch.inputs)[wanted.to(self._engine.device)]
                logits = self._model.score(users)
            targets = batch.targets[wanted.to(self._engine.device)]
            yield place[batch.rows][wanted.numpy()], targets, users, logits
        self._model.train(mode)


@dataclass(frozen=True)
class Evidence:
    """Inputs of a policy's ``weights``.

    Attributes:
        n_rows: Training rows, M.
        epoch: The epoch that begins, from 0.
        rows: Numbers of the rows that the teacher has labelled, ascending, shape ``(labelled,)``.
        teacher: The teacher's outputs for them: row i of its tables belongs to training row ``rows[i]``.
        student: The student at the start of the epoch.
    """

    n_rows: int
    epoch: int
    rows: NDArray[np.int64]
    teacher: TeacherOutputs
    student: StudentNow
