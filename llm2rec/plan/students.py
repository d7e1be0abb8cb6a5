"""The student on the meta device: all its shapes and none of its weights."""

from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from llm2rec.plan.measure import Cost, step_cost
from llm2rec.student.items import ItemTable
from llm2rec.student.models import build_model
from llm2rec.student.settings import StudentSettings
from llm2rec.student.task_loss import TaskLoss

__all__ = ["PlannedStudent", "plan_student"]


@dataclass(frozen=True)
class PlannedStudent:
    """A student and a micro-batch of its training.

    Attributes:
        parameters: Its weights, all of them trained, in float32.
        held_bytes: Weights, gradients and the optimizer's state.
        update_bytes: What the optimizer reads and writes in a step.
        cost: A micro-batch, forward and backward.
    """

    parameters: int
    held_bytes: int
    update_bytes: int
    cost: Cost


class _Lookups(ItemTable):
    """A table whose lookups make no matrix of gradients, as the real one's; the meta device has no sparse ones."""

    def forward(self, item_ids: Tensor) -> Tensor:
        """See `ItemTable.forward`."""
        return cast(Tensor, _Take.apply(self.weight, item_ids))


class _Take(torch.autograd.Function):
    """Rows of a matrix, which get their gradients and pass nothing on."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, item_ids: Tensor) -> Tensor:
        ctx.save_for_backward(item_ids)
        return weight[item_ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def plan_student(settings: StudentSettings, n_items: int, rows: int) -> PlannedStudent:
    """Plan a student in one process, on its own task, with windows as examples (sequences take less).

    Args:
        settings: The student's.
        n_items: Items of the catalogue, N.
        rows: Rows of a micro-batch.
    """
    arguments = {"n_items": n_items, **asdict(settings.model)}
    with torch.device("meta"):
        model = build_model(settings.name, **arguments)
        history = torch.zeros(rows, settings.model.max_length, dtype=torch.int64)
        lengths, targets = torch.ones(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    tables = {module for module in model.modules() if isinstance(module, ItemTable)}
    for table in tables:
        table.__class__ = _Lookups
    loss = TaskLoss(model, settings.loss, torch.zeros(1, dtype=torch.int64), seed=0)

    def step() -> Tensor:
        return loss(model(history, lengths), targets, np.arange(rows), epoch=0, step=0)["loss"].sum()

    cost = step_cost(model, step)
    parameters = sum(each.numel() for each in model.parameters())
    if settings.item_optimizer != "rowwise":
        return PlannedStudent(parameters, 16 * parameters, 28 * parameters, cost)
    in_tables, n_rows = (sum(count(table) for table in tables) for count in (_size, _rows))
    sampled = settings.loss.completed().n_negatives is not None and settings.loss.dros.weight == 0
    gradients = 0 if sampled and settings.training.max_grad_norm == 0 else in_tables  # of some rows, or of all
    rest = parameters - in_tables
    held = 16 * rest + 4 * (in_tables + gradients) + 8 * n_rows
    return PlannedStudent(parameters, held, 28 * rest + 12 * gradients, cost)


def _size(table: ItemTable) -> int:
    return table.weight.numel()


def _rows(table: ItemTable) -> int:
    return len(table.weight)
