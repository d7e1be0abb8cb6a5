"""AdamW whose state of huge tables is two numbers a row, and which touches only rows that have a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RowwiseAdamW"]


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW; parameter groups with ``rowwise`` set are tables, updated row by row instead.

    A row has one second moment, the mean over its D columns, no first moment, and a count of its own steps for the
    correction of the bias (as in the row-wise optimizers of DLRM and TorchRec, with Adam's running average in the place
    of Adagrad's sum, so that one learning rate serves the whole model). That is 8 bytes a row where AdamW has 8·D:

        v_r ← β₂ v_r + (1 - β₂) mean(g_r²),   w_r ← (1 - lr·decay) w_r - lr g_r / (√(v_r / (1 - β₂^t_r)) + ε)

    A row without a gradient, or with nothing but zeros, keeps weights and state: sparse and dense gradients of the same
    numbers give the same steps, and with sparse ones the cost of a step does not depend on the table.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        tables = [
            (parameter, group) for group in self.param_groups if group["rowwise"] for parameter in group["params"]
        ]
        gradients = [parameter.grad for parameter, _ in tables]
        for parameter, _ in tables:
            parameter.grad = None  # which AdamW leaves out
        result = super().step(closure)
        for (parameter, group), gradient in zip(tables, gradients, strict=True):
            if gradient is not None:
                self._step_rows(parameter, gradient, group)
                parameter.grad = gradient
        return result

    def _step_rows(self, table: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"], state["exp_avg_sq"] = table.new_zeros(len(table), 1), table.new_zeros(len(table), 1)
        if not gradient.is_sparse:
            rate = _advance(gradient, state["step"], state["exp_avg_sq"], group)
            table.mul_(1 - group["weight_decay"] * group["lr"] * (rate > 0)).addcmul_(gradient, rate, value=-1)
            return
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        steps, average = state["step"][rows], state["exp_avg_sq"][rows]
        rate = _advance(values, steps, average, group)
        state["step"][rows], state["exp_avg_sq"][rows] = steps, average
        table[rows] = table[rows] * (1 - group["weight_decay"] * group["lr"] * (rate > 0)) - rate * values


def _advance(gradient: Tensor, steps: Tensor, average: Tensor, group: dict[str, Any]) -> Tensor:
    """Move the state ``(R, 1)`` of rows on, in place; returns the rows' learning rates, 0 without gradient."""
    _, beta = group["betas"]
    square = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square_().div_(gradient.shape[1])
    touched = square > 0
    steps.add_(touched)
    average.copy_(torch.where(touched, beta * average + (1 - beta) * square, average))
    unbiased = average / (1 - beta ** steps.clamp(min=1))
    return torch.where(touched, group["lr"] / (unbiased.sqrt() + group["eps"]), 0.0)
