"""AdamW with weight decay on matrices only, and learning rates of their own for parts of a model."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.rowwise import RowwiseAdamW

__all__ = ["adamw"]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    lr_ratios: Mapping[str, float] | None = None,
    weight_decays: Mapping[str, float] | None = None,
    rowwise: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """Optimize the trained parameters of ``model``; vectors (biases, norms) are not decayed.

    Args:
        model: The model, before it is wrapped.
        lr: Learning rate.
        weight_decay: Decoupled weight decay of matrices.
        lr_ratios: Factors on the learning rate of the parameters that have this component in their dotted name
            (``"gate"`` means ``layer.gate.weight``, not ``layer.gate_proj.weight``); the first that fits counts.
        weight_decays: Weight decays of the same components, where they differ from ``weight_decay``.
        rowwise: Tables that are updated row by row, with two numbers of state a row; see `RowwiseAdamW`.

    Returns:
        The optimizer. Its groups carry their component as ``name`` and their factor as ``lr_ratio``, which
        `Engine.begin_step` reads.

    Raises:
        ConfigError: If a factor is not a positive finite number, or no trained parameter has its component.
    """
    ratios, decays = dict(lr_ratios or {}), dict(weight_decays or {})
    _check(ratios, decays)
    tables = {id(parameter) for parameter in rowwise}
    groups: dict[tuple[bool, str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named = next((each for each in ratios if each in name.split(".")), None)
            groups.setdefault((parameter.ndim >= 2, named, id(parameter) in tables), []).append(parameter)
    if unmatched := ratios.keys() - {named for _, named, _ in groups}:
        raise ConfigError(
            f"learning-rate ratios are given for {', '.join(sorted(unmatched))}, which no trained parameter has as a "
            "part of its name; correct the name, or leave it out."
        )
    return (RowwiseAdamW if tables else torch.optim.AdamW)(
        [
            {
                "params": parameters,
                "weight_decay": decays.get(named or "", weight_decay) if is_matrix else 0.0,
                "name": named,
                "lr_ratio": 1.0 if named is None else ratios[named],
                "rowwise": is_table,
            }
            for (is_matrix, named, is_table), parameters in groups.items()
        ],
        lr=lr,
        fused=True,
    )


def _check(ratios: Mapping[str, float], decays: Mapping[str, float]) -> None:
    if strangers := decays.keys() - ratios.keys():
        raise ConfigError(
            f"weight decays are given for {', '.join(sorted(strangers))}, expected components that have a "
            "learning-rate ratio too; give them one, 1 for the rate of the rest."
        )
    for component, ratio in ratios.items():
        if not 0 < ratio < float("inf"):
            raise ConfigError(
                f"the learning-rate ratio of {component!r} is {ratio}, expected a positive finite number; 1 trains it "
                "at the rate of the rest."
            )
