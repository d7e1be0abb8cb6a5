"""Losses of the student's own task. Each returns one value per row, in nats; the trainer takes the mean."""

import torch
from torch import Tensor

__all__ = ["cross_entropy"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probability of the target under a softmax over the whole catalogue, in float32.

    Args:
        logits: Shape ``(B, N)``.
        targets: Item ids of shape ``(B,)``.

    Returns:
        Losses of shape ``(B,)``, in nats.
    """
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
