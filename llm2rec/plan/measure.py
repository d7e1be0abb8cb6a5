"""Peak memory of a training step, measured by running the step on the meta device: shapes without data.

The step is the real one: transformers' model, the adapter, pooling, the loss and backward. On a CPU the same counter
measures a step with data; `benchmarks/plan_check.py` compares the two.
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["ATTENTION", "CPU_ATTENTION", "MemoryMeter", "forward_peaks", "step_peaks"]

ATTENTION, CPU_ATTENTION = "llm2rec_plan", "llm2rec_plan_cpu"
"""``attn_implementation`` of a model on the meta device, planned for a GPU and for a CPU."""


def step_peaks(model: nn.Module, step: Callable[[], Tensor]) -> tuple[int, ...]:
    """Peak bytes of a forward and a backward pass, by phase.

    Gradients exist before the step, as in every micro-batch but the first, and are not counted.

    Args:
        model: Model whose trained parameters get gradients.
        step: Runs the forward pass and returns the loss.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with MemoryMeter() as meter:
        step().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return tuple(meter.peaks)


def forward_peaks(forward: Callable[[], object]) -> tuple[int, ...]:
    """Peak bytes of a forward pass without gradients, by phase."""
    with torch.no_grad(), MemoryMeter() as meter:
        forward()
    return tuple(meter.peaks)


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of tensors that are created while it is active.

    A storage counts from the operation that returned it until it is freed, once for all its views. Workspace that an
    operation allocates and frees internally is not seen.

    Attributes:
        now: Bytes alive.
        peaks: Most bytes alive at once, by phase.
        active: The meter that is counting, for code that marks phases.
    """

    active: ClassVar["MemoryMeter | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks = [0]
        self._known: set[int] = set()

    def __enter__(self) -> "MemoryMeter":
        """Start counting."""
        MemoryMeter.active = self
        return cast(MemoryMeter, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        MemoryMeter.active = None
        super().__exit__(*error)

    def next_phase(self) -> None:
        """Start a new peak. Within a phase, peaks grow linearly with the number of layers."""
        self.peaks.append(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it returns."""
        kwargs = kwargs or {}
        given = {id(each.untyped_storage()) for each in _dense((args, kwargs))}
        result = func(*args, **kwargs)
        for each in _dense(result):
            if id(each.untyped_storage()) not in given:
                self._add(each.untyped_storage())
        self.peaks[-1] = max(self.peaks[-1], self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _dense(values: Any) -> list[Tensor]:
    """Tensors among nested values, without sparse ones, which have no storage of their own."""
    return [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.layout == torch.strided]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Fused attention as in torch's CPU and CUDA kernels, as one operation.

    Args:
        module: The attention layer.
        query: Shape ``(B, heads, T, width)``.
        key: Shape ``(B, key heads, T, width)``.
        value: As ``key``.
        attention_mask: Shape ``(B, 1, T, T)``, True where a token is seen; None for a causal mask.
        scaling: Factor on the scores.
        dropout: Dropout probability.

    Returns:
        Shape ``(B, T, heads, width)``, and None for the attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    bias = None
    if attention_mask is not None:  # torch converts it to a bias in every layer and keeps that for backward
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias = bias.masked_fill_(attention_mask.logical_not(), -torch.inf).expand(-1, query.shape[1], -1, -1)
    mixed = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout, bias is None, scale=scaling
    )[0]
    return mixed.transpose(1, 2).contiguous(), None


def _cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention on a CPU, whose fused kernel does not support dropout: with dropout, scores are ordinary tensors."""
    dropout = options.get("dropout", 0.0)
    if dropout == 0:
        return _attention(module, query, key, value, attention_mask, **options)
    mixed = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attention_mask, dropout, scale=options.get("scaling")
    )[0]
    return mixed.transpose(1, 2).contiguous(), None


def _mask(batch_size: int, q_length: int, kv_length: int, device: Any = "meta", **_: Any) -> Tensor:
    """The mask of padded prompts; its values are not known."""
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(CPU_ATTENTION, _cpu_attention)
for _name in (ATTENTION, CPU_ATTENTION):
    AttentionMaskInterface.register(_name, _mask)
