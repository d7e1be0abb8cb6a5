"""Run the base model without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel

from .config import ILoraConfig
from .errors import ILoraError
from .model import ILoraModel

__all__ = ["frozen_base"]


@contextmanager
def frozen_base(peft_model: PeftModel) -> Iterator[None]:
    """Run the base model alone: adapters off, no gradients, evaluation mode; works with and without gates held.

    The gate's input h_seq is computed this way. It does not depend on trained weights, so it can be computed once per
    sequence and cached; evaluation mode switches off dropout of the base.

    Args:
        peft_model: The model, not wrapped for distributed training.

    Yields:
        Nothing. On leaving, adapters and the mode of every module are as before.

    Raises:
        TypeError: If the model is wrapped, or has no iLoRA adapter.
        ILoraError: If an adapter trains biases of the base: what is trained is not frozen.
    """
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, ILoraModel):
        raise TypeError(
            f"`frozen_base` takes a PeftModel with an iLoRA adapter, got {type(peft_model).__name__}; "
            "unwrap the model first (`accelerator.unwrap_model(model)`)."
        )
    for name, config in tuner.peft_config.items():
        bias = cast(ILoraConfig, config).bias
        if bias != "none":
            raise ILoraError(
                f"adapter {name!r} trains biases of the base (bias={bias!r}), so there is no frozen base to run; use "
                "bias='none', or take the gate's input from elsewhere."
            )
    # Not `peft_model.disable_adapter()`: it collects the status of every layer and parameter, too slow for once a step,
    # and unfreezes `modules_to_save` on leaving.
    modules = list(peft_model.modules())
    training = [module for module in modules if module.training]
    enabled = [module for module in modules if getattr(module, "_disable_adapters", None) is False]
    for module in training:
        module.training = False
    for module in enabled:
        module._disable_adapters = True  # type: ignore[assignment]
    try:
        with torch.no_grad():
            yield
    finally:
        for module in enabled:
            module._disable_adapters = False  # type: ignore[assignment]
        for module in training:
            module.training = True
