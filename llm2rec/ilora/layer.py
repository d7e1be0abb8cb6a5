"""The adapted layer: one LoRA whose middle activation is multiplied by the gates of the instance."""

from __future__ import annotations

import math
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import ILoraConfig
from .errors import refuse_merge
from .gate import build_gate
from .mixture import add_mixture
from .slot import GateSlot, RankLayout

__all__ = ["ILoraLinear"]


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
        slot: Where the layer finds the gates of the batch in flight.

    Raises:
        TypeError: If the layer is not linear in the sense above.
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
        self.ilora_gate = nn.ModuleDict()  # gates of its own, for adapters with `gate_per_layer`
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
        # As in LoRA: with B at zero the adapted model starts as the base model, and a random A sets the experts apart.
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.ilora_A[adapter_name], self.ilora_B[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.gate_per_layer:
            # Moved by hand: PEFT would cast it to the dtype of the base, and gates are float32.
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
            GateError: If adapters are enabled and no gates, or gates of another batch, are held.
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
        """Whether this is the slot in which the layer looks for gates."""
        return self._slot is slot

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off, leaving ``requires_grad`` alone.

        PEFT's own version also freezes and thaws the adapter. That would change the set of trained parameters in the
        middle of a step whenever the base is asked for h_seq, and would thaw an adapter loaded for inference.
        """
        self._disable_adapters = not enabled

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            MergeError: Always.
        """
        refuse_merge()

    def unmerge(self) -> None:
        """Refuse: nothing can have been merged.

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
            "the output projection of nn.MultiheadAttention cannot be adapted: its forward is never called, only its "
            "weight is read, so the adapter would be ignored; leave it out with `exclude_modules`."
        )
    # By attribute, not by class: quantised layers of every library carry these two, and are not all nn.Linear.
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return cast(int, layer.in_features), cast(int, layer.out_features)
    raise TypeError(
        f"iLoRA adapts linear layers (nn.Linear, transformers' Conv1D, bitsandbytes 8-bit and 4-bit), got "
        f"{type(layer).__name__}; name other layers in `target_modules`, or use 'all-linear'."
    )


def _keep_differentiable(layer: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU with AVX512-BF16.

    A forward in evaluation mode without gradients (validation, h_seq) repacks them for a kernel that has no backward;
    training goes on with it and the layers below get no gradient (seen with bitsandbytes 0.50.2).
    TODO(#3): remove when bitsandbytes unpacks for training by itself.
    """
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # the public way to unpack: saving does it in place
