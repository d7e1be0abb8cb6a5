"""Convert one instance's mixture to a plain LoRA adapter, which any LoRA server can load."""

from __future__ import annotations

from statistics import mode
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .config import ILoraConfig
from .errors import GateError, ILoraError
from .model import ILoraModel

__all__ = ["fold"]


def fold(peft_model: PeftModel, gates: Tensor, adapter: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Fold the mixture of ONE instance into a LoRA adapter of PEFT.

    With gates fixed, ``s * sum_e g_e B_e A_e`` is a LoRA of rank R: A stays, and each column of B is multiplied by the
    gate of its expert. ``lora_alpha`` is chosen so that LoRA's own factor, alpha / R, is s. The result loads with
    ``PeftModel.from_pretrained`` without llm2rec installed, and its outputs equal those of the model while it holds the
    same gates::

        config, tensors = fold(model, gates)
        config.save_pretrained(folder)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")

    Args:
        peft_model: Model with an iLoRA adapter, not wrapped for distributed training.
        gates: Gates of the instance, shape ``(E,)`` or ``(1, E)``; ``(G, E)`` or ``(1, G, E)`` with a gate per layer.
        adapter: Name of the iLoRA adapter.

    Returns:
        The configuration, and the tensors by their names in an adapter file; on the CPU, without gradient.

    Raises:
        GateError: If the gates belong to several instances or do not fit the adapter.
        ILoraError: If the model has no iLoRA adapter of that name.
    """
    tuner = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, ILoraModel) or adapter not in tuner.peft_config:
        names = sorted(tuner.peft_config) if isinstance(tuner, ILoraModel) else []
        raise ILoraError(f"no iLoRA adapter {adapter!r} to fold; the model has {names}.")
    gates = _one_instance(gates, tuner, adapter)
    # Fully trained modules and biases are copied unchanged.
    saved = get_peft_model_state_dict(peft_model, adapter_name=adapter)
    tensors = {key: tensor for key, tensor in saved.items() if ".ilora_" not in key}
    for layer in tuner.adapted_layers(adapter):
        down, up = (cast(Any, part[adapter]).weight for part in (layer.ilora_A, layer.ilora_B))
        factors = layer.layouts[adapter]._replace(scale=1.0).spread(gates)  # (1, R)
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = up * factors.to(up)
    # Clones, so that further training does not change them.
    plain = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    return _lora_config(tuner, cast(ILoraConfig, tuner.peft_config[adapter]), adapter), plain


def _one_instance(gates: Tensor, tuner: ILoraModel, adapter: str) -> Tensor:
    """Gates of shape ``(1, E)`` or ``(1, G, E)``, checked."""
    if not isinstance(gates, Tensor) or gates.ndim == 0:
        raise GateError(f"gates must be a tensor of shape (E,), got {gates!r}.")
    per_layer = adapter not in tuner.ilora_gate
    if gates.ndim == 1 or (per_layer and gates.ndim == 2 and len(gates) > 1):
        gates = gates.unsqueeze(0)
    if len(gates) != 1:
        raise GateError(
            f"a plain LoRA holds the mixture of one instance, got gates of shape {tuple(gates.shape)}; fold one row "
            "at a time."
        )
    tuner.check_gates(adapter, gates)
    if not torch.isfinite(gates).all():
        raise GateError(f"the gates to fold are not finite: {gates.flatten()[:8].tolist()}.")
    return gates


def _lora_config(tuner: ILoraModel, config: ILoraConfig, adapter: str) -> LoraConfig:
    # Read from the layers, since the configuration may have been edited after they were built.
    layouts = {layer.name: layer.layouts[adapter] for layer in tuner.adapted_layers(adapter)}
    ranks = {name: layout.rank_per_expert * config.num_experts for name, layout in layouts.items()}
    alphas = {name: layout.scale * ranks[name] for name, layout in layouts.items()}
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=cast(int, alpha),
        lora_dropout=0.0,
        target_modules=list(layouts),
        rank_pattern={_exactly(name): each for name, each in ranks.items() if each != rank},
        alpha_pattern={_exactly(name): each for name, each in alphas.items() if each != alpha},
        fan_in_fan_out=any(isinstance(layer.base_layer, Conv1D) for layer in tuner.adapted_layers(adapter)),
        modules_to_save=config.modules_to_save,
        bias={"none": "none", "all": "all", "ilora_only": "lora_only"}[config.bias],  # type: ignore[arg-type]
    )


def _exactly(name: str) -> str:
    """A pattern that PEFT matches with this layer alone: it reads patterns as regular expressions on name endings."""
    return "^" + name.replace(".", r"\.")
