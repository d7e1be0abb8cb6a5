"""Teacher outputs made of finished student runs: what an ensemble without a language model has to teach.

    .venv/bin/python benchmarks/ensemble_outputs.py --prepared FOLDER --runs RUN [RUN ...] --out FOLDER --top-k 100

The study of distillation needs this control: whatever an LLM's rankings are worth to a student has to be more than what
a few more students are worth. For every training row the members' distributions over the catalogue are averaged, and
the best items are written with the negative logarithm of that mean, in the layout of `llm2rec.teacher`. Item vectors
are those of the members, side by side.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from llm2rec.core.git_info import git_state
from llm2rec.data import RecData, load
from llm2rec.student.datamodule import SequenceData
from llm2rec.student.models import SequentialRecommender
from llm2rec.student.store import load_student
from llm2rec.teacher.export import write_outputs
from llm2rec.teacher.settings import ExportSettings

ROWS = 2048


@torch.inference_mode()
def best_of_mean(members: list[SequentialRecommender], batch: tuple[Tensor, ...], k: int) -> tuple[Tensor, Tensor]:
    """The K best items of the mean distribution of some rows, and the logarithms of their probabilities."""
    mean: Tensor | float = 0.0
    for member in members:
        mean = mean + member.score(member(*batch)).softmax(dim=1) / len(members)
    assert isinstance(mean, Tensor)
    probabilities, items = mean.topk(k, dim=1)
    return items, probabilities.log()


def write(data: RecData, runs: list[Path], out: Path, top_k: int) -> None:
    """Rank the catalogue for every training row and write the outputs."""
    members = [load_student(run / "student") for run in runs]
    if len(lengths := {member.max_length for member in members}) > 1:
        raise SystemExit(f"the members read histories of different lengths, {sorted(lengths)}; expected one length")
    train = SequenceData.of(data.splits["train"], data.n_items, lengths.pop())
    settings = ExportSettings(top_k=top_k)
    with tempfile.TemporaryDirectory() as folder:
        blocks = []
        for number, block in enumerate(np.array_split(np.arange(len(train)), -(-len(train) // ROWS))):
            items, log_probs = [], []
            for part in np.array_split(block, 4):
                best = best_of_mean(members, train.batch(part).inputs, top_k)
                items.append(best[0].to(torch.int32).numpy())
                log_probs.append(best[1].numpy())
            blocks.append(Path(folder) / f"block_{number:06d}.safetensors")
            save_file({"items": np.concatenate(items), "log_probs": np.concatenate(log_probs)}, blocks[-1])
        vectors = torch.cat([member.output_items.vectors().detach() for member in members], dim=1)
        about = {
            "dataset": data.name,
            "fingerprint": data.fingerprint,
            "teacher": out.name,
            "train_rows": len(train),
            "members": [run.name for run in runs],
            **git_state(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_outputs(out, blocks, vectors, settings, about)


def main() -> None:
    """Read the command line and write the outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True, type=Path, help="a folder of data/processed")
    parser.add_argument("--runs", required=True, nargs="+", type=Path, help="finished runs of llm2rec.student")
    parser.add_argument("--out", required=True, type=Path, help="folder for the outputs; replaced as a whole")
    parser.add_argument("--top-k", type=int, default=100, help="items per row")
    options = parser.parse_args()
    write(load(options.prepared), options.runs, options.out, options.top_k)


if __name__ == "__main__":
    main()
