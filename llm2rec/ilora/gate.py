"""Gate networks: from one vector per instance to the weights of its experts."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import GateKind, ILoraConfig
from .errors import GateError

__all__ = [
    "GATES",
    "ConvGate",
    "DropoutGate",
    "Gate",
    "LinearGate",
    "MLPGate",
    "NoisyGate",
    "ReleasedTopKGate",
    "TopKGate",
    "build_gate",
]

INITIAL_LOGIT_STD = 0.1
"""Standard deviation of a fresh gate's logits for an input whose entries have mean square 1."""


class Gate(nn.Module):
    """A gate network: ``g = softmax(logits(z) / temperature)``. Kinds differ in their logits or in how these are mixed.

    It computes in float32 (float64 if its weights are) regardless of the model's dtype and autocast: a softmax over
    a few logits costs nothing, and bfloat16 would keep three digits of each gate.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
        temperature: Divides the logits; above 1 evens the mixture out, below 1 sharpens it.
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.input_size = input_size
        self.num_experts = num_experts
        self.temperature = temperature

    def forward(self, gate_input: Tensor) -> Tensor:
        """Compute the gates of a batch.

        Args:
            gate_input: One vector per instance, shape ``(B, d)``, any float dtype.

        Returns:
            Gates of shape ``(B, E)``, float32 or float64, each row summing to 1.

        Raises:
            GateError: If the input has no float dtype or another shape.
        """
        if not isinstance(gate_input, Tensor) or not gate_input.is_floating_point():
            got = gate_input.dtype if isinstance(gate_input, Tensor) else type(gate_input)
            raise GateError(f"the gate's input must be a tensor of floats, got {got}; embed ids and categories first.")
        if gate_input.ndim != 2 or gate_input.shape[1] != self.input_size:
            raise GateError(
                f"the gate takes one vector of width {self.input_size} per row, shape (B, {self.input_size}), got "
                f"{tuple(gate_input.shape)}; pool the sequence first, or set `gate_input_size` in ILoraConfig."
            )
        weight = next(self.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        has_autocast = torch.amp.is_autocast_available(weight.device.type)  # the meta device has none
        with torch.autocast(weight.device.type, enabled=False) if has_autocast else nullcontext():
            logits = self.logits(gate_input.to(device=weight.device, dtype=dtype))
            return self.mix(logits.to(dtype) / self.temperature)

    def logits(self, gate_input: Tensor) -> Tensor:
        """Logits of shape ``(B, E)`` for checked input of shape ``(B, d)``."""
        raise NotImplementedError

    def mix(self, logits: Tensor) -> Tensor:
        """Turn logits of shape ``(B, E)`` into gates of the same shape."""
        return torch.softmax(logits, dim=-1)

    def extra_repr(self) -> str:
        """Describe the sizes in the module's printed form."""
        return f"input_size={self.input_size}, num_experts={self.num_experts}, temperature={self.temperature}"


class LinearGate(Gate):
    """The paper's gate (arXiv 2408.10159): ``g = softmax(W z)``, without a bias.

    ``W`` starts from a normal distribution of standard deviation 0.1 / sqrt(d). Logits then have a standard deviation
    of 0.1 for inputs of unit mean square at any width, so every gate starts within a few hundredths of 1/E and no
    expert starves. Exact zeros would train too (experts differ by their A), but all instances would share one mixture
    until W has grown; with small random values they differ from the first step.
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0) -> None:
        super().__init__(input_size, num_experts, temperature)
        self.weight = nn.Parameter(torch.empty(num_experts, input_size, dtype=torch.float32))
        _start_near_uniform(self.weight)

    def logits(self, gate_input: Tensor) -> Tensor:
        """``W z``."""
        return functional.linear(gate_input, self.weight.to(gate_input.dtype))


class NoisyGate(LinearGate):
    """A linear gate with Gaussian noise on its logits in training, which makes it explore other experts.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
        temperature: Divides the logits, noise included.
        noise: Standard deviation of the noise.
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0, noise: float = 0.1) -> None:
        super().__init__(input_size, num_experts, temperature)
        self.noise = noise

    def logits(self, gate_input: Tensor) -> Tensor:
        """``W z``, plus noise in training."""
        logits = super().logits(gate_input)
        return logits + self.noise * torch.randn_like(logits) if self.training else logits


class DropoutGate(LinearGate):
    """A linear gate with dropout on its logits in training.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
        temperature: Divides the logits.
        dropout: Probability of setting a logit to zero (the logit of a uniform gate, not of a closed one).
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0, dropout: float = 0.1) -> None:
        super().__init__(input_size, num_experts, temperature)
        self.dropout = dropout

    def logits(self, gate_input: Tensor) -> Tensor:
        """``W z``, some of them zero in training."""
        return functional.dropout(super().logits(gate_input), self.dropout, self.training)


class TopKGate(LinearGate):
    """A linear gate that keeps the k largest probabilities and divides them by their sum; the other gates are 0.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
        temperature: Divides the logits.
        top_k: Experts kept, k.
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0, top_k: int = 2) -> None:
        super().__init__(input_size, num_experts, temperature)
        self.top_k = top_k

    def mix(self, logits: Tensor) -> Tensor:
        """Softmax over the k largest logits, which is the same as dividing their probabilities by their sum."""
        best, experts = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, experts, torch.softmax(best, dim=-1))


