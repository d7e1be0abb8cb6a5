"""Expert utilisation: statistics, a collapse warning, and the load-balance loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GateError

__all__ = ["GateCollapseWarning", "GateHealth", "balance_loss", "gate_health"]

COLLAPSE_USE = 0.9
COLLAPSE_ROWS = 32


class GateCollapseWarning(UserWarning):
    """Nearly all instances use the same expert; training continues with one E-th of the rank."""


@dataclass(frozen=True)
class GateHealth:
    """Statistics of the gates of many instances.

    Attributes:
        n_rows: Instances, B.
        entropy: Mean entropy of an instance's gates, in nats: log E for an even mixture, 0 for a single expert.
        information: Entropy of the mean gates minus mean entropy, in nats (the mutual information of instance and
            expert): 0 if all instances share one mixture (a plain LoRA); at most log E.
        use: Mean gate of each expert, shape ``(E,)``, or ``(G, E)`` for gates per layer; float32, on the CPU.
    """

    n_rows: int
    entropy: float
    information: float
    use: Tensor

    @property
    def collapsed(self) -> bool:
        """Whether some gate network gives one expert more than 90 % of the gate mass.

        Always False with fewer than 32 instances, which may be similar by chance.
        """
        return self.n_rows >= COLLAPSE_ROWS and self.use.shape[-1] > 1 and bool((self.use > COLLAPSE_USE).any())

    def scalars(self) -> dict[str, float]:
        """Statistics by name, for logging; the use of each expert is averaged over layers."""
        use = self.use.reshape(-1, self.use.shape[-1]).mean(dim=0)
        named = {f"gate_use_{expert}": share for expert, share in enumerate(use.tolist())}
        return {"gate_entropy": self.entropy, "gate_information": self.information, **named}

    def warn_if_collapsed(self) -> None:
        """Warn with `GateCollapseWarning` if a gate network has collapsed onto one expert."""
        if self.collapsed:
            warnings.warn(
                f"one expert has {self.use.max().item():.0%} of the gate mass of {self.n_rows} instances; the others "
                "are hardly used. Lower the gate's learning rate, scale its inputs down, raise `gate_temperature`, or "
                "add `balance_loss(gates)` to the loss.",
                GateCollapseWarning,
                stacklevel=2,
            )


def gate_health(gates: Tensor) -> GateHealth:
    """Measure how experts are used.

    Args:
        gates: Gates of many instances, shape ``(B, E)``, or ``(B, G, E)`` with a gate per layer.

    Returns:
        Statistics, averaged over instances (and layers).

    Raises:
        GateError: If there are no instances, or the gates are not finite.
    """
    _check(gates)
    gates = gates.detach().float()
    if not torch.isfinite(gates).all():
        raise GateError("gates are not finite; check the gate's input and weights.")
    use = gates.mean(dim=0)
    entropy = _entropy(gates).mean()
    return GateHealth(len(gates), entropy.item(), (_entropy(use).mean() - entropy).item(), use.cpu())


def balance_loss(gates: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' mean gates (Shazeer et al., arXiv 1701.06538, equation 7).

    ``E * sum_e (mean_b g_be)^2 - 1``: 0 if all experts are used equally over the batch, however peaked each instance's
    gates are, and E - 1 if all instances use a single expert. The mean over instances is squared, so the loss of a
    batch is not the mean over its micro-batches.

    Args:
        gates: Shape ``(B, E)``, or ``(B, G, E)`` with a gate per layer.

    Returns:
        A scalar (the mean over layers), float32 or wider, differentiable.

    Raises:
        GateError: If there are no instances.
    """
    _check(gates)
    use = gates.to(torch.promote_types(gates.dtype, torch.float32)).mean(dim=0)
    return gates.shape[-1] * use.square().sum(dim=-1).mean() - 1


def _entropy(gates: Tensor) -> Tensor:
    return torch.special.entr(gates).sum(dim=-1)


def _check(gates: Tensor) -> None:
    if gates.ndim not in (2, 3) or len(gates) == 0:
        raise GateError(
            f"gates must have shape (B, E) or (B, G, E) with at least one instance, got {tuple(gates.shape)}."
        )
