"""Compare the memory that `llm2rec.plan` estimates for a training step with the memory that it takes.

    .venv/bin/python benchmarks/plan_check.py --json benchmarks/results/plan_check.json

Each case builds a teacher as its stage does, from a random Llama and the toy data, and takes two micro-batches of its
longest prompts: forward, backward, gradients added to those that are there. Beside the plan's peak stand

    live       the most bytes alive at once, counted operation by operation while the real step runs (GPUs: torch's own
               counter)
    rss        by how much a fresh process grows, from before the micro-batch to the peak in it (CPUs)
    rss_mapped the same where every block of 64 KiB or more is mapped by itself and given back at once: without the
               gaps that glibc's heap is left with (MALLOC_MMAP_THRESHOLD_=65536)

The headline's ratios are measured over planned.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from llm2rec.core.run import Run
from llm2rec.core.train.engine import Engine
from llm2rec.data import Toy, prepare
from llm2rec.plan.measure import step_peaks
from llm2rec.plan.memory import quantisation_bytes
from llm2rec.plan.models import TeacherShape, measured_teacher
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.ilora_model import LLMTeacher
from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import (
    AdapterSettings,
    PromptSettings,
    TeacherSettings,
    TinyRandomSettings,
    TitleSettings,
)
from llm2rec.teacher.title.objective import TitleObjective
from llm2rec.teacher.trainer import ItemObjective, TeacherTask

CASES: dict[str, dict[str, Any]] = {
    "ilora": {},
    "ilora checkpointing": {"gradient_checkpointing": True},
    "ilora rank 64": {"adapter": AdapterSettings(r=64)},
    "lora": {"tuning": "lora"},
    "lora checkpointing": {"tuning": "lora", "gradient_checkpointing": True},
    "title": {"objective": "title"},
    "title checkpointing": {"objective": "title", "gradient_checkpointing": True},
    "ilora int8": {"precision": "int8"},
    "ilora int4": {"precision": "int4"},
}
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUICK = ("ilora checkpointing", "lora")


def main() -> None:
    """Measure every case and write the JSON file."""
    parser = harness.command_line(__doc__, rounds=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case, in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        options.json.write_text(json.dumps(grown(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        samples = [measure(name, options) for name in (QUICK if options.quick else CASES)]
    harness.write_result(options, headline(samples), samples)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plan a case and run it."""
    settings, step, shape, tokens, answers = build(name, options)
    sizes, peak = measured_teacher(shape)
    trained = sum(each.numel() for each in step.model.parameters() if each.requires_grad)
    assert trained == sizes.trained_parameters, f"{name}: the plan trains {sizes.trained_parameters}, not {trained}"
    n_rows = len(step.rows)
    planned = peak("training_peaks", n_rows, tokens, answers, checkpointing=settings.gradient_checkpointing)
    packed = quantisation_bytes(sizes, shape.precision, n_rows * tokens, on_cpu=shape.on_cpu)
    total = planned + packed
    step().backward()  # gradients, and what libraries set aside once
    sample: dict[str, Any] = {"case": name, "rows": n_rows, "tokens": tokens, "planned_bytes": total}
    if options.device == "cuda":
        live = harness.peak_bytes(lambda: step().backward(), torch.device("cuda"))
        return sample | {"live_bytes": live, "live_ratio": live / total}
    live = max(step_peaks(step.model, step))
    rss = growths(name, options)
    return sample | {
        "live_bytes": live,
        "live_ratio": live / total,
        **{f"{kind}_bytes": size for kind, size in rss.items()},
        **{f"{kind}_ratio": size / total for kind, size in rss.items()},
    }


def growths(name: str, options: argparse.Namespace) -> dict[str, int]:
    """By how much fresh processes grow in a micro-batch, under glibc's allocator as it is and without its gaps."""
    file = options.folder / "grown.json"
    command = [sys.executable, __file__, "--case", name, "--folder", str(options.folder), "--json", str(file)]
    command += ["--quick"] * options.quick + ["--threads", str(torch.get_num_threads())]
    found = {}
    for kind, settings in (("rss", {}), ("rss_mapped", MAPPED)):
        subprocess.run(command, check=True, env={**os.environ, **settings})
        found[kind] = json.loads(file.read_text())
    return found


