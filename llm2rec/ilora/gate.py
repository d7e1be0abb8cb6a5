"""Gates: the network that computes them and the slot in which the layers find them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import ILoraConfig

__all__ = ["GateError", "GateSlot", "ILoraError", "LinearGate", "RankLayout", "build_gate"]

INITIAL_LOGIT_STD = 0.1
"""Standard deviation of a fresh gate's logits for an input whose entries have mean square 1."""


class ILoraError(Exception):
    """Root of the errors that this package raises on purpose."""


class GateError(ILoraError, RuntimeError):
    """Gates that are missing, held twice, or do not fit the model or the batch."""


class LinearGate(nn.Module):
    """The paper's gate (arXiv 2408.10159): ``g = softmax(W z)``, without a bias.

    It computes in float32 (float64 if its weight is) whatever the model's dtype and autocast say: a softmax over
    a few logits costs nothing, and bfloat16 would leave three digits of each gate.

    ``W`` starts from a normal distribution of standard deviation 0.1 / sqrt(d). Logits then have a standard deviation
    of 0.1 for inputs of unit mean square at any width, so every gate starts within a few hundredths of 1/E and no
    expert starves. Exact zeros would train too (experts differ by their A), but then all instances would share one
    mixture until W has grown; small random values tell them apart from the first step.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
    """

    def __init__(self, input_size: int, num_experts: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, input_size, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=INITIAL_LOGIT_STD / math.sqrt(self.input_size))

    def forward(self, gate_input: Tensor) -> Tensor:
        """Compute the gates of a batch.

        Args:
            gate_input: One vector per instance, shape ``(B, d)``, any float dtype.

        Returns:
            Gates of shape ``(B, E)``, float32 or float64, each row summing to 1.

        Raises:
            GateError: If the input has another number of dimensions or another width.
        """
        if gate_input.ndim != 2 or gate_input.shape[1] != self.input_size:
            raise GateError(
                f"the gate takes one vector of width {self.input_size} per row, shape (B, {self.input_size}), got "
                f"{tuple(gate_input.shape)}; pool the sequence first, or set `gate_input_size` in ILoraConfig."
            )
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(device_type=self.weight.device.type, enabled=False):
            gate_input = gate_input.to(device=self.weight.device, dtype=dtype)
            return torch.softmax(nn.functional.linear(gate_input, self.weight.to(dtype)), dim=-1)

    def extra_repr(self) -> str:
        """Describe the sizes in the module's printed form."""
        return f"input_size={self.input_size}, num_experts={self.num_experts}"


def build_gate(config: ILoraConfig) -> LinearGate:
    """Build the gate network that a configuration asks for.

    Args:
        config: Configuration whose ``gate_input_size`` is settled.

    Returns:
        A fresh gate network, on CPU, float32.
    """
    assert config.gate_input_size is not None, "the tuner settles `gate_input_size` before it builds the gate"
    return LinearGate(config.gate_input_size, config.num_experts)


class RankLayout(NamedTuple):
    """How one layer spreads the E gates over its R ranks."""

    rank_per_expert: int
    scale: float

    def spread(self, gates: Tensor) -> Tensor:
        """Repeat each gate for every rank of its expert and fold the scale in.

        Args:
            gates: Shape ``(B, E)``.

        Returns:
            Factors of the middle activation, shape ``(B, R)``; expert e owns ranks ``[e*r', (e+1)*r')``.
        """
        batch, experts = gates.shape
        spread = (gates * self.scale).unsqueeze(-1).expand(batch, experts, self.rank_per_expert)
        return spread.reshape(batch, experts * self.rank_per_expert)


class GateSlot:
    """Gates of the batch in flight, shared by all adapted layers of one model.

    It is no module and holds no parameters: nothing of it is saved.
    """

    def __init__(self) -> None:
        self._layouts: dict[str, set[RankLayout]] = {}
        self._factors: dict[str, dict[RankLayout, Tensor]] | None = None

    @property
    def held(self) -> bool:
        """Whether gates are held now."""
        return self._factors is not None

    def register(self, adapter: str, layout: RankLayout) -> None:
        """Tell the slot that a layer of this adapter will ask for this layout."""
        self._layouts.setdefault(adapter, set()).add(layout)

    def forget(self, adapter: str) -> None:
        """Drop what was registered for an adapter."""
        self._layouts.pop(adapter, None)

    @contextmanager
    def hold(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold gates for the forward AND the backward pass of one batch.

        Non-reentrant checkpointing runs blocks again during backward, so the gates must still be there. For the same
        reason they are spread over the ranks here, once, and not by the first layer that asks: that layer may lie
        inside a checkpointed block, whose second run would then record other operations than its first.

        Args:
            gates: For each active adapter, gates of shape ``(B, E)``.

        Yields:
            Nothing.

        Raises:
            GateError: If gates are already held.
        """
        if self._factors is not None:
            raise GateError("gates are already held; close the outer `hold` before opening another.")
        self._factors = {
            adapter: {layout: layout.spread(held) for layout in self._layouts.get(adapter, ())}
            for adapter, held in gates.items()
        }
        try:
            yield
        finally:
            self._factors = None

    def factors(self, adapter: str, layout: RankLayout, n_rows: int) -> Tensor:
        """Give a layer the factors of its middle activation.

        Args:
            adapter: Name of the adapter.
            layout: The layer's layout, registered before the gates were held.
            n_rows: Rows of the layer's input (its first dimension).

        Returns:
            Shape ``(B, R)``, scale included.

        Raises:
            GateError: If no gates are held, none for this adapter, or for another number of rows.
        """
        if self._factors is None:
            raise GateError(
                "an adapted layer ran without gates; run forward and backward inside "
                "`with peft_model.base_model.instance(gate_input):` (or `.hold(gates)`), and the base model alone "
                "inside `with frozen_base(peft_model):`. With gradient checkpointing the backward pass needs them too."
            )
        if adapter not in self._factors:
            raise GateError(
                f"adapter {adapter!r} is active but the gates held are for {sorted(self._factors)}; hold gates for "
                "every active adapter, or open `hold` after `set_adapter`."
            )
        factors = self._factors[adapter][layout]
        if factors.shape[0] != n_rows:
            raise GateError(_rows_message(factors.shape[0], n_rows))
        return factors


def _rows_message(n_gates: int, n_rows: int) -> str:
    message = f"gates cover {n_gates} rows but the layer received {n_rows}; "
    if n_rows % n_gates == 0:
        times = n_rows // n_gates
        return message + (
            f"repeat them once per beam (`gates.repeat_interleave({times}, dim=0)`), or, where the model flattens "
            "(B, T, d) to (B*T, d) in front of this layer, leave the layer out with `exclude_modules`."
        )
    return message + "compute the gates from the same batch."
