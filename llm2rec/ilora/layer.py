"""The adapted layer: one LoRA whose middle activation is multiplied by the gates of the instance."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from .config import ILoraConfig
from .errors import not_called, refuse_merge
from .gate import build_gate
from .slot import GateSlot, RankLayout

__all__ = ["ILoraLinear", "add_mixture", "check_parent"]


class ILoraLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer plus gated low-rank experts.

    ``y = W x + s * sum_e g_e B_e A_e x`` with A of shape ``(R, in)``, B of shape ``(out, R)`` and expert e owning rows
    ``[e*R/E, (e+1)*R/E)`` of A and the same columns of B (arXiv 2408.10159, section 4.2). Written as
    ``B (f * (A x))`` with ``f`` the scaled gates repeated R/E times, it needs no output per expert: time and memory
    are those of a LoRA of rank R.

    The base layer is wrapped and called, never copied, so anything that maps ``(B, ..., in)`` to ``(B, ..., out)``
    works: ``nn.Linear``, transformers' ``Conv1D``, bitsandbytes' 8-bit and 4-bit layers.

    Args:
        base_layer: The layer to adapt.
        name: Its full name in the model.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        slot: Holds the gates of the current batch.

    Raises:
        TypeError: If the layer is not linear.
    """

    adapter_layer_names = ("ilora_A", "ilora_B", "ilora_gate")
    other_param_names = ("layouts", "ilora_dropout")

    def __init__(
        self, base_layer: nn.Module, name: str, adapter_name: str, config: ILoraConfig, slot: GateSlot
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _sizes(base_layer)
        self.base_layer = base_layer
        self.name = name
        _keep_differentiable(base_layer)
        self.ilora_A = nn.ModuleDict()
        self.ilora_B = nn.ModuleDict()
        self.ilora_gate = nn.ModuleDict()  # only for adapters with `gate_per_layer`
        self.ilora_dropout: dict[str, float] = {}
        self.layouts: dict[str, RankLayout] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self._slot = slot
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ILoraConfig) -> None:
        """Add an adapter to this layer, on the device and in the dtype of the base.

        The tuner then completes `layouts` and registers it with the slot.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
        """
        rank = config.rank_of(self.name)
        self.layouts[adapter_name] = RankLayout(rank // config.num_experts, config.scale_of(self.name))
        self.ilora_dropout[adapter_name] = config.dropout
        down = nn.Linear(self.in_features, rank, bias=False)
        up = nn.Linear(rank, self.out_features, bias=False)
        # As in LoRA: with B = 0 the adapted model starts as the base model; a random A makes the experts differ.
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.ilora_A[adapter_name], self.ilora_B[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.gate_per_layer:
            # Not moved by PEFT, which would cast it to the dtype of the base; gates are float32.
            self.ilora_gate[adapter_name] = build_gate(config).to(down.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base layer and every active adapter.

        Args:
            x: Shape ``(B, ..., in)``; the first dimension counts instances.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.

        Returns:
            Shape ``(B, ..., out)``, in the dtype of the base layer's output.

        Raises:
            GateError: If adapters are enabled and no gates, or gates of another batch size, are held.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter not in self.ilora_A:
                continue
            down, up = cast(nn.Linear, self.ilora_A[adapter]).weight, cast(nn.Linear, self.ilora_B[adapter]).weight
            factors = self._slot.factors(adapter, self.layouts[adapter], x.shape[:-1]).to(x.device)
            result = add_mixture(result, x, down, up, factors, self.ilora_dropout[adapter] if self.training else 0.0)
        return result

    def finds_gates_in(self, slot: GateSlot) -> bool:
        """Whether the layer reads its gates from this slot."""
        return self._slot is slot

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off, leaving ``requires_grad`` alone.

        PEFT's own version also freezes and unfreezes the adapter. That would change the set of trained parameters in
        the middle of a step whenever the base computes h_seq, and would unfreeze an adapter loaded for inference.
        """
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not supported.

        Raises:
            MergeError: Always.
        """
        refuse_merge()

    def unmerge(self) -> None:
        """Not supported, since nothing can have been merged.

        Raises:
            MergeError: Always.
        """
        refuse_merge()


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        in_features, out_features = layer.weight.shape
        return in_features, out_features
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            "the output projection of nn.MultiheadAttention cannot be adapted: nn.MultiheadAttention reads its weight "
            "and never calls its forward, so the adapter would be ignored; leave it out with `exclude_modules`."
        )
    # By attribute, not by class: quantised layers of all libraries have these two, and not all are nn.Linear.
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return cast(int, layer.in_features), cast(int, layer.out_features)
    raise TypeError(
        f"iLoRA adapts linear layers (nn.Linear, transformers' Conv1D, bitsandbytes 8-bit and 4-bit), got "
        f"{type(layer).__name__}; name other layers in `target_modules`, or use 'all-linear'."
    )


def check_parent(parent: nn.Module, name: str) -> None:
    """Raise for layers that their parent skips in evaluation.

    Args:
        parent: The module that holds the layer.
        name: Full name of the layer.

    Raises:
        ValueError: If the parent is an ``nn.TransformerEncoderLayer``, whose fast path reads weights only.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise not_called(name, "the fast path of nn.TransformerEncoderLayer")


def _keep_differentiable(layer: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX512-BF16.

    A forward in evaluation mode without gradients (validation, h_seq) repacks them for a kernel without backward, which
    training then uses: the layers below get no gradient (seen with bitsandbytes 0.50.2).
    TODO(#3): remove when bitsandbytes unpacks for training.
    """
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # the public way to unpack in place


def add_mixture(result: Tensor, x: Tensor, down: Tensor, up: Tensor, factors: Tensor, dropout: float = 0.0) -> Tensor:
    """Add the mixture of the experts to the base layer's output: ``result + B (f * (A drop(x)))``.

    It computes in the dtype of ``x`` (of autocast, if enabled) and casts the weights to it. PEFT's LoRA casts ``x`` to
    the dtype of the weights instead: with a bfloat16 base that saves a float32 copy of every layer's input for the
    backward pass, and the products do not use the tensor cores.

    With dropout a custom backward saves ``x`` itself (one tensor for all layers that read it) and a one-byte mask,
    where autograd would save a dropped copy of ``x`` for every layer. Without dropout there is no copy to save, and
    autograd's own functions have less overhead.

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
        # Rescale the few factors instead of all of x.
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
        mixed = _flat_rows(hidden * factors.to(dtype))  # (N, R), N = B * ...
        ctx.save_for_backward(x, kept, hidden, down, up, factors)
        rows, up = _flat_rows(result), up.to(dtype)
        # One pass over (N, out) where the types allow it, instead of a product, a copy and a sum.
        rows = torch.addmm(rows, mixed, up.T) if rows.dtype == dtype else rows + linear(mixed, up).to(rows.dtype)
        # Not `view`: autograd refuses changes in place (Falcon's rotation) of a view made inside a function of its own.
        return cast(Tensor, torch.ops.aten._unsafe_view(rows, result.shape))

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
            grad_down = (_flat_rows(grad_hidden).T @ _flat_rows(x.to(dtype) * kept)).to(down.dtype)
        if needs_x:
            grad_x = linear(grad_hidden, down.to(dtype).T).mul_(kept).to(x.dtype)
        if needs_up:
            grad_up = (_flat_rows(grad_rows).T @ _flat_rows(hidden * f)).to(up.dtype)
        if needs_factors:
            # Summed over tokens in the factors' own dtype: bfloat16 would lose small terms of a long sequence.
            grad_factors = (grad_mixed * hidden).to(factors.dtype).sum_to_size(factors.shape)
        return grad if ctx.needs_input_grad[0] else None, grad_x, grad_down, grad_up, grad_factors, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.get_autocast_dtype(device) if has_autocast and torch.is_autocast_enabled(device) else x.dtype


def _flat_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
