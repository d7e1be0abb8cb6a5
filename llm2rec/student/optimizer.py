"""The optimizer of a student: AdamW, optionally with row-wise state for huge item tables."""

import torch
from torch import nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.optimizer import adamw
from llm2rec.student.items import ItemTable

__all__ = ["student_optimizer"]


def student_optimizer(model: nn.Module, engine: Engine, item_optimizer: str = "adamw") -> torch.optim.AdamW:
    """Optimize a student as the engine's training settings say.

    Args:
        model: The student, or a model that holds one, before it is wrapped.
        engine: Whose settings and processes count.
        item_optimizer: ``adamw`` for all, or ``rowwise`` for the item tables: two numbers of state a row. In one
            process and without clipping, a loss on sampled negatives then touches the rows of a step only; otherwise,
            and where a loss has a gradient for all rows, gradients are dense and only the state is small.

    Raises:
        ConfigError: If rows are to be updated by DeepSpeed, which cuts parameters up wherever it likes.
    """
    training = engine.training
    tables = [module for module in model.modules() if isinstance(module, ItemTable)]
    if item_optimizer != "rowwise":
        return adamw(model, training.learning_rate, training.weight_decay)
    if engine.uses_deepspeed:
        raise ConfigError(
            "student.item_optimizer is 'rowwise', which DeepSpeed cannot divide among processes; use 'adamw', or a "
            "launch configuration without DeepSpeed."
        )
    for table in tables:
        # Processes exchange dense gradients, and a norm is taken of those.
        table.sparse_gradients = engine.n_processes == 1 and training.max_grad_norm == 0
    return adamw(model, training.learning_rate, training.weight_decay, rowwise=[table.weight for table in tables])
