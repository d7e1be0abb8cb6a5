"""Teacher outputs made of finished student runs and item neighbours: what a teacher without a language model tells.

    .venv/bin/python benchmarks/ensemble_outputs.py --prepared FOLDER --runs RUN [RUN ...] --out FOLDER --top-k 100 \
        --neighbours 0.5

The study of distillation needs this control: whatever an LLM's rankings are worth to a student has to be more than what
a few more students are worth. For every training row the members' distributions over the catalogue are averaged, and
the best items are written with the negative logarithm of that mean, in the layout of `llm2rec.teacher`. Item
neighbours take a part of it (`item_neighbours.py`): members know the targets of the rows that they were trained on,
neighbours are asked without what the row's own user added. Item vectors are those of the members, side by side.

With ``--ranks SPLIT`` this teacher itself is judged: the ranks of a split's targets among all items that the user has
not had before, as `llm2rec.evaluate` leaves them in the folder of a run.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from item_neighbours import Neighbours
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from llm2rec.core.files import write_json
from llm2rec.core.git_info import git_state
from llm2rec.core.metrics import ranking_metrics, target_ranks
from llm2rec.data import RecData, load
from llm2rec.student.datamodule import SeenItems, SequenceBatch, SequenceData
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.store import load_student
from llm2rec.teacher.export import write_outputs
from llm2rec.teacher.settings import ExportSettings

ROWS = 512  # at once
SHARPNESS = 1.5  # of neighbours: chosen on validation rows of Amazon games, as their constants are
LEAST = 1e-12  # what a probability of 0 is written as


class Mixture:
    """A part of baselines and a part of item neighbours.

    Args:
        data: The prepared dataset.
        runs: Finished runs of ``llm2rec.student``, all with histories of one length.
        share: Part of the distribution that the neighbours have, 0 to 1.
    """

    def __init__(self, data: RecData, runs: list[Path], share: float) -> None:
        self.data, self.runs, self.share = data, runs, share
        self.members = [load_student(run / "student") for run in runs]
        if len(lengths := {member.max_length for member in self.members}) > 1:
            raise SystemExit(f"the members read histories of different lengths, {sorted(lengths)}; expected one length")
        self.max_length = lengths.pop()
        held_out = [np.asarray(items, np.int64)[:-2] for items in data.sequences["items"]]  # leave-one-out
        self.neighbours = Neighbours(held_out, data.n_items) if share > 0 else None

    @torch.inference_mode()
    def blocks(self, split: str, *, counted: bool) -> Iterator[tuple[NDArray[np.int64], SequenceBatch, Tensor]]:
        """Row numbers, rows and distributions over the catalogue ``(B, N)`` of a split, block by block.

        Args:
            split: Its name.
            counted: Whether the rows' own users have to be taken out of what the neighbours know: training rows.
        """
        table = self.data.splits[split]
        rows = SequenceData.of(table, self.data.n_items, self.max_length)
        users, histories = np.asarray(table["user_index"][:]), table["history"][:]
        for block in np.array_split(np.arange(len(rows)), -(-len(rows) // ROWS)):
            batch = rows.batch(block)
            told = (1 - self.share) * mean_of(self.members, batch.inputs) if self.share < 1 else torch.zeros(())
            if self.neighbours is not None:
                read = [np.asarray(histories[row], np.int64) for row in block]
                known = self.neighbours.scores(read, users[block] if counted else None)
                told = told + self.share * sharpened(known)
            yield block, batch, told


@torch.inference_mode()
def mean_of(members: list[SequentialRecommender], batch: tuple[Tensor, ...]) -> Tensor:
    """The mean of the members' distributions over the catalogue for some rows, shape ``(B, N)``."""
    return torch.stack([member.score(member(*batch)).softmax(dim=1) for member in members]).mean(dim=0)


def sharpened(scores: Tensor) -> Tensor:
    """A distribution of scores of 0 or more, ``(B, N)``: the best stand out more. Rows without any stay 0."""
    powers = scores**SHARPNESS
    return powers / powers.sum(dim=1, keepdim=True).clamp(min=torch.finfo(powers.dtype).tiny)


def write(mixture: Mixture, out: Path, top_k: int) -> None:
    """Rank the catalogue for every training row and write the outputs."""
    data = mixture.data
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, (_, _, told) in enumerate(mixture.blocks("train", counted=True)):
            probabilities, best = told.topk(top_k, dim=1)
            log_probs = probabilities.clamp(min=LEAST).log()
            files.append(Path(folder) / f"block_{number:06d}.safetensors")
            save_file({"items": best.to(torch.int32).numpy(), "log_probs": log_probs.numpy()}, files[-1])
        about = {
            "dataset": data.name,
            "fingerprint": data.fingerprint,
            "teacher": out.name,
            "train_rows": len(data.splits["train"]),
            "members": [run.name for run in mixture.runs],
            "neighbours": mixture.share,
            **git_state(),
        }
        vectors = torch.cat([member.output_items.vectors().detach() for member in mixture.members], dim=1)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_outputs(out, files, vectors, ExportSettings(top_k=top_k), about)


def write_ranks(mixture: Mixture, split: str, run: Path) -> None:
    """Rank the targets of a split among what their users have not had, and leave ranks and metrics as a run does."""
    seen = SeenItems.of(mixture.data.splits[split], mixture.data.sequences)
    ranks = torch.cat(
        [
            target_ranks(seen.mask(told, block, batch.targets), batch.targets)
            for block, batch, told in mixture.blocks(split, counted=False)
        ]
    )
    (run / "metrics").mkdir(parents=True, exist_ok=True)
    np.save(run / "metrics" / f"{split}_ranks.npy", ranks.numpy())
    write_json(run / "metrics" / f"{split}.json", ranking_metrics(ranks))


def main() -> None:
    """Read the command line and write the outputs, or the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, type=Path, help="a folder of data/processed")
    parser.add_argument("--runs", required=True, nargs="+", type=Path, help="finished runs of llm2rec.student")
    parser.add_argument("--out", required=True, type=Path, help="folder for the outputs, replaced as a whole; or a run")
    parser.add_argument("--top-k", type=int, default=100, help="items per row")
    parser.add_argument("--neighbours", type=float, default=0.0, help="the part that item neighbours have, 0 to 1")
    parser.add_argument("--ranks", choices=("validation", "test"), help="rank this split's targets instead")
    options = parser.parse_args()
    mixture = Mixture(load(options.prepared), options.runs, options.neighbours)
    if options.ranks:
        write_ranks(mixture, options.ranks, options.out)
    else:
        write(mixture, options.out, options.top_k)


if __name__ == "__main__":
    main()
