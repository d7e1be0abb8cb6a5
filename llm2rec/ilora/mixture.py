"""The arithmetic of an adapted layer, with a backward pass that keeps little."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["add_mixture"]


def add_mixture(result: Tensor, x: Tensor, down: Tensor, up: Tensor, factors: Tensor, dropout: float = 0.0) -> Tensor:
    """Add the mixture of the experts to the base layer's output: ``result + B (f * (A drop(x)))``.

    It computes in the dtype of ``x`` (of autocast, where that is on) and casts the weights to it. PEFT's LoRA casts
    ``x`` to the dtype of the weights instead: beside a bfloat16 base that is a float32 copy of every layer's input,
    kept for the backward pass, and products off the tensor cores.

    With dropout the backward pass is written by hand. It keeps ``x`` as it came (one tensor for all layers that read
    the same one) and one byte per element for what was dropped, where autograd would keep a dropped copy of ``x`` for
    every layer. Without dropout there is no copy to save, and autograd's own functions cost the processor less than
    ours.

    Args:
        result: Output of the base layer, shape ``(B, ..., out)``.
        x: Its input, shape ``(B, ..., in)``.
        down: A, shape ``(R, in)``.
        up: B, shape ``(out, R)``.
        factors: f, gates spread over the ranks and scaled; broadcasts to ``(B, ..., R)``.
        dropout: Probability of dropping an element of ``x``.

    Returns:
        Shape ``(B, ..., out)``, in the dtype of ``result``. Differentiable in all tensors; with dropout only once.
    """
    if dropout > 0:
        # What is kept stands in for what is dropped: on the few factors, not on all of x.
        return cast(Tensor, _AddMixtureOfDropped.apply(result, x, down, up, factors / (1 - dropout), dropout))
    dtype = _compute_dtype(x)
    hidden = linear(x, down.to(dtype)) * factors.to(dtype)  # (B, ..., R)
    return result + linear(hidden, up.to(dtype)).to(result.dtype)


class _AddMixtureOfDropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, down: Tensor, up: Tensor, factors: Tensor, dropout: float
    ) -> Tensor:
        dtype = _compute_dtype(x)
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
        hidden = linear(x.to(dtype) * kept, down.to(dtype))  # (B, ..., R)
        mixed = _rows(hidden * factors.to(dtype))  # (N, R), N = B * ...
        ctx.save_for_backward(x, kept, hidden, down, up, factors)
        rows, up = _rows(result), up.to(dtype)
        # One pass over (N, out) where the types allow it, instead of a product, a copy and a sum.
        rows = torch.addmm(rows, mixed, up.T) if rows.dtype == dtype else rows + linear(mixed, up).to(rows.dtype)
        return rows.view(result.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, hidden, down, up, factors = ctx.saved_tensors
        _, needs_x, needs_down, needs_up, needs_factors, _ = ctx.needs_input_grad
        dtype = hidden.dtype
        grad_rows, f = grad.to(dtype), factors.to(dtype)
        grad_mixed = linear(grad_rows, up.to(dtype).T)  # (B, ..., R)
        grad_hidden = grad_mixed * f

        grad_x = grad_down = grad_up = grad_factors = None
        if needs_down:
            grad_down = (_rows(grad_hidden).T @ _rows(x.to(dtype) * kept)).to(down.dtype)
        if needs_x:
            grad_x = linear(grad_hidden, down.to(dtype).T).mul_(kept).to(x.dtype)
        if needs_up:
            grad_up = (_rows(grad_rows).T @ _rows(hidden * f)).to(up.dtype)
        if needs_factors:
            # Summed over tokens in the factors' own dtype: bfloat16 would lose small terms of a long sequence.
            grad_factors = (grad_mixed * hidden).to(factors.dtype).sum_to_size(factors.shape)
        return grad if ctx.needs_input_grad[0] else None, grad_x, grad_down, grad_up, grad_factors, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device, where shapes are tried out, has none
    return torch.get_autocast_dtype(device) if has_autocast and torch.is_autocast_enabled(device) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
