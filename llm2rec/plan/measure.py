"""What one step asks for, found by running it on the meta device: every shape, no memory, no arithmetic.

The step is the real one, of the real modules: transformers' model, the adapter, pooling, scores of all items, backward.
Nothing is said twice in formulas that would have to follow the code. On a CPU the same counters tell what a step that
really runs holds, by which the plan is checked.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["ATTENTION", "CPU_ATTENTION", "Cost", "Meter", "forward_cost", "step_cost"]

ATTENTION, CPU_ATTENTION = "llm2rec_plan", "llm2rec_plan_cpu"
"""What stands for attention on the meta device: a model's ``attn_implementation``, of a GPU and of a CPU."""


@dataclass(frozen=True)
class Cost:
    """What a forward pass, or a forward and a backward pass, ask for.

    Attributes:
        flops: Floating-point operations, 2 for each weight and row of a product.
        forward_flops: Those of the forward pass alone.
        peaks: The most bytes alive at once besides weights and their gradients, activations and temporaries, phase by
            phase (see `Meter.next_phase`).
        traffic_bytes: Bytes read and written by all operations, each for itself.
        n_operations: Operations that read or write anything.
    """

    flops: float
    forward_flops: float
    peaks: tuple[int, ...]
    traffic_bytes: int
    n_operations: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once in all phases."""
        return max(self.peaks)


def step_cost(model: nn.Module, step: Callable[[], Tensor]) -> Cost:
    """Run a step of training whose gradients are there already, as in every micro-batch but the first.

    Args:
        model: Its trained parameters get gradients, which do not count.
        step: Runs the forward pass and gives the loss.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Meter() as meter:
        loss = step()
        forward_flops = meter.flops
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return meter.cost(forward_flops)


def forward_cost(forward: Callable[[], object]) -> Cost:
    """Run a forward pass without gradients."""
    with torch.no_grad(), Meter() as meter:
        forward()
    return meter.cost(meter.flops)


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that come to be, while it is active.

    A storage counts from the operation that returned it until it is freed, however many tensors look at it. What an
    operation takes and gives back within itself is not seen. (torch's own `FlopCounterMode` would be a second mode
    whose hooks keep activations alive: with checkpointing it trebles the peak.)

    Attributes:
        flops: Floating-point operations so far.
        now: Bytes alive.
        peaks: The most that were alive at once in each phase.
        active: The meter that counts now, for those who mark phases.
    """

    active: ClassVar["Meter | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.now = self._traffic = self._n_operations = 0
        self.peaks = [0]
        self._known: set[int] = set()

    def __enter__(self) -> "Meter":
        """Begin to count."""
        Meter.active = self
        return cast(Meter, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        Meter.active = None
        super().__exit__(*error)

    def next_phase(self) -> None:
        """Count peaks anew. Peaks within a phase grow alike with the number of layers; those of two phases may not."""
        self.peaks.append(0)

    def cost(self, forward_flops: float) -> Cost:
        """What has been counted, of which ``forward_flops`` in the forward pass."""
        return Cost(self.flops, forward_flops, tuple(self.peaks), self._traffic, self._n_operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and see what it returns."""
        kwargs = kwargs or {}
        given = _dense((args, kwargs))
        storages = {id(each.untyped_storage()) for each in given}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=result)
        fresh = [each for each in _dense(result) if id(each.untyped_storage()) not in storages]
        for each in fresh:
            self._add(each.untyped_storage())
        self.peaks[-1] = max(self.peaks[-1], self.now)
        if fresh or func._schema.is_mutable:  # all else are views
            self._traffic += sum(each.nbytes for each in [*given, *fresh])
            self._n_operations += 1
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
    """Tensors among nested values; a sparse one has no storage but those of its parts, which are seen themselves."""
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
    """Fused attention as torch's CPU and CUDA kernels have it, whose inner steps are no operations of their own.

    Args:
        module: The attention layer.
        query: Shape ``(B, heads, T, width)``.
        key: Shape ``(B, key heads, T, width)``.
        value: As ``key``.
        attention_mask: Shape ``(B, 1, T, T)``, True where a token is seen; None for a causal mask.
        scaling: Factor on the scores.
        dropout: Probability of dropping.

    Returns:
        Shape ``(B, T, heads, width)``, and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    bias = None
    if attention_mask is not None:  # torch makes numbers of it, in every layer anew, and keeps them for backward
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias = bias.masked_fill_(attention_mask.logical_not(), -torch.inf).expand(-1, query.shape[1], -1, -1)
    mixed = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout, bias is None, scale=scaling
    )[0]
    return mixed.transpose(1, 2).contiguous(), None


def _cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of a CPU, whose fused kernel knows no dropout: with it, scores are tensors like all others."""
    dropout = options.get("dropout", 0.0)
    if dropout == 0:
        return _attention(module, query, key, value, attention_mask, **options)
    mixed = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attention_mask, dropout, scale=options.get("scaling")
    )[0]
    return mixed.transpose(1, 2).contiguous(), None


def _mask(batch_size: int, q_length: int, kv_length: int, device: Any = "meta", **_: Any) -> Tensor:
    """The mask of prompts that are padded, whose values nobody knows."""
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(CPU_ATTENTION, _cpu_attention)
for _name in (ATTENTION, CPU_ATTENTION):
    AttentionMaskInterface.register(_name, _mask)
