"""Which rows each optimizer step sees: a pure function of seed, epoch, and the number of processes.

The effective batch is the same for every number of processes and micro-batches; only its division differs. Since all
of it is known ahead, a loss can be summed over rows and divided by the row count of all ranks and micro-batches, and
a killed run continues at the next step without any sampler state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["OptimizerStep", "epoch_batches", "micro_batch_count", "optimizer_steps"]

_WINDOW = 64  # effective batches whose rows are sorted together by length


@dataclass(frozen=True)
class OptimizerStep:
    """One rank's share of one optimizer step."""

    micro_batches: list[NDArray[np.int64]]
    """Row numbers of each micro-batch, never empty."""
    weights: list[NDArray[np.float32]]
    """1 for each row, 0 for a row that only fills an otherwise empty micro-batch, so that all ranks stay in step."""
    n_rows: int
    """Rows of this step over all ranks and micro-batches."""


def micro_batch_count(batch_size: int, micro_batch_size: int, n_processes: int) -> int:
    """Micro-batches per rank and optimizer step, so that none holds more than ``micro_batch_size`` rows."""
    return -(-batch_size // (micro_batch_size * n_processes))


def epoch_batches(
    rows: NDArray[np.int64], batch_size: int, seed: int, epoch: int, lengths: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Shuffle ``rows`` and cut them into effective batches; the last one may be smaller.

    Args:
        rows: Row numbers of shape ``(M,)``.
        batch_size: Rows per optimizer step, over all ranks.
        seed: Seed of the run.
        epoch: Epoch, from 0; each has its own order.
        lengths: Tokens of each row, shape ``(M,)``. Where given, rows of similar length share a batch (less padding):
            each window of 64 batches is sorted by length, then the batches are shuffled.

    Returns:
        Row numbers per effective batch. Every row occurs exactly once.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(rows))
    if lengths is None:
        return [rows[order[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    window = _WINDOW * batch_size
    for start in range(0, len(order), window):
        part = order[start : start + window]
        order[start : start + window] = part[np.argsort(lengths[part], kind="stable")]
    batches = [rows[order[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def optimizer_steps(
    batches: list[NDArray[np.int64]], n_micro_batches: int, rank: int, n_processes: int
) -> Iterator[OptimizerStep]:
    """Divide effective batches among ranks and micro-batches, as evenly as possible.

    Args:
        batches: Effective batches, the same on every rank.
        n_micro_batches: Micro-batches per rank and step.
        rank: This process.
        n_processes: Number of processes.

    Yields:
        This rank's share of each step.
    """
    for batch in batches:
        shares = np.array_split(batch, n_processes * n_micro_batches)
        mine = shares[rank * n_micro_batches : (rank + 1) * n_micro_batches]
        yield OptimizerStep(
            micro_batches=[share if len(share) else batch[:1] for share in mine],
            weights=[np.ones(len(s), np.float32) if len(s) else np.zeros(1, np.float32) for s in mine],
            n_rows=len(batch),
        )
