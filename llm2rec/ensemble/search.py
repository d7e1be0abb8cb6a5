"""Choose an ensemble's shares, temperatures and other options on validation rows, and measure each member's part.

The search is a coordinate search from fixed starting points over small grids: without random draws, it gives the same
result for the same rows on any number of processes. Members score each row's catalogue once per option that changes
their scores. Kept are the scores of a few candidates of each row, the best of every member, so that a try takes
milliseconds. The rank of a target among the candidates is its rank in the catalogue unless an item outside of all
members' best is above it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.logging import Progress
from llm2rec.core.metrics import ranking_metrics
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.members import Member
from llm2rec.ensemble.model import GroupWeights, rows_at_once
from llm2rec.student.datamodule import SeenItems

__all__ = ["Free", "Sample", "Weights", "choose", "normalised", "sample_rows", "temperatures_of"]

logger = logging.getLogger(__name__)

Weights = Mapping[str, GroupWeights]
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TEMPERATURES = {
    "student": (0.5, 0.7, 1.0, 1.4, 2.0, 3.0),
    "neighbours": (0.4, 0.5, 2 / 3, 0.8, 1.0, 1.4),
    "titles": (0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3),
    "teacher": (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0),
}
OPTIONS = {"whitening": (0.0, 0.25, 0.5, 0.75, 1.0), "decay": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
STARTS = {
    "student": GroupWeights(0.3, 1.0),
    "neighbours": GroupWeights(0.2, 2 / 3),  # powers of 1.5
    "titles": GroupWeights(0.5, 0.1, {"whitening": 0.0, "decay": 0.7}),
    "teacher": GroupWeights(0.2, 1.0),
}
_N_BEST = 100  # candidates of each member


@dataclass(frozen=True)
class Free:
    """What the search chooses for a group of members.

    Attributes:
        share: Whether it chooses the share.
        temperature: Whether it chooses the temperature.
        options: The other options that it chooses.
    """

    share: bool = True
    temperature: bool = True
    options: tuple[str, ...] = ()


def sample_rows(n_rows: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """All rows, or a random choice of ``wanted`` of them, ascending."""
    if wanted >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng([seed, n_rows]).permutation(n_rows)[:wanted])


_Key = tuple[tuple[str, float], ...]


def _key(options: Mapping[str, float]) -> _Key:
    return tuple(sorted(options.items()))


@dataclass(frozen=True)
class _Scores:
    """Scores of a member at the candidates.

    Attributes:
        values: Shape ``(M, C + 1)``, the target first.
        log_totals: By temperature, logarithms of the sums over the whole catalogue, shape ``(M, 1)``; -inf for
            histories that the member does not know.
    """

    values: Tensor
    log_totals: Mapping[float, Tensor]

    def probabilities(self, temperature: float) -> Tensor:
        """Probabilities of target and candidates, shape ``(M, C + 1)``."""
        log_totals = self.log_totals[temperature]
        probs = (self.values / temperature - log_totals).exp_()
        return probs.masked_fill_(log_totals == -torch.inf, 0.0)


class Sample:
    """Validation rows with the candidates that compete for their ranks.

    Args:
        members: The members, in any number of groups.
        rows: The validation split, with histories long enough for every member.
        numbers: Rows to use, ascending, shape ``(M,)``.
        metric: A metric of `ranking_metrics`.
        temperatures: Temperatures that will be needed of each group.
        variants: Options of each group whose best items are candidates.
        seen: Items to leave out of each row's ranking.
        device: Device of the members.
        batch_rows: Rows scored at once, at most.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rows: SplitRows,
        numbers: NDArray[np.int64],
        metric: str,
        *,
        temperatures: Mapping[str, Sequence[float]],
        variants: Mapping[str, Sequence[Mapping[str, float]]],
        seen: SeenItems | None = None,
        device: torch.device | str = "cpu",
        batch_rows: int = 512,
    ) -> None:
        self.members, self.metric, self.numbers = list(members), metric, numbers
        self._rows, self._seen, self._device = rows, seen, device
        self._temperatures = temperatures
        size = min(batch_rows, rows_at_once(rows.rows.n_items))
        self._parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        self._known: dict[tuple[int, _Key], _Scores] = {}
        self._probabilities = lru_cache(maxsize=4 * len(members))(self._probabilities_of)
        wanted = [(number, dict(each)) for number, member in enumerate(members) for each in variants[member.group]]
        self._columns, self._competes = self._candidates(wanted)

    def value(self, weights: Weights, without: int | None = None, only: int | None = None) -> float:
        """The metric of a mixture; histories that it does not know count as misses.

        Args:
            weights: Weights of each group.
            without: Number of a member to leave out; the others keep their proportions.
            only: Number of the only member to use.
        """
        chosen = [n for n in range(len(self.members)) if n != without and only in (None, n)]
        mixed = torch.zeros(self._columns.shape)
        for number in chosen:
            group = weights[self.members[number].group]
            share = 1.0 if only is not None else group.share / self._size(number)
            if share > 0:
                mixed.add_(self._probabilities(number, _key(group.options), group.temperature), alpha=share)
        ranks = ((mixed[:, 1:] >= mixed[:, :1]) & self._competes).sum(dim=1)
        return ranking_metrics(ranks)[self.metric]

    def _size(self, number: int) -> int:
        return sum(each.group == self.members[number].group for each in self.members)

    def _candidates(self, wanted: Sequence[tuple[int, Mapping[str, float]]]) -> tuple[Tensor, Tensor]:
        """Target and candidates of each row, ``(M, C + 1)``, and which candidates count, ``(M, C)``."""
        found = []
        members = [self.members[number].changed(options) for number, options in wanted]
        with Progress("best items of each member", len(self.numbers), "row") as progress, torch.inference_mode():
            for part in self._parts:
                batch = self._rows.batch(part, self._device)
                targets, best = batch.targets.unsqueeze(1), []
                for member in members:
                    scores = member.scores(batch)
                    if self._seen is not None:  # of the target too: it is a candidate anyway
                        pairs = self._seen.pairs(part, scores.device)
                        scores = scores.index_put(pairs, scores.new_tensor(-torch.inf))
                    found_here = scores.topk(min(_N_BEST, batch.n_items), dim=1)
                    best.append(found_here.indices.masked_fill(found_here.values == -torch.inf, batch.n_items))
                items = torch.cat(best, dim=1).sort(dim=1).values
                counts = (items != targets) & (items < batch.n_items)
                counts[:, 1:] &= items[:, 1:] != items[:, :-1]
                columns = torch.cat([targets, items.clamp(max=batch.n_items - 1)], dim=1)
                found.append((columns.cpu(), counts.cpu()))
                progress.advance(len(part))
        return torch.cat([columns for columns, _ in found]), torch.cat([counts for _, counts in found])

    def _probabilities_of(self, number: int, options: _Key, temperature: float) -> Tensor:
        if (number, options) not in self._known:
            self._known[number, options] = self._computed(self.members[number].changed(dict(options)))
        return self._known[number, options].probabilities(temperature)

    def _computed(self, member: Member) -> _Scores:
        temperatures = self._temperatures[member.group]
        values, totals, done = [], [], 0
        with torch.inference_mode():
            for part in self._parts:
                scores = member.scores(self._rows.batch(part, self._device))
                columns = self._columns[done : done + len(part)].to(scores.device)
                values.append(scores.gather(1, columns).cpu())
                totals.append([(scores / each).logsumexp(dim=1, keepdim=True).cpu() for each in temperatures])
                done += len(part)
        sums = (torch.cat(parts) for parts in zip(*totals, strict=True))
        return _Scores(torch.cat(values), dict(zip(temperatures, sums, strict=True)))


