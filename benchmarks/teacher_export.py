"""What the teacher's export and evaluation cost beside the bare forward passes of its language model.

    .venv/bin/python benchmarks/teacher_export.py --json benchmarks/results/teacher_export.json

A Llama with random weights (20 M parameters on a CPU, 90 M on a GPU) and an iLoRA adapter labels training rows of the
toy dataset, with gate inputs from the cache, as the stage does. On the very same padded batches, side by side:

    frozen      the language model without adapter, forward only
    forward     the language model with its adapter, gates held: the floor of whatever reads every prompt once
    export      `rank_blocks`: prompts put together, forward, scores of all items, the K best, blocks on disk
    evaluation  `rank_targets`: prompts, forward, scores, ranks

Prompts are what they are (titles of different lengths), so tokens are counted without padding. `padding_share` is the
part of all positions that is padding, for batches of similar lengths as the export makes them, and for rows as they
come.
"""

import argparse
import tempfile
from pathlib import Path

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import torch
from numpy.typing import NDArray

from llm2rec.core.run import Run
from llm2rec.core.train.batching import batches_by_cost
from llm2rec.core.train.engine import Engine
from llm2rec.data import RecData, prepare
from llm2rec.data.toy import Toy
from llm2rec.ilora import frozen_base
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.evaluator import rank_targets
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.gate_cache import GateCache, TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.llm import locate
from llm2rec.teacher.outputs import rank_blocks
from llm2rec.teacher.settings import (
    AdapterSettings,
    ExportSettings,
    PromptSettings,
    TeacherSettings,
    TinyRandomSettings,
)


def main() -> None:
    """Build a teacher, take turns, write the ratios."""
    parser = harness.command_line(__doc__ or "", rounds=7)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    n_rows = 64 if options.quick else 16384 if on_gpu else 1024
    width = 128 if options.quick else 768 if on_gpu else 512
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Toy(), Path(folder) / "data")
        model = teacher(data, Path(folder), width, torch.device(options.device))
        engine = Engine(Run(Path(folder) / "run", "teacher", {}), seed=0, tensorboard=False)
        train = Rows.of(data, "train")
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:n_rows])
        rows = GateCache(model, "benchmark", engine, Path(folder) / "gates").rows(train, chosen)
        result = measure(model, rows, engine, Path(folder), options)
    harness.write_result(options, *result)


def teacher(data: RecData, folder: Path, width: int, device: torch.device) -> ItemTeacher:
    """A teacher with random weights, in evaluation mode."""
    llm = TinyRandomSettings(
        name="random", width=width, n_layers=12 if width > 512 else 6, n_heads=8, prompt=PromptSettings(max_tokens=256)
    )
    settings = TeacherSettings(adapter=AdapterSettings(r=16, num_experts=4))
    source = locate(llm, folder, folder / "llm", data.titles)
    targets = np.zeros(1, np.int32)
    model, _ = build_teacher(llm, source, settings, data, targets, device)
    assert isinstance(model, ItemTeacher)
    return model.eval()


def measure(
    model: ItemTeacher, rows: TeacherRows, engine: Engine, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, object]]:
    """Headline and samples."""
    settings = ExportSettings(block_rows=len(rows.rows))
    history, lengths = rows.data.histories(rows.rows)
    parts = batches_by_cost(rows.token_counts, settings.batch_tokens)
    inputs = [model.read(history[part], lengths[part]) for part in parts]
    gates = [torch.from_numpy(rows.gate_inputs[part]).to(engine.device) for part in parts]

    @torch.inference_mode()
    def forward() -> None:
        for each, gate in zip(inputs, gates, strict=True):
            with model.use_gates(gate):
                model.llm(input_ids=each.input_ids, attention_mask=each.attention_mask)

    @torch.inference_mode()
    def frozen() -> None:
        for each in inputs:
            with frozen_base(model.llm):  # type: ignore[arg-type]
                model.llm(input_ids=each.input_ids, attention_mask=each.attention_mask)

    def export() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as blocks:
            rank_blocks(model, rows, engine, Path(blocks), settings)

    steps = {
        "forward": forward,
        "export": export,
        "evaluation": lambda: rank_targets(model, rows, engine, batch_tokens=settings.batch_tokens),
        "frozen": frozen,
    }
    seconds = harness.seconds_by_round(steps, 3 if options.quick else options.rounds, warm_up=1)
    ratios = {name: harness.spread(seconds["forward"], seconds[name]) for name in ("export", "evaluation", "frozen")}
    n_tokens = int(rows.token_counts.sum())
    fastest = float(np.median(seconds["export"]))
    headline = {
        "tokens_per_second_vs_forward": ratios["export"]["median"],
        "evaluation_tokens_per_second_vs_forward": ratios["evaluation"]["median"],
        "tokens_per_second_vs_frozen": float(
            np.median([a / b for a, b in zip(seconds["frozen"], seconds["export"], strict=True)])
        ),
        "tokens_per_second": n_tokens / fastest,
        "rows_per_second": len(rows.rows) / fastest,
        "padding_share": padding_share(rows.token_counts, parts),
        "padding_share_unsorted": padding_share(rows.token_counts, in_order(rows.token_counts, settings.batch_tokens)),
    }
    parameters = sum(each.numel() for each in model.parameters())
    return headline, {"seconds": seconds, "rows": len(rows.rows), "tokens": n_tokens, "parameters": parameters}


def in_order(token_counts: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """Batches of the same number of rows, in the order in which rows come."""
    size = max(1, max_tokens // int(token_counts.max()))
    return [np.arange(start, min(start + size, len(token_counts))) for start in range(0, len(token_counts), size)]


def padding_share(token_counts: NDArray[np.int64], parts: list[NDArray[np.int64]]) -> float:
    """Part of all positions that is padding."""
    return 1 - token_counts.sum() / sum(len(part) * int(token_counts[part].max()) for part in parts)


if __name__ == "__main__":
    main()