class ReleasedTopKGate(TopKGate):
    """Top-k of the released program: a second softmax over the k largest *probabilities*.

    Probabilities differ by less than 1, so k kept experts always get nearly equal gates. With its default k = 1 the
    gate is 1 whatever the logits, so W receives no gradient and the routing stays the random one of the start.
    """

    def mix(self, logits: Tensor) -> Tensor:
        """Softmax over the k largest probabilities."""
        return super().mix(torch.softmax(logits, dim=-1))


class MLPGate(Gate):
    """Two layers with biases and a GELU between them.

    Args:
        input_size: Width d of the gate's input.
        num_experts: Experts E.
        temperature: Divides the logits.
        hidden_size: Width of the layer between.
    """

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0, hidden_size: int = 128) -> None:
        super().__init__(input_size, num_experts, temperature)
        self.down = nn.Linear(input_size, hidden_size, dtype=torch.float32)
        self.up = nn.Linear(hidden_size, num_experts, dtype=torch.float32)
        _start_near_uniform(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def logits(self, gate_input: Tensor) -> Tensor:
        """``W2 gelu(W1 z + b1) + b2``."""
        return _linear(self.up, functional.gelu(_linear(self.down, gate_input)))


class ConvGate(Gate):
    """Router of the released program: a 1-D residual network that reads the vector as a signal of d samples.

    Nine blocks of two convolutions (16, 32, 64 channels), the mean over positions, one linear layer. Provided for
    comparison: neighbouring entries of a user vector are unrelated, and batch normalisation makes a row's gate depend
    on the other rows of its batch in training. In evaluation rows are independent.
    Unlike the other gates it computes in the dtype of its weights.
    """

    CHANNELS = (16, 32, 64)
    BLOCKS_PER_STAGE = 3

    def __init__(self, input_size: int, num_experts: int, temperature: float = 1.0) -> None:
        super().__init__(input_size, num_experts, temperature)
        first, *_, last = self.CHANNELS
        self.stem = _convolution(1, first)
        self.stem_norm = nn.BatchNorm1d(first)
        blocks, channels = [], first
        for stage, wider in enumerate(self.CHANNELS):
            for block in range(self.BLOCKS_PER_STAGE):
                blocks.append(_ResidualBlock(channels, wider, stride=2 if stage and not block else 1))
                channels = wider
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(last, num_experts)
        _start_near_uniform(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def logits(self, gate_input: Tensor) -> Tensor:
        """The network on one channel of d samples."""
        signal = gate_input.unsqueeze(1).to(self.stem.weight.dtype)  # (B, 1, d)
        signal = self.blocks(functional.relu(self.stem_norm(self.stem(signal))))  # (B, 64, d / 4)
        return cast(Tensor, self.head(signal.mean(dim=-1)))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.stride, self.widening = stride, wider - channels
        self.conv1, self.norm1 = _convolution(channels, wider, stride), nn.BatchNorm1d(wider)
        self.conv2, self.norm2 = _convolution(wider, wider), nn.BatchNorm1d(wider)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, S)
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        before = self.widening // 2  # new channels are zero in the short cut, half of them on either side
        short_cut = functional.pad(x[:, :, :: self.stride], (0, 0, before, self.widening - before))
        return functional.relu(y + short_cut)


def _convolution(channels: int, wider: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(channels, wider, kernel_size=3, stride=stride, padding=1, bias=False)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _start_near_uniform(weight: Tensor) -> None:
    nn.init.normal_(weight, std=INITIAL_LOGIT_STD / math.sqrt(weight.shape[1]))


GATES: dict[GateKind, type[Gate]] = {
    "linear": LinearGate,
    "mlp": MLPGate,
    "topk": TopKGate,
    "topk_released": ReleasedTopKGate,
    "noisy": NoisyGate,
    "dropout": DropoutGate,
    "conv": ConvGate,
}
"""Gate networks by their names in `ILoraConfig.gate`."""


def build_gate(config: ILoraConfig) -> Gate:
    """Build the gate network of a configuration.

    Args:
        config: Configuration with ``gate_input_size`` set.

    Returns:
        A fresh gate network, on CPU, float32.
    """
    assert config.gate_input_size is not None, "the tuner sets `gate_input_size` before it builds the gate"
    sizes = (config.gate_input_size, config.num_experts, config.gate_temperature)
    return GATES[config.gate](*sizes, **config.gate_options)
