"""What a listwise loss over the catalogue costs beside the student's own cross-entropy, time and memory.

    .venv/bin/python benchmarks/listwise_step.py --threads 1 --json benchmarks/results/listwise_step.json

Losses and gradients of 512 user vectors of width 64 and of the item table they are scored with; the teacher names 50
candidates a user. Three ways, in turn:

    own       the student's cross-entropy alone, in tiles: what a student without a teacher pays
    scores    cross-entropy and listwise loss of a matrix of 512 x N scores
    tiles     the same as training computes it, where the matrix is larger than a tile: of the sum over the catalogue,
              which at temperature 1 is one for both losses, and of the candidates' scores

``floor_seconds`` is what the large operations of ``tiles`` take at the rates measured here: for each sum 4 products of
512 x N x 64 and 2 exponentials a score.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

from llm2rec.distill.data_bridge import TeacherBatch
from llm2rec.distill.objective import distillation_losses, objective
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.datamodule import SequenceBatch
from llm2rec.student.models import build_model
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

USERS, WIDTH, CANDIDATES = 512, 64, 50
SETTINGS = DistillSettings(
    teacher_outputs="none",
    ranking=RankingSettings(weight=1.0, top_k=CANDIDATES, loss="listwise"),
    embedding=EmbeddingSettings(fusion_scale=0.0),
)


def main() -> None:
    """Time all ways at each size and write the JSON file."""
    parser = harness.command_line(__doc__, rounds=9)
    parser.add_argument("--items", type=int, nargs="+", default=[15_301, 100_000], help="sizes of the catalogue")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    sizes = [15_301] if options.quick else options.items
    samples = [measure(n_items, float(t), rounds, options) for n_items in sizes for t in (1, 2)]
    headline = {}
    for sample in samples:
        name = f"{sample['items']}_t{sample['temperature']:.0f}"
        headline[f"time_of_scores_vs_tiles_{name}"] = sample["scores_vs_tiles"]["median"]
        headline[f"time_of_tiles_vs_own_{name}"] = sample["tiles_vs_own"]["median"]
        headline[f"peak_of_scores_vs_tiles_{name}"] = sample["peak_bytes"]["scores"] / sample["peak_bytes"]["tiles"]
        headline[f"share_of_floor_{name}"] = sample["floor_seconds"] / min(sample["seconds"]["tiles"])
    harness.write_result(options, headline, samples)


def measure(n_items: int, temperature: float, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of all ways at one size."""
    device = torch.device(options.device)
    steps = ways(n_items, temperature, device)
    seconds = harness.seconds_by_round(steps, rounds)
    operation, exponential, _ = harness.floor_rates(WIDTH)
    n_sums, scores = (1 if temperature == 1 else 2), USERS * n_items
    return {
        "items": n_items,
        "temperature": temperature,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "scores_vs_tiles": harness.spread(seconds["scores"], seconds["tiles"]),
        "tiles_vs_own": harness.spread(seconds["tiles"], seconds["own"]),
        "peak_bytes": {name: harness.peak_bytes(step, device) for name, step in steps.items()},
        "floor_seconds": n_sums * scores * (4 * 2 * WIDTH * operation + 2 * exponential),
    }


def ways(n_items: int, temperature: float, device: torch.device) -> dict[str, Callable[[], object]]:
    """Loss and gradients of one batch, way by way; all give the same."""
    torch.manual_seed(0)
    settings = replace(SETTINGS, ranking=replace(SETTINGS.ranking, temperature=temperature))
    student = build_model("gru4rec", n_items=n_items, width=WIDTH)
    model = DistilledStudent(student, torch.zeros(n_items, 1), fusion_scale=0.0, align=False).to(device)
    vectors, targets = torch.randn(USERS, WIDTH, device=device), torch.randint(n_items, (USERS,), device=device)
    rows, everyone = np.arange(USERS), torch.ones(USERS, device=device)
    batch = SequenceBatch(targets.unsqueeze(1), torch.ones_like(targets), targets, rows)  # of histories nothing is read
    candidates = torch.stack([torch.randperm(n_items)[:CANDIDATES] for _ in range(USERS)]).to(device)
    teacher = TeacherBatch(candidates, torch.rand(USERS, CANDIDATES, device=device).sort(dim=1).values)
    task_loss = TaskLoss(student, LossSettings(), targets.cpu(), seed=0)

    def own(users: Tensor, **known: Tensor | None) -> dict[str, Tensor]:
        return task_loss(users, targets, rows, epoch=0, step=0, **known)

    def scores(users: Tensor) -> dict[str, Tensor]:
        return objective(student.score(users), targets, teacher, everyone, settings)

    def tiles(users: Tensor) -> dict[str, Tensor]:
        return distillation_losses(
            model, users, batch, teacher, everyone, settings, task_loss=lambda **known: own(users, **known)
        )

    def step(losses: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[], object]:
        def run() -> None:
            users = vectors.clone().requires_grad_()
            losses(users)["loss"].mean().backward()
            model.zero_grad()

        return run

    return {"own": step(own), "scores": step(scores), "tiles": step(tiles)}


if __name__ == "__main__":
    main()
