"""The weights of an ensemble: given ones, chosen ones, and what each member is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.members import Member
from llm2rec.ensemble.model import GroupWeights
from llm2rec.ensemble.search import STARTS, Free, Sample, choose, normalised, temperatures_of
from llm2rec.ensemble.settings import EnsembleSettings
from llm2rec.student.datamodule import SeenItems

__all__ = ["Choice", "chosen_weights", "given_weights", "member_table"]

_SETTINGS = {"student": "students", "neighbours": "neighbours", "titles": "titles", "teacher": "teachers"}


@dataclass(frozen=True)
class Choice:
    """What the search chose, as saved in ``metrics/members.json``.

    Attributes:
        weights: Weights of each group of members.
        members: For each member what it is, its share, temperature and options, the metric of it alone, and the metric
            without it, the others sharing its part; None if there are no others.
        search: ``metric``, ``rows``, ``seed``, ``trials``, and the ``value`` of the mixture.
    """

    weights: dict[str, GroupWeights]
    members: list[dict[str, Any]]
    search: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        weights = {name: vars(each) | {"options": dict(each.options)} for name, each in self.weights.items()}
        return {"weights": weights, "members": self.members, "search": self.search}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Choice":
        """Restore the result of `to_dict`."""
        weights = {name: GroupWeights(**each) for name, each in values["weights"].items()}
        return cls(weights, values["members"], values["search"])


def given_weights(
    members: Sequence[Member], settings: EnsembleSettings
) -> tuple[dict[str, GroupWeights], dict[str, Free]]:
    """Weights to start from, with the given values, and what is free, for each group of members.

    Raises:
        ConfigError: If no member has a share.
    """
    kinds = {member.group: member.kind for member in members}
    weights, free = {}, {}
    for group, kind in kinds.items():
        given, usual = getattr(settings, _SETTINGS[kind]), STARTS[kind]
        options = {name: getattr(given, name) for name in usual.options}
        share = given.share
        if share is not None and kind == "teacher":
            share /= sum(each == "teacher" for each in kinds.values())
        weights[group] = GroupWeights(
            usual.share if share is None else share,
            usual.temperature if given.temperature is None else given.temperature,
            {name: usual.options[name] if value is None else value for name, value in options.items()},
        )
        chosen = tuple(name for name, value in options.items() if value is None)
        free[group] = Free(share is None, given.temperature is None, chosen)
    if not any(each.share for each in free.values()) and not any(each.share > 0 for each in weights.values()):
        raise ConfigError("no member of the ensemble has a share above 0; leave one share out, to choose it.")
    return weights, free


def chosen_weights(
    members: Sequence[Member],
    settings: EnsembleSettings,
    rows: SplitRows,
    numbers: NDArray[np.int64],
    metric: str,
    seed: int,
    *,
    seen: SeenItems | None = None,
    device: torch.device | str = "cpu",
) -> Choice:
    """Choose the weights that are not given, and measure the members; on one process.

    Args:
        members: The members.
        settings: Given weights, and the size of the search.
        rows: The validation split, with histories long enough for every member.
        numbers: Validation rows to use, ascending.
        metric: The metric to choose by.
        seed: Seed of the choice of rows, for the record.
        seen: Items to leave out of each row's ranking.
        device: Device of the members.

    Raises:
        ConfigError: If no member has a share.
    """
    kinds = {member.group: member.kind for member in members}
    start, free = given_weights(members, settings)
    common: dict[str, Any] = {"seen": seen, "device": device, "batch_rows": settings.batch_rows}
    weights, tries = normalised(start, free), 1
    if any(each.share or each.temperature or each.options for each in free.values()) and len(members) > 0:
        temperatures = {group: temperatures_of(kinds[group], start[group], free[group]) for group in kinds}
        variants = {
            group: [
                start[group].options,
                *({**start[group].options, "whitening": 0.5},) * ("whitening" in each.options),
            ]
            for group, each in free.items()
        }
        sample = Sample(members, rows, numbers, metric, temperatures=temperatures, variants=variants, **common)
        weights, tries = choose(sample, kinds, start, free, settings.search.rounds)
        del sample
    # Anew, so that the candidates are the best items of the chosen members.
    measured = Sample(
        members,
        rows,
        numbers,
        metric,
        temperatures={group: (each.temperature,) for group, each in weights.items()},
        variants={group: [each.options] for group, each in weights.items()},
        **common,
    )
    entries = [_measured(number, measured, weights) for number in range(len(members))]
    search = {
        "metric": metric, "rows": len(numbers), "seed": seed, "trials": tries, "value": measured.value(weights)
    }  # fmt: skip
    return Choice(weights, entries, search)


def _measured(number: int, sample: Sample, weights: Mapping[str, GroupWeights]) -> dict[str, Any]:
    member = sample.members[number]
    group = weights[member.group]
    size = sum(each.group == member.group for each in sample.members)
    return {
        "kind": member.kind,
        **member.about,
        "share": group.share / size,
        "temperature": group.temperature,
        **group.options,
        "alone": sample.value(weights, only=number),
        "without": sample.value(weights, without=number) if len(sample.members) > 1 else None,
    }


def member_table(choice: Choice) -> list[str]:
    """Lines of a table of the members, for the log."""
    metric = choice.search["metric"]
    lines = [f"{'member':<44} {'share':>6} {'temp.':>6}  {metric + ' alone':>14} {'without it':>11}"]
    for each in choice.members:
        options = ", ".join(f"{name} {each[name]:g}" for name in ("whitening", "decay") if name in each)
        of = each.get("llm") or " ".join(str(each[name]) for name in ("label", "run") if name in each)
        name = f"{each['kind']} {of}{f' ({options})' if options else ''}".strip()
        without = "-" if each["without"] is None else f"{each['without']:.4f}"
        lines.append(f"{name:<44} {each['share']:6.3f} {each['temperature']:6.3g}  {each['alone']:14.4f} {without:>11}")
    lines.append(f"{'all':<44} {1:6.3f} {'':6}  {choice.search['value']:14.4f}")
    return lines
