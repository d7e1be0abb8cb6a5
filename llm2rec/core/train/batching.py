"""Batches of optimizer steps, as pure functions of seed, epoch and number of processes.

The effective batch does not depend on its split into micro-batches and processes. It is known in advance, so losses are
summed over rows and divided by the rows of the whole step, and a resumed run continues at the next step without sampler
state.

Batches consist of units: usually single training rows, but a unit may contain several rows that one forward pass scores
together. Batch sizes and numbers of steps always count rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError

__all__ = [
    "MicroBatch",
    "OptimizerStep",
    "TrainingUnits",
    "batches_by_cost",
    "epoch_batches",
    "micro_batch_count",
    "micro_batches",
]

_WINDOW = 64  # effective batches whose rows are sorted together by length


@dataclass(frozen=True)
class TrainingUnits:
    """Units of training rows that an epoch shuffles.

    Attributes:
        numbers: Numbers of the units, shape ``(U,)``, the same on every process.
        sizes: Rows of each unit by its number; None means 1 each.
        lengths: Tokens of each unit, shape ``(U,)``, to batch units of similar length; None ignores lengths.
    """

    numbers: NDArray[np.int64]
    sizes: NDArray[np.int64] | None = None
    lengths: NDArray[np.int64] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of all units."""
        return len(self.numbers) if self.sizes is None else int(self.sizes[self.numbers].sum())


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward and backward pass on one process.

    Attributes:
        units: Numbers of the units, shape ``(b,)``, never empty.
        weights: 1 for each row of these units, in their order; 0 for rows that fill an empty micro-batch, so that all
            processes run the same number of passes. Shape ``(B,)``.
        step: Optimizer step, from 0.
        epoch: Epoch, from 0.
    """

    units: NDArray[np.int64]
    weights: NDArray[np.float32]
    step: int
    epoch: int


@dataclass(frozen=True)
class OptimizerStep:
    """The effective batch of one optimizer step, the same on every process.

    Attributes:
        number: Global step, from 0.
        epoch: Epoch, from 0.
        units: Numbers of its units, shape ``(b,)``.
        n_rows: Rows over all processes and micro-batches.
        sizes: Rows of each unit by its number; None means 1 each.
    """

    number: int
    epoch: int
    units: NDArray[np.int64]
    n_rows: int
    sizes: NDArray[np.int64] | None = None


def micro_batch_count(batch_size: int, micro_batch_size: int, n_processes: int) -> int:
    """Micro-batches per process and optimizer step, of at most ``micro_batch_size`` rows each."""
    return -(-batch_size // (micro_batch_size * n_processes))


def epoch_batches(units: TrainingUnits, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Shuffle units and split them into effective batches; the last one may be smaller.

    Units are not split: a unit belongs to the batch of its last row when rows are counted off ``batch_size`` at a time.
    The number of batches is the same as for single rows, and batch sizes differ from ``batch_size`` by less than the
    largest unit. With ``units.lengths`` each window of 64 batches is sorted by length (less padding), then the batches
    are shuffled.

    Args:
        units: Units to shuffle.
        batch_size: Rows per optimizer step, over all processes.
        seed: Seed of the run.
        epoch: Epoch, from 0; each has its own order.

    Returns:
        Numbers of the units of each effective batch. Every unit occurs exactly once.

    Raises:
        ConfigError: If a unit is larger than a batch.
    """
    numbers, lengths, sizes = units.numbers, units.lengths, units.sizes
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(numbers))
    if lengths is None:
        return _cut(numbers[order], batch_size, sizes)
    window = _WINDOW * batch_size
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = _cut(numbers[order], batch_size, sizes)
    return [batches[i] for i in generator.permutation(len(batches))]


def _cut(units: NDArray[np.int64], batch_size: int, sizes: NDArray[np.int64] | None) -> list[NDArray[np.int64]]:
    if sizes is None:
        return [units[start : start + batch_size] for start in range(0, len(units), batch_size)]
    rows = sizes[units]
    if rows.max(initial=0) > batch_size:
        raise ConfigError(
            f"`batch_size` is {batch_size}, but one sequence has up to {rows.max()} training rows; set it to at least "
            f"{rows.max()}."
        )
    last_row = np.cumsum(rows) - 1
    return np.split(units, np.flatnonzero(np.diff(last_row // batch_size)) + 1)


def micro_batches(step: OptimizerStep, n_micro_batches: int, rank: int, n_processes: int) -> list[MicroBatch]:
    """Split an effective batch into micro-batches and among processes, as evenly as possible.

    Args:
        step: The effective batch.
        n_micro_batches: Micro-batches per process.
        rank: This process.
        n_processes: Number of processes.

    Returns:
        This process's micro-batches, the same number on every process.
    """
    shares = np.array_split(step.units, n_processes * n_micro_batches)
    mine = shares[rank * n_micro_batches : (rank + 1) * n_micro_batches]
    filled = [(share, np.ones) if len(share) else (step.units[:1], np.zeros) for share in mine]
    return [
        MicroBatch(
            units,
            weights_of(len(units) if step.sizes is None else int(step.sizes[units].sum()), np.float32),
            step.number,
            step.epoch,
        )
        for units, weights_of in filled
    ]


def batches_by_cost(costs: NDArray[np.int64], max_cost: int) -> list[NDArray[np.int64]]:
    """Split rows for inference into batches of similar cost, such as the number of tokens.

    Args:
        costs: Cost of each row, shape ``(M,)``.
        max_cost: Upper bound of a batch's rows times its largest cost; a row above the bound forms its own batch.

    Returns:
        Positions ``0..M-1``, each once, most expensive rows first, so that out-of-memory errors occur early.
    """
    order = np.argsort(-costs, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_cost // max(1, int(costs[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
