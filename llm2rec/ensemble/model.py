"""The ensemble model: a mixture of the distributions of its members."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import target_ranks
from llm2rec.core.train.engine import Engine
from llm2rec.ensemble.batch import EnsembleBatch, SplitRows
from llm2rec.ensemble.members import Member, distribution
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.evaluator import RowNumbers, aligned_batches, rank_rows

__all__ = ["Ensemble", "GroupWeights", "rank_targets", "rows_at_once"]


@dataclass(frozen=True)
class GroupWeights:
    """How a group of members enters the mixture.

    Attributes:
        share: Share of the mixture, split equally among the members of the group.
        temperature: Temperature of each member's distribution.
        options: Further options of the members; see `Member.changed`.
    """

    share: float
    temperature: float
    options: Mapping[str, float] = field(default_factory=dict)


class Ensemble:
    """Mixes the distributions of its members.

    For a history that a member does not know, its share goes to the others. Members with share 0 are used only for
    histories that no other member knows. The caller masks seen items.

    Args:
        members: The members.
        weights: Weights of each of their groups.

    Raises:
        ConfigError: If there are no members.
    """

    def __init__(self, members: Sequence[Member], weights: Mapping[str, GroupWeights]) -> None:
        if not members:
            raise ConfigError("the ensemble has no members; give `runs=[...]`, or leave neighbours or titles on.")
        sizes = {group: sum(member.group == group for member in members) for group in weights}
        self.members = [member.changed(weights[member.group].options) for member in members]
        self.weights = {member.group: weights[member.group] for member in members}
        self._shares = [weights[member.group].share / sizes[member.group] for member in members]
        self.max_length = max(member.max_length for member in members)

    @property
    def n_parameters(self) -> int:
        """Numbers that serving needs: weights of students and teachers, counted pairs of items, title vectors."""
        return sum(member.n_parameters for member in self.members)

    @torch.inference_mode()
    def probabilities(self, batch: EnsembleBatch) -> Tensor:
        """Distribution of the next item.

        Args:
            batch: Rows on the ensemble's device.

        Returns:
            Shape ``(B, N)``, float32; rows sum to 1, and are uniform for histories that no member knows.
        """
        mixed = torch.zeros(len(batch.rows), batch.n_items, device=batch.history.device)
        total = mixed.new_zeros(len(mixed), 1)

        def add(member: Member, share: float, wanted: Tensor | None = None) -> None:
            probs, known = distribution(member.scores(batch), self.weights[member.group].temperature)
            weight = share * (known if wanted is None else known & wanted)  # (B, 1)
            mixed.addcmul_(weight, probs)
            total.add_(weight)

        members = list(zip(self.members, self._shares, strict=True))
        for member, share in members:
            if share > 0:
                add(member, share)
        # Not by a tiny share instead: rounding would let these members in elsewhere.
        if bool((unknown := total == 0).any()):
            for member, share in members:
                if share == 0:
                    add(member, 1.0, unknown)
            mixed.masked_fill_(total == 0, 1 / batch.n_items)
            total.masked_fill_(total == 0, 1.0)
        return mixed / total


def rows_at_once(n_items: int) -> int:
    """Largest batch: distributions of 256 MiB, of which about five are held at once."""
    return max(1, 2**26 // n_items)


def rank_targets(
    ensemble: Ensemble, rows: SplitRows, engine: Engine, *, seen: SeenItems | None = None, batch_rows: int = 512
) -> Tensor:
    """Rank the targets of validation or test rows; a collective.

    Args:
        ensemble: The ensemble.
        rows: Rows of validation or test, M of them.
        engine: Splits the rows among processes and gathers the ranks.
        seen: Items to leave out of each row's ranking; None ranks all items.
        batch_rows: Rows scored at once, at most.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """

    def rank(block: RowNumbers) -> Tensor:
        batch = rows.batch(block, engine.device)
        probs = ensemble.probabilities(batch)  # (B, N)
        return target_ranks(probs if seen is None else seen.mask(probs, block, batch.targets), batch.targets)

    batches = aligned_batches(len(rows), min(batch_rows, rows_at_once(rows.rows.n_items)))
    return rank_rows(rank, len(rows), engine, batches)
