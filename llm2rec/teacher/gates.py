"""Gates in training: the load-balance loss, and a monitor that warns when they collapse."""

import logging
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.engine import Engine
from llm2rec.ilora import gate_health
from llm2rec.teacher.ilora_model import LLMTeacher

__all__ = ["GateMonitor", "balance_losses", "mean_gates"]

logger = logging.getLogger(__name__)
_BLOCK_ROWS = 4096  # gates per layer of a large model take a kilobyte a row


def mean_gates(model: LLMTeacher, gate_inputs: NDArray[np.float32], step: OptimizerStep, engine: Engine) -> Tensor:
    """Mean gate of each expert over all rows of an optimizer step, on all processes; a collective.

    Args:
        model: The teacher, not wrapped.
        gate_inputs: Gate inputs of all training rows, shape ``(M, d)``.
        step: The step.
        engine: Splits the rows and sums over processes.

    Returns:
        Shape ``(E,)``, or ``(G, E)`` for gates per layer; float64, without gradient. Computed in evaluation mode: for
        gates with noise, dropout or batch normalisation it estimates the mean of the gates in training.
    """
    mine = engine.micro_batches(step)
    rows, weights = (np.concatenate(each) for each in zip(*((m.units, m.weights) for m in mine), strict=True))
    gates = model.evaluation_gates(torch.from_numpy(gate_inputs[rows]).to(engine.device)).double()
    total = torch.tensordot(torch.from_numpy(weights).to(gates), gates, dims=1)
    # In float64, and summed before it is divided: the same for every number of processes, but for the last digits.
    return engine.sum_tensor(total) / step.n_rows


def balance_losses(gates: Tensor, use: Tensor) -> Tensor:
    """Per-row losses whose mean over an optimizer step is `llm2rec.ilora.balance_loss` of the whole step.

    ``L = E * sum_e m_e^2 - 1`` is no mean over rows, since the mean m stands inside a square; its gradient is one,
    ``dL = mean_b (2 E * sum_e m_e dg_be)``, once m is known. Each row gets the value L and that gradient, and the mean
    over the step's rows has both, however the step is split into micro-batches and processes.

    Args:
        gates: Gates of a micro-batch, shape ``(B, E)`` or ``(B, G, E)``.
        use: What `mean_gates` returned for its step, shape ``(E,)`` or ``(G, E)``.

    Returns:
        Shape ``(B,)``, in the dtype of ``gates``; the mean over layers for gates per layer.
    """
    n_experts = gates.shape[-1]
    value = n_experts * use.square().sum(dim=-1).mean() - 1
    towards = 2 * n_experts * (gates * use.to(gates)).sum(dim=-1)  # (B,) or (B, G)
    towards = towards.reshape(len(gates), -1).mean(dim=1)
    return value.to(gates) + (towards - towards.detach())


class GateMonitor:
    """Measures the gates of some rows at each evaluation, and warns once when they have collapsed.

    Args:
        model: The teacher, not wrapped.
        gate_inputs: Gate inputs of the rows, shape ``(M, d)``.
        engine: Device, and which process warns.
    """

    def __init__(self, model: LLMTeacher, gate_inputs: NDArray[np.float32], engine: Engine) -> None:
        self.model, self.gate_inputs, self.engine = model, gate_inputs, engine
        self._has_warned = False

    def measure(self, step: int) -> dict[str, float]:
        """Current figures by name, to log at ``step``; see `llm2rec.ilora.GateHealth`. Empty without experts."""
        if self.model.tuner is None:
            return {}
        blocks = [
            self.model.evaluation_gates(torch.from_numpy(block).to(self.engine.device)).cpu()
            for block in np.split(self.gate_inputs, range(_BLOCK_ROWS, len(self.gate_inputs), _BLOCK_ROWS))
        ]
        health = gate_health(torch.cat(blocks))
        if health.collapsed and self.engine.is_main and not self._has_warned:
            self._has_warned = True
            with warnings.catch_warnings(record=True) as caught:  # goes to the log instead, in its form and file
                warnings.simplefilter("always")
                health.warn_if_collapsed()
            for warning in caught:
                logger.warning(
                    "step %d: %s See `teacher.gate_learning_rate_ratio`, `teacher.adapter.gate_temperature` and "
                    "`teacher.balance_loss`. This warning is shown once; train/gate_use_* continues.",
                    step,
                    warning.message,
                )
        return health.scalars()