def temperatures_of(kind: str, start: GroupWeights, free: Free) -> tuple[float, ...]:
    """Temperatures that the search may choose for a group of members of a kind."""
    return tuple(sorted({*TEMPERATURES[kind], start.temperature})) if free.temperature else (start.temperature,)


def normalised(weights: Weights, free: Mapping[str, Free]) -> dict[str, GroupWeights]:
    """Weights whose shares sum to 1: free shares are scaled to what given ones leave, or all if none is free."""
    is_scaled = [group for group in weights if free[group].share] or list(weights)
    left = 1 - sum(each.share for group, each in weights.items() if group not in is_scaled)
    total = sum(weights[group].share for group in is_scaled)
    scaled = {group: left * weights[group].share / total if total > 0 else left / len(is_scaled) for group in is_scaled}
    return {group: replace(each, share=scaled.get(group, each.share)) for group, each in weights.items()}


def choose(
    sample: Sample, kinds: Mapping[str, str], start: Weights, free: Mapping[str, Free], rounds: int
) -> tuple[dict[str, GroupWeights], int]:
    """Search for the best weights, one coordinate after the other.

    It starts from ``start``, and from the options with which each group is best alone: vectors of a decoder are worth
    nothing before they are whitened, so that their share would become 0 first.

    Args:
        sample: Measures weights.
        kinds: Kind of the members of each group.
        start: Where to start, and the given values.
        free: What to choose.
        rounds: Rounds over all coordinates, at most.

    Returns:
        The best weights, and the number of weights tried.
    """
    tried: dict[str, float] = {}

    def value(weights: Weights, only: int | None = None) -> float:
        key = repr((only, weights))
        if key not in tried:
            tried[key] = sample.value(weights, only=only)
        return tried[key]

    begin = normalised(start, free)
    alone = dict(begin)
    for group in (group for group in begin if free[group].options):
        first = next(number for number, member in enumerate(sample.members) if member.group == group)
        for name in free[group].options:
            variants = [alone | {group: _with_option(alone[group], name, each)} for each in OPTIONS[name]]
            alone = _best(alone, variants, partial(value, only=first))
    ends = [_climb(each, kinds, free, value, rounds) for each in ([begin] if alone == begin else [begin, alone])]
    return max(ends, key=value), len(tried)


