"""Learning rates as functions of the global step, so that a resumed run needs no scheduler state."""

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(
    step: int, *, max_steps: int, warmup_steps: int, lr: float, min_lr: float = 0.0, warmup_start_lr: float = 0.0
) -> float:
    """Warm up linearly, then decay along half a cosine (the schedule of the released iLoRA program).

    Args:
        step: Optimizer steps already done, from 0.
        max_steps: Step at which ``min_lr`` is reached.
        warmup_steps: Steps from ``warmup_start_lr`` to ``lr``; 0 starts at ``lr``.
        lr: Peak learning rate.
        min_lr: Learning rate at ``max_steps`` and after.
        warmup_start_lr: Learning rate at step 0 of the warm-up.

    Returns:
        The learning rate of the step that follows ``step`` finished ones.
    """
    if step < warmup_steps:
        return warmup_start_lr + (lr - warmup_start_lr) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * done))
