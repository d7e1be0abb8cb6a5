"""Which rows each optimizer step sees: a pure function of seed, epoch, and the number of processes.

The effective batch is the same for every number of processes and micro-batches; only its division differs. Since all
of it is known ahead, a loss can be summed over rows and divided by the row count of all ranks and micro-batches, and
a killed run continues at the next step without any sampler state.

What is divided are units: most often single training rows, but a unit may carry several rows that one forward pass
answers together. Sizes of batches and numbers of steps are always counted in rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError

__all__ = [
    "OptimizerStep",
    "batches_by_cost",
    "epoch_batches",
    "micro_batch_count",
    "optimizer_step",
    "optimizer_steps",
]

_WINDOW = 64  # effective batches whose rows are sorted together by length


@dataclass(frozen=True)
class OptimizerStep:
    """One rank's share of one optimizer step."""

    micro_batches: list[NDArray[np.int64]]
    """Units of each micro-batch, never empty: row numbers, unless rows come several at a time."""
    weights: list[NDArray[np.float32]]
    """1 for each row of those units, in their order; 0 for the rows of a unit that only fills an otherwise empty
    micro-batch, so that all ranks stay in step."""
    n_rows: int
    """Rows of this step over all ranks and micro-batches."""
    batch: NDArray[np.int64]
    """Units of all ranks, to divide them anew."""
    sizes: NDArray[np.int64] | None
    """Rows of each unit by its number; None means 1 each."""


def micro_batch_count(batch_size: int, micro_batch_size: int, n_processes: int) -> int:
    """Micro-batches per rank and optimizer step, so that none holds more than ``micro_batch_size`` rows."""
    return -(-batch_size // (micro_batch_size * n_processes))


def epoch_batches(
    units: NDArray[np.int64],
    batch_size: int,
    seed: int,
    epoch: int,
    lengths: NDArray[np.int64] | None = None,
    sizes: NDArray[np.int64] | None = None,
) -> list[NDArray[np.int64]]:
    """Shuffle ``units`` and cut them into effective batches; the last one may be smaller.

    Args:
        units: Numbers of the units, shape ``(M,)``.
        batch_size: Rows per optimizer step, over all ranks.
        seed: Seed of the run.
        epoch: Epoch, from 0; each has its own order.
        lengths: Tokens of each unit, shape ``(M,)``. Where given, units of similar length share a batch (less padding):
            each window of 64 batches is sorted by length, then the batches are shuffled.
        sizes: Rows of each unit by its number; None means 1 each. Units stay whole: a unit belongs to the batch in
            which its last row would fall if rows were counted off ``batch_size`` at a time. There are then as many
            batches as for single rows, and each misses ``batch_size`` by less than the largest unit.

    Returns:
        Units of each effective batch. Every unit occurs exactly once.

    Raises:
        ConfigError: If a unit is larger than a batch, so that some batch might go without any.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(units))
    if lengths is None:
        return _cut(units[order], batch_size, sizes)
    window = _WINDOW * batch_size
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = _cut(units[order], batch_size, sizes)
    return [batches[i] for i in generator.permutation(len(batches))]


def _cut(units: NDArray[np.int64], batch_size: int, sizes: NDArray[np.int64] | None) -> list[NDArray[np.int64]]:
    if sizes is None:
        return [units[start : start + batch_size] for start in range(0, len(units), batch_size)]
    rows = sizes[units]
    if rows.max(initial=0) > batch_size:
        raise ConfigError(
            f"`batch_size` is {batch_size}, but up to {rows.max()} training rows come in one piece; raise it to at "
            "least that."
        )
    last_row = np.cumsum(rows) - 1
    return np.split(units, np.flatnonzero(np.diff(last_row // batch_size)) + 1)


def optimizer_step(
    batch: NDArray[np.int64],
    n_micro_batches: int,
    rank: int,
    n_processes: int,
    sizes: NDArray[np.int64] | None = None,
) -> OptimizerStep:
    """Divide an effective batch among ranks and micro-batches, as evenly as possible.

    Args:
        batch: Units of the effective batch, the same on every rank.
        n_micro_batches: Micro-batches per rank and step.
        rank: This process.
        n_processes: Number of processes.
        sizes: Rows of each unit by its number; None means 1 each.

    Returns:
        This rank's share.
    """

    def n_rows(units: NDArray[np.int64]) -> int:
        return len(units) if sizes is None else int(sizes[units].sum())

    shares = np.array_split(batch, n_processes * n_micro_batches)
    mine = shares[rank * n_micro_batches : (rank + 1) * n_micro_batches]
    filled = [(share, np.ones) if len(share) else (batch[:1], np.zeros) for share in mine]
    return OptimizerStep(
        micro_batches=[units for units, _ in filled],
        weights=[weigh(n_rows(units), np.float32) for units, weigh in filled],
        n_rows=n_rows(batch),
        batch=batch,
        sizes=sizes,
    )


def optimizer_steps(
    batches: list[NDArray[np.int64]],
    n_micro_batches: int,
    rank: int,
    n_processes: int,
    sizes: NDArray[np.int64] | None = None,
) -> Iterator[OptimizerStep]:
    """Divide effective batches one after the other; see `optimizer_step`."""
    for batch in batches:
        yield optimizer_step(batch, n_micro_batches, rank, n_processes, sizes)


def batches_by_cost(costs: NDArray[np.int64], max_cost: int) -> list[NDArray[np.int64]]:
    """Cut rows that are only read, not trained on, into batches of similar cost, such as tokens with their padding.

    Args:
        costs: Cost of each row, shape ``(M,)``.
        max_cost: Bound of rows times costliest row; a single costlier row is a batch of its own.

    Returns:
        Positions ``0..M-1``, each once, costliest rows first (so that running out of memory shows at once).
    """
    order = np.argsort(-costs, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_cost // max(1, int(costs[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
