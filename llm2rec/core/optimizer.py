"""AdamW with weight decay on matrices only."""

import torch
from torch import nn

__all__ = ["adamw"]


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Optimize the trained parameters of ``model``; vectors (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
