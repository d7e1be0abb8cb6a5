"""Memory and time of one training step of SASRec beside the size of the catalogue, loss by loss.

    .venv/bin/python benchmarks/catalogue_memory.py --json benchmarks/results/catalogue_memory.json

A step is forward pass, loss, backward pass and optimizer on 128 sequences of 50 items, with the vectors of all 6,400
positions as users and a target for each: SASRec, 2 blocks, width 64, one item table for input and output.

    plain            cross-entropy of a matrix of 6,400 x N logits; up to 10^5 items
    blocked          the same cross-entropy in tiles, computed again in the backward pass: what training uses; up to
                     10^6 items, since at 10^7 its arithmetic alone is ten minutes a step of two processors
    sampled          sampled softmax, 256 negatives for the step, AdamW
    sampled_rowwise  the same with sparse gradients and row-wise state

Each case has a process of its own. Its peak is the largest resident set of the process (``ru_maxrss``) from its start
to the end of the last step, less the largest up to the moment where all is imported and nothing is built; it holds what
the allocator and the libraries keep. ``state_bytes`` are parameters, gradients and the optimizer's state as AdamW has
them (four numbers a parameter), but for the row-wise case those that it has. ``beyond_state_bytes`` is the difference:
activations, tiles, code loaded by the first step. The headline is blocked cross-entropy: its peak divided by its state
at 10^6 items, and how much more is beyond the state at 10^6 than at 10^3 items.

``floor_seconds`` is what the step's large operations take at the rates that the same process measures: the matrix
products of the loss (4 of 6,400 x N x 64 for blocked, 3 for plain) at the rate of one tile's product, one ``exp2`` per
logit and pass, and AdamW's 7 passes over the table (reads of weight, gradient and moments, writes of all but the
gradient) at the rate of a copy. ``share_of_floor`` is the floor divided by the fastest step.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor, nn

from llm2rec.core.train.optimizer import adamw
from llm2rec.student.losses import cross_entropy
from llm2rec.student.models import SASRec
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import TaskLoss

SEQUENCES, LENGTH, WIDTH, NEGATIVES = 128, 50, 64, 256
USERS, TILE = SEQUENCES * LENGTH, 1024
CASES = ("plain", "blocked", "sampled", "sampled_rowwise")
LARGEST = {"plain": 10**5, "blocked": 10**6, "sampled": 10**7, "sampled_rowwise": 10**7}


def main() -> None:
    """Run every case in a process of its own and write the JSON file."""
    parser = harness.command_line(__doc__, rounds=3)
    parser.add_argument("--items", type=int, nargs="+", help="sizes of the catalogue")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(measure(options.case, options.items[0], options.rounds)))
        return
    sizes = options.items or ([10**3, 10**4] if options.quick else [10**3, 10**4, 10**5, 10**6, 10**7])
    samples = [
        in_a_process(case, n_items, 1 if options.quick or n_items > 10**4 else options.rounds, options)
        for n_items in sizes
        for case in CASES
        if n_items <= LARGEST[case]
    ]
    harness.write_result(options, headline(samples), samples)


def in_a_process(case: str, n_items: int, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case where nothing was allocated before."""
    command = [sys.executable, __file__, "--case", case, "--items", str(n_items), "--rounds", str(rounds)]
    command += ["--json", os.devnull, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    sample: dict[str, Any] = json.loads(done.stdout)
    beyond = sample["beyond_state_bytes"] / 2**20
    print(f"{case} {n_items:,}: {beyond:.0f} MiB beyond the state, {min(sample['seconds']):.2f} s", flush=True)
    return sample


def headline(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Give the ratios that others read; those of sizes that were not run are left out."""
    found = {(sample["case"], sample["items"]): sample for sample in samples}
    values = {}
    for (case, n_items), sample in found.items():
        name = f"1e{round(math.log10(n_items))}"
        if case == "blocked":
            values[f"peak_vs_state_{name}"] = sample["peak_bytes"] / sample["state_bytes"]
            values[f"beyond_state_vs_1e3_{name}"] = (
                sample["beyond_state_bytes"] / found["blocked", 10**3]["beyond_state_bytes"]
            )
        if case == "sampled":
            values[f"sampled_peak_vs_state_{name}"] = sample["peak_bytes"] / sample["state_bytes"]
        if case == "plain":
            blocked = found["blocked", n_items]
            values[f"peak_vs_plain_{name}"] = blocked["peak_bytes"] / sample["peak_bytes"]
            values[f"time_vs_plain_{name}"] = min(blocked["seconds"]) / min(sample["seconds"])
    return values


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(case: str, n_items: int, rounds: int) -> dict[str, Any]:
    """Train a few steps in this process and say what they took."""
    before = peak_resident_bytes()
    torch.manual_seed(0)
    model = SASRec(n_items, WIDTH, LENGTH, n_blocks=2)
    rowwise = [model.input_items.weight] if case == "sampled_rowwise" else []
    model.input_items.sparse_gradients = bool(rowwise)
    optimizer = adamw(model, 1e-3, 0.0, rowwise=rowwise)
    generator = torch.Generator().manual_seed(0)
    history, targets = torch.randint(n_items, (2, SEQUENCES, LENGTH), generator=generator)
    sampled = TaskLoss(model, LossSettings("sampled_softmax", NEGATIVES), targets.flatten(), seed=0)
    task_loss = TaskLoss(model, LossSettings(), targets.flatten(), seed=0) if case == "blocked" else sampled
    rows = np.arange(USERS)

    def step(number: int) -> float:
        start = time.perf_counter()
        users, wanted = all_positions(model, history), targets.flatten()
        if number == 0:  # makes the optimizer's state, at the least cost
            loss = sampled(users, wanted, rows, epoch=0, step=number)["loss"].mean()
        elif case == "plain":
            loss = cross_entropy(model.score(users), wanted).mean()
        else:
            loss = task_loss(users, wanted, rows, epoch=0, step=number)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    seconds = [step(number) for number in range(1 + rounds)]
    peak = peak_resident_bytes() - before
    state = state_bytes(model, optimizer, rowwise)
    floor = floor_seconds(case, n_items, model)
    return {
        "case": case,
        "items": n_items,
        "peak_bytes": peak,
        "state_bytes": state,
        "beyond_state_bytes": peak - state,
        "seconds": seconds[1:],
        "floor_seconds": floor,
        "share_of_floor": sum(floor.values()) / min(seconds[1:]),
    }


def all_positions(model: SASRec, history: Tensor) -> Tensor:
    """User vectors at every position of full histories ``(B, L)``, as ``(B * L, D)``; attention is causal."""
    age = torch.arange(history.shape[1] - 1, -1, -1)
    x = model.dropout(model.input_items(history) + model.positions[age])
    for block in [*model.blocks, model.last_block]:
        x = block(x)
    return model.norm(x).flatten(0, 1)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, rowwise: list[nn.Parameter]) -> int:
    """Bytes of parameters, dense gradients and the optimizer's state; the row-wise case has no dense gradient."""
    state = sum(
        value.numel() * value.element_size() for values in optimizer.state.values() for value in values.values()
    )
    weights = [weight.numel() * weight.element_size() for weight in model.parameters()]
    gradients = [weight.numel() * weight.element_size() for weight in model.parameters() if not rowwise]
    return state + sum(weights) + sum(gradients)


def floor_seconds(case: str, n_items: int, model: SASRec) -> dict[str, float]:
    """Seconds of the step's large operations at rates measured here and now."""
    product, exponential, copied = harness.floor_rates(WIDTH, TILE)
    scored, passes = (NEGATIVES, 3) if case.startswith("sampled") else (n_items, 3 if case == "plain" else 4)
    table = model.input_items.weight.numel() * 4
    return {
        "products": product * passes * 2 * USERS * scored * WIDTH,
        "exponentials": exponential * (passes - 2) * USERS * scored,
        "optimizer": copied * (0 if case == "sampled_rowwise" else 7 * table),
    }


if __name__ == "__main__":
    main()
