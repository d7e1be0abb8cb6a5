"""Optimizer of a student: AdamW, optionally with row-wise state for large item tables."""

import torch
from torch import nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.optimizer import adamw
from llm2rec.student.items import ItemTable

__all__ = ["student_optimizer"]


def student_optimizer(model: nn.Module, engine: Engine, item_optimizer: str = "adamw") -> torch.optim.AdamW:
    """Build the optimizer of a student from the engine's training settings.

    Args:
        model: The student, or a model that contains one, before it is wrapped.
        engine: Training settings and processes.
        item_optimizer: ``adamw`` for all parameters, or ``rowwise`` for the item tables: two numbers of state per row.
            With ``rowwise``, one process, no clipping and sampled negatives, a step touches only the rows in use;
            otherwise gradients are dense and only the state is small.

    Raises:
        ConfigError: If ``item_optimizer`` is ``rowwise`` with DeepSpeed, which shards parameters within rows.
    """
    training = engine.training
    tables = [module for module in model.modules() if isinstance(module, ItemTable)]
    if item_optimizer != "rowwise":
        return adamw(model, training.learning_rate, training.weight_decay)
    if engine.uses_deepspeed:
        raise ConfigError(
            "student.item_optimizer is 'rowwise', which DeepSpeed does not support; use 'adamw', or a launch "
            "configuration without DeepSpeed."
        )
    for table in tables:
        # Exchange between processes and clipping need dense gradients.
        table.sparse_gradients = engine.n_processes == 1 and training.max_grad_norm == 0
    return adamw(model, training.learning_rate, training.weight_decay, rowwise=[table.weight for table in tables])