def grown(options: argparse.Namespace) -> int:
    """By how much this process grows in its first whole micro-batch, which is preceded by one of a single row."""
    step = build(options.case, options)[1]
    first = step.of_one_row()
    first().backward()  # gradients, and what libraries set aside once
    first.close()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = resident("VmRSS")
    step().backward()
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or at most since the mark was cleared (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


class RealStep:
    """The forward pass of a micro-batch as the trainer takes it; its gates are held until the next.

    Args:
        model: The teacher.
        objective: What it is trained to do.
        gate_inputs: Shape ``(M, d)``.
        rows: Positions in the objective's rows, shape ``(B,)``.
    """

    def __init__(self, model: LLMTeacher, objective: TeacherTask, gate_inputs: Tensor, rows: NDArray[np.int64]) -> None:
        self.model, self.objective, self.gate_inputs, self.rows = model, objective, gate_inputs, rows
        self._held = ExitStack()

    def __call__(self) -> Tensor:
        """Run it; gives the loss."""
        self.close()
        self._held.enter_context(self.model.use_gates(self.gate_inputs[self.rows].to(self.model.device)))
        device = self.model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # as the engine has it
            return self.objective.losses(self.model, self.rows, hybrid=False, epoch=0).sum()

    def close(self) -> None:
        """Let go of the gates."""
        self._held.close()

    def of_one_row(self) -> "RealStep":
        """The same with its first row alone."""
        return RealStep(self.model, self.objective, self.gate_inputs, self.rows[:1])


def build(name: str, options: argparse.Namespace) -> tuple[TeacherSettings, RealStep, TeacherShape, int, int]:
    """Build a case's teacher by the stage's own means.

    Returns:
        Settings, step, shape, tokens of the longest prompt and of the longest answer.
    """
    data = prepare(Toy(n_users=150, n_items=120, n_worlds=5), options.folder / "data")
    width, layers, n_rows = (64, 4, 16) if options.quick else (256, 8, 32)
    prompt = PromptSettings(prefix="A user chose these:", suffix="Next:", max_tokens=160)
    llm = TinyRandomSettings("tiny", pooling="last", prompt=prompt, width=width, n_layers=layers, vocabulary=500)
    source = str(make_tiny_random(llm, options.folder, data.titles))
    title = TitleSettings(n_candidates=4) if CASES[name].get("objective") == "title" else TitleSettings()
    settings = TeacherSettings(**CASES[name], title=title)
    device = torch.device(options.device)
    train, validation = (Rows.of(data, k) for k in ("train", "validation"))
    torch.manual_seed(0)
    model, recipe = build_teacher(llm, source, settings, data, train.targets.numpy(), device)
    engine = Engine(Run(options.folder / "run", "plan_check", {}), seed=0, tensorboard=False)
    split = [teacher_rows(model, part, width) for part in (train, validation)]
    kind = TitleObjective if settings.objective == "title" else ItemObjective
    objective = kind(model.train(), *split, engine)
    rows = np.argsort(-objective.train.token_counts, kind="stable")[:n_rows]
    answers = [len(each) + 1 for each in model.prompts.answer_tokens()] if settings.objective == "title" else [0]
    shape = TeacherShape(
        AutoConfig.from_pretrained(source),
        settings,
        recipe.precision,
        llm.pooling,
        data.n_items,
        data.history_length,
        0,
        on_cpu=device.type == "cpu",
    )
    step = RealStep(model, objective, torch.from_numpy(objective.train.gate_inputs), rows)
    return settings, step, shape, int(objective.train.token_counts.max()), max(answers)


def teacher_rows(model: LLMTeacher, data: Rows, width: int) -> TeacherRows:
    """All rows of a split, with gate inputs of unit length."""
    inputs = torch.nn.functional.normalize(torch.randn(len(data), width), dim=1).numpy()
    counts = model.token_counts(*data.histories())
    return TeacherRows(data, np.arange(len(data)), inputs, counts)


def headline(samples: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The ratios, and the worst of them."""
    samples = list(samples)
    result = {f"live_ratio {each['case']}": each["live_ratio"] for each in samples}
    for kind in ("live_ratio", "rss_ratio", "rss_mapped_ratio"):
        ratios = [each[kind] for each in samples if kind in each]
        if ratios:
            result |= {f"{kind}_least": min(ratios), f"{kind}_most": max(ratios)}
    return result


if __name__ == "__main__":
    main()
