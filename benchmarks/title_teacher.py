"""What a teacher that writes titles costs: a training step, 20 candidates, free writing, the whole catalogue.

    .venv/bin/python benchmarks/title_teacher.py --raw-dir FOLDER --json benchmarks/results/title_teacher.json

A Llama with random weights (20 M parameters on a CPU) reads MovieLens 100K, or the toy dataset where no `--raw-dir` is
given: prompts with history, 20 candidates and a vector after each title. Speed and memory are measured, no quality.

    step         forward and backward of a training batch, answers only; its peak memory beside that of a loss which
                 keeps the logits of all positions
    likelihood   log-probabilities of 20 candidates a row, the prompt read once
    passes       the same numbers by a pass of prompt and title for each candidate
    writing      greedy generation
    search       the 20 likeliest titles of the catalogue, 20 beams
"""

import argparse
import tempfile
from pathlib import Path

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import torch
from torch import Tensor, nn

from llm2rec.data import RecData, prepare
from llm2rec.data.movielens import MovieLens100K
from llm2rec.data.toy import Toy
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.llm import locate
from llm2rec.teacher.settings import (
    AdapterSettings,
    PromptSettings,
    TeacherSettings,
    TinyRandomSettings,
    TitleSettings,
)
from llm2rec.teacher.title.model import TitleRecommender

N_CANDIDATES, N_ROWS = 20, 4


def main() -> None:
    """Build a teacher, take turns, write what came out."""
    parser = harness.command_line(__doc__ or "", rounds=5)
    parser.add_argument("--raw-dir", type=harness.existing, help="MovieLens 100K")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        dataset = MovieLens100K(raw_dir=str(Path(options.raw_dir).resolve())) if options.raw_dir else Toy()
        data = prepare(dataset, Path(folder) / "data")
        model = title_teacher(data, Path(folder), options)
        train = Rows.of(data, "train")
        harness.write_result(options, *measure(model, train, options))


def title_teacher(data: RecData, folder: Path, options: argparse.Namespace) -> TitleRecommender:
    """A hybrid teacher with random weights, gated by an untrained SASRec."""
    llm = TinyRandomSettings(
        name="random",
        width=64 if options.quick else 512,
        n_layers=2 if options.quick else 6,
        n_heads=8,
        prompt=PromptSettings(max_tokens=1024, max_title_tokens=24, wording="domain"),
    )
    settings = TeacherSettings(
        objective="title",
        gate_input="sequence",
        prompts="hybrid",
        recommender_run="untrained",
        adapter=AdapterSettings(r=8, num_experts=4),
        title=TitleSettings(n_candidates=N_CANDIDATES),
    )
    arguments = {"n_items": data.n_items, "width": 64, "max_length": data.history_length}
    recommender = BorrowedStudent(build_model("sasrec", **arguments), {"model": "sasrec", "arguments": arguments})
    source = locate(llm, folder, folder / "llm", data.titles)
    device = torch.device(options.device)
    model, _ = build_teacher(llm, source, settings, data, np.zeros(1, np.int32), device, recommender)
    assert isinstance(model, TitleRecommender)
    return model


def measure(
    model: TitleRecommender, train: Rows, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, object]]:
    """Headline and samples."""
    rows = np.random.default_rng(0).permutation(len(train))[: 4 if options.quick else N_ROWS]
    (history, lengths), targets = train.histories(rows), train.targets.numpy()[rows]
    candidates = CandidateSampler(train, 0, N_CANDIDATES, split="train").draw(rows)
    gates = model.gate_inputs(history, lengths)
    answered = model.prompts.questions(history, lengths, candidates, targets, hybrid=True, padding="left")
    answered = answered.to(model.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        with model.use_gates(gates):
            torch.autograd.grad(model(**vars(answered)).mean(), trained)

    def step_with_all_logits() -> None:
        inputs = model._model_inputs(answered)
        with model.use_gates(gates):
            logits = model.llm(**inputs, use_cache=False).logits
            labels = answered.labels
            assert labels is not None
            losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:])
            torch.autograd.grad(losses, trained)

    @torch.inference_mode()
    def passes() -> Tensor:
        columns = []
        for candidate in candidates.T:
            one = model.prompts.questions(history, lengths, candidates, candidate, hybrid=True, padding="left")
            one = one.to(model.device)
            assert one.labels is not None
            with model.use_gates(gates):
                columns.append(-model(**vars(one)) * (one.labels != -100).sum(dim=1))
        return torch.stack(columns, dim=1)

    def likelihood() -> Tensor:
        return model.candidate_log_probs(history, lengths, candidates, gates)

    difference = float((model.eval().candidate_log_probs(history, lengths, candidates, gates) - passes()).abs().max())
    steps = {
        "step": step,
        "likelihood": likelihood,
        "passes": passes,
        "writing": lambda: model.generate(history, lengths, candidates, gates),
        "search": lambda: model.best_items(history, lengths, min(N_CANDIDATES, train.n_items), gates),
    }
    seconds = harness.seconds_by_round(steps, 3 if options.quick else options.rounds, warm_up=1)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    device = model.device
    peak, peak_all = harness.peak_bytes(step, device), harness.peak_bytes(step_with_all_logits, device)
    headline = {
        "candidates_speedup_vs_passes": harness.spread(seconds["passes"], seconds["likelihood"])["median"],
        "candidates_largest_difference": difference,
        "step_peak_vs_all_logits": peak / peak_all,
        **{f"{name}_rows_per_second": len(rows) / value for name, value in medians.items()},
        "tokens_per_row": float(answered.attention_mask.sum() / len(rows)),
    }
    about = {
        "seconds": seconds,
        "rows": len(rows),
        "candidates": N_CANDIDATES,
        "peak_bytes": peak,
        "peak_bytes_all_logits": peak_all,
        "vocabulary": len(model.prompts.tokenizer),
        "parameters": sum(each.numel() for each in model.parameters()),
        "items": train.n_items,
    }
    return headline, about


if __name__ == "__main__":
    main()