def _climb(
    weights: dict[str, GroupWeights],
    kinds: Mapping[str, str],
    free: Mapping[str, Free],
    value: Callable[[Weights], float],
    rounds: int,
) -> dict[str, GroupWeights]:
    """Improve one coordinate after the other until none improves."""
    for number in range(rounds):
        before = weights
        for group in weights:
            for coordinate in _coordinates(weights, group, kinds[group], free):
                weights = _best(weights, coordinate(weights), value)
        logger.info("search, round %d: %.4f", number + 1, value(weights))
        if weights == before:
            break
    return weights


def _coordinates(
    weights: Weights, group: str, kind: str, free: Mapping[str, Free]
) -> Iterator[Callable[[dict[str, GroupWeights]], list[dict[str, GroupWeights]]]]:
    """For each free coordinate of a group, a function from weights to all its values."""
    mine = free[group]
    if mine.share and sum(each.share for each in free.values()) > 1:
        yield lambda now: [_with_share(now, group, share, free) for share in SHARES]
    if mine.temperature:
        grid = temperatures_of(kind, weights[group], mine)
        yield lambda now: [now | {group: replace(now[group], temperature=each)} for each in grid]
    for name in mine.options:
        yield partial(_with_each, group=group, name=name)


def _with_each(now: dict[str, GroupWeights], group: str, name: str) -> list[dict[str, GroupWeights]]:
    return [now | {group: _with_option(now[group], name, each)} for each in OPTIONS[name]]


def _with_option(weights: GroupWeights, name: str, value: float) -> GroupWeights:
    return replace(weights, options={**weights.options, name: value})


def _with_share(
    weights: dict[str, GroupWeights], group: str, share: float, free: Mapping[str, Free]
) -> dict[str, GroupWeights]:
    """A group has ``share`` of what given shares leave; other free shares keep their proportions."""
    others = [each for each in weights if free[each].share and each != group]  # no set: sums depend on the order
    left = 1 - sum(each.share for name, each in weights.items() if not free[name].share)
    total = sum(weights[each].share for each in others)
    rest = {
        each: left * (1 - share) * (weights[each].share / total if total > 0 else 1 / len(others)) for each in others
    }
    return {
        name: replace(each, share=left * share if name == group else rest.get(name, each.share))
        for name, each in weights.items()
    }


def _best(
    now: dict[str, GroupWeights], variants: Sequence[dict[str, GroupWeights]], value: Callable[[Weights], float]
) -> dict[str, GroupWeights]:
    """The best of some weights; ``now`` unless another one is better."""
    return max([now, *variants], key=value)
