"""The ensemble model: a mixture of the distributions of trained students and item neighbours."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import CheckpointError, ConfigError, DataError
from llm2rec.core.files import read_object, replaced_folder, write_json
from llm2rec.core.metrics import target_ranks
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData
from llm2rec.ensemble.neighbours import Neighbours, sharpened, training_sequences
from llm2rec.student.datamodule import Rows, SeenItems, SequenceBatch
from llm2rec.student.evaluator import RowNumbers, aligned_batches, rank_rows
from llm2rec.student.models import SequentialRecommender, load_student

__all__ = ["Ensemble", "ensemble_of", "load_ensemble", "rank_targets", "save_ensemble"]


class Ensemble:
    """Averages the distributions of its members, and mixes in item neighbours with a weight.

    Members were trained on the targets of the training rows. Neighbours score a training row without the pairs of its
    own user, so that their scores are comparable with those of other rows. The caller masks seen items.

    Args:
        members: Trained students with the same maximum history length.
        neighbours: Item neighbours; None if ``share`` is 0.
        share: Weight of the neighbours, 0 to 1.
        device: Device of the members.

    Raises:
        ConfigError: If there are no members, or their histories differ in length.
    """

    def __init__(
        self,
        members: Sequence[SequentialRecommender],
        neighbours: Neighbours | None,
        share: float,
        device: torch.device | str = "cpu",
    ) -> None:
        lengths = sorted({member.max_length for member in members})
        if len(lengths) != 1:
            found = f"members that read histories of {lengths} items" if lengths else "no members"
            raise ConfigError(f"the ensemble has {found}; expected students that read histories of one length.")
        self.members = [member.eval().to(device) for member in members]
        self.max_length, self.neighbours, self.share = lengths[0], neighbours, share

    @property
    def item_vectors(self) -> Tensor:
        """The members' item vectors side by side, shape ``(N, sum of widths)``."""
        return torch.cat([member.output_items.vectors().detach() for member in self.members], dim=1)

    @property
    def n_parameters(self) -> int:
        """Parameters for serving: the members' weights, and the counted pairs of items."""
        weights = sum(each.numel() for member in self.members for each in member.weights_to_serve().values())
        return weights + (self.neighbours.n_pairs if self.neighbours else 0)

    @property
    def rows_at_once(self) -> int:
        """Largest batch: distributions of 256 MiB, of which about five are held at once."""
        return max(1, 2**26 // self.members[0].n_items)

    @torch.inference_mode()
    def probabilities(self, batch: SequenceBatch, users: NDArray[np.int64] | None = None) -> Tensor:
        """Distribution of the next item.

        Args:
            batch: Rows on the ensemble's device.
            users: Users of the rows, shape ``(B,)``, if they are training rows; see `Neighbours.scores`.

        Returns:
            Shape ``(B, N)``, float32; rows sum to 1. Rows without known neighbours are the members' alone.
        """
        probs = torch.zeros(())
        for member in self.members:
            probs = probs + member.score(member(*batch.inputs)).float().softmax(dim=1) / len(self.members)
        if self.neighbours is None:
            return probs
        known = sharpened(self.neighbours.scores(batch.history, batch.lengths, users)).to(probs.device)
        # Not by the sum of `known`, 1 up to rounding: with a share of 1, rounding would let the members in.
        of_members = torch.where((known > 0).any(dim=1, keepdim=True), 1 - self.share, 1.0)  # (B, 1)
        return of_members * probs + self.share * known


def rank_targets(
    ensemble: Ensemble, rows: Rows, engine: Engine, *, seen: SeenItems | None = None, batch_rows: int = 512
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

    batches = aligned_batches(len(rows), min(batch_rows, ensemble.rows_at_once))
    return rank_rows(rank, len(rows), engine, batches)


def save_ensemble(folder: Path, members: Sequence[Path], share: float) -> None:
    """Save an ensemble; `load_ensemble` needs it and the dataset.

    Args:
        folder: Usually ``<run>/ensemble``.
        members: Folders of students, as `llm2rec.student.store.save_student` writes them.
        share: Weight of the neighbours.
    """
    with replaced_folder(folder) as aside:
        names = [f"member_{number}" for number in range(len(members))]
        for name, member in zip(names, members, strict=True):
            shutil.copytree(member, aside / name)
        write_json(aside / "config.json", {"members": names, "neighbours": share})


def load_ensemble(folder: Path, data: RecData, device: torch.device | str = "cpu") -> Ensemble:
    """Load an ensemble; neighbours are counted again.

    Args:
        folder: Usually ``<run>/ensemble``.
        data: Its dataset.
        device: Device of the members.

    Raises:
        CheckpointError: If the folder holds no ensemble, or a member cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no ensemble (no config.json); give a finished run of llm2rec.ensemble.")
    try:
        config = read_object(folder / "config.json", "members", "neighbours")
        members, share = [str(name) for name in config["members"]], float(config["neighbours"])
    except (DataError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds a damaged ensemble: {error}") from error
    return ensemble_of([load_student(folder / name) for name in members], data, share, device)


def ensemble_of(
    members: Sequence[SequentialRecommender], data: RecData, share: float, device: torch.device | str = "cpu"
) -> Ensemble:
    """An ensemble of students and the neighbours of the training split; arguments as of `Ensemble`."""
    neighbours = Neighbours(training_sequences(data), data.n_items) if share > 0 else None
    return Ensemble(members, neighbours, share, device)
