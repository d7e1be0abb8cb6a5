"""AdamW with learning-rate ratios for parts of a model, row-wise AdamW for large tables, and the schedule."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError

__all__ = ["RowwiseAdamW", "adamw", "warmup_cosine"]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    lr_ratios: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
    rowwise: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters of ``model``, without weight decay on vectors (biases, norms).

    Args:
        model: The model, before it is wrapped.
        lr: Learning rate.
        weight_decay: Decoupled weight decay of matrices.
        lr_ratios: Learning-rate factors by component of the dotted parameter name (``"gate"`` matches
            ``layer.gate.weight``, not ``layer.gate_proj.weight``); the first match applies.
        weight_decays: Weight decays of the same components, if they differ from ``weight_decay``.
        rowwise: Tables with row-wise updates, two numbers of state per row; see `RowwiseAdamW`.

    Returns:
        The optimizer. Its groups have their component as ``name`` and their factor as ``lr_ratio``, for
        `Engine.begin_step`.

    Raises:
        ConfigError: If a factor is not a positive finite number, or matches no trainable parameter.
    """
    ratios, decays = dict(lr_ratios or {}), dict(weight_decays or {})
    _check(ratios, decays)
    tables = {id(parameter) for parameter in rowwise}
    groups: dict[tuple[bool, str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = next((each for each in ratios if each in name.split(".")), None)
            groups.setdefault((parameter.ndim >= 2, component, id(parameter) in tables), []).append(parameter)
    if unmatched := ratios.keys() - {component for _, component, _ in groups}:
        raise ConfigError(
            f"learning-rate ratios are given for {', '.join(sorted(unmatched))}, which match no trainable parameter; "
            "correct the name, or remove it."
        )
    return (RowwiseAdamW if tables else torch.optim.AdamW)(
        [
            {
                "params": parameters,
                "weight_decay": decays.get(component or "", weight_decay) if is_matrix else 0.0,
                "name": component,
                "lr_ratio": 1.0 if component is None else ratios[component],
                "rowwise": is_table,
            }
            for (is_matrix, component, is_table), parameters in groups.items()
        ],
        lr=lr,
        fused=True,
    )


def _check(ratios: Mapping[str, float], decays: Mapping[str, float]) -> None:
    if unmatched := decays.keys() - ratios.keys():
        raise ConfigError(
            f"weight decays are given for {', '.join(sorted(unmatched))}, which have no learning-rate ratio; add one, "
            "1 for the common rate."
        )
    for component, ratio in ratios.items():
        if not 0 < ratio < float("inf"):
            raise ConfigError(
                f"the learning-rate ratio of {component!r} is {ratio}, expected a positive finite number; 1 is the "
                "common rate."
            )


def warmup_cosine(
    step: int, *, max_steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0, warmup_start_lr: float = 0.0
) -> float:
    """Warm up linearly, then decay along half a cosine (the schedule of the released iLoRA program).

    Args:
        step: Number of finished optimizer steps.
        max_steps: Step at which ``min_lr`` is reached.
        warmup_steps: Steps from ``warmup_start_lr`` to ``lr``; 0 starts at ``lr``.
        lr: Peak learning rate.
        min_lr: Learning rate at ``max_steps`` and after.
        warmup_start_lr: Learning rate at step 0 of the warm-up.

    Returns:
        The learning rate of the step that follows ``step`` finished ones.
    """
    if step < warmup_steps:
        return warmup_start_lr + (lr - warmup_start_lr) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done))


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW with row-wise updates for parameter groups with ``rowwise`` set.

    A row has one second moment (the mean over its D columns), no first moment, and its own step count for bias
    correction, as in the row-wise optimizers of DLRM and TorchRec, but with Adam's running average instead of Adagrad's
    sum, so that one learning rate serves the whole model. This takes 8 bytes per row instead of AdamW's 8·D:

        v_r ← β₂ v_r + (1 - β₂) mean(g_r²),   w_r ← (1 - lr·decay) w_r - lr g_r / (√(v_r / (1 - β₂^t_r)) + ε)

    Rows whose gradient is missing or zero keep weights and state, so sparse and dense gradients give the same steps.
    With sparse gradients the cost of a step does not depend on the size of the table.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        tables = [
            (parameter, group) for group in self.param_groups if group["rowwise"] for parameter in group["params"]
        ]
        gradients = [parameter.grad for parameter, _ in tables]
        for parameter, _ in tables:
            parameter.grad = None  # AdamW skips parameters without gradients
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
    """Update the state ``(R, 1)`` of rows in place; returns their learning rates, 0 for rows without gradient."""
    _, beta = group["betas"]
    square = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square_().div_(gradient.shape[1])
    touched = square > 0
    steps.add_(touched)
    average.copy_(torch.where(touched, beta * average + (1 - beta) * square, average))
    unbiased = average / (1 - beta ** steps.clamp(min=1))
    return torch.where(touched, group["lr"] / (unbiased.sqrt() + group["eps"]), 0.0)
