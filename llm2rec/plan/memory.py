"""What lies in a GPU's memory, part by part, and which micro-batch fits."""

from collections.abc import Callable
from dataclasses import dataclass

from llm2rec.plan.models import Sizes
from llm2rec.plan.settings import DIVIDED

__all__ = ["Memory", "host_bytes", "largest_rows", "memory_at_rest", "quantisation_bytes"]

CONTEXT_BYTES = 2**30
"""What a process takes on a GPU besides its tensors: CUDA's context and libraries."""

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's ``reduce_bucket_size``, which it sets aside whole, however few gradients there are."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's ``stage3_max_live_parameters``: weights that are put together for use at one time."""

LIVE_BLOCKS = 2
"""Blocks that FSDP2 has put together: one in use and the next, which is fetched ahead."""


@dataclass(frozen=True)
class Memory:
    """A GPU's memory in one phase of a job.

    Attributes:
        parts: Bytes by what they are for.
        capacity: Bytes that the card holds.
    """

    parts: dict[str, int]
    capacity: float

    @property
    def total(self) -> int:
        """Bytes needed."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the card holds them."""
        return self.total <= self.capacity

    def with_activations(self, size: int) -> "Memory":
        """The same, with what a step adds."""
        return Memory({**self.parts, "activations": size}, self.capacity)


def memory_at_rest(sizes: Sizes, launch: str, gpus: int, capacity: float, *, wide: bool, on_cpu: bool) -> Memory:
    """What each GPU holds between two steps.

    Trained parameters, gradients and AdamW's two averages are float32, 16 bytes in all, and several GPUs copy gradients
    into buckets to exchange them. ZeRO-2 casts the model to bfloat16, keeps a float32 master copy beside the averages,
    and divides gradients and optimizer. ZeRO-3 and FSDP2 shard the frozen weights alone
    (`llm2rec.core.train.sharding`), FSDP2 those of blocks; what is in use is put together.

    Args:
        sizes: The teacher's.
        launch: One of `llm2rec.plan.settings.LAUNCHES`.
        gpus: How many share.
        capacity: Bytes of a card.
        wide: Whether the teacher is trained in float32, which DeepSpeed does not cast.
        on_cpu: Whether this is no GPU.
    """
    trained, weights = sizes.trained_parameters, sum(sizes.frozen_bytes.values())
    width = 4 if wide else 2
    parts = {
        "weights": weights,
        "items": sizes.item_bytes,
        "trained": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "buckets": 4 * trained if gpus > 1 else 0,
        "context": 0 if on_cpu else CONTEXT_BYTES,
    }
    if launch == "zero2":
        parts |= {"gradients": -(-4 * trained // gpus), "optimizer": -(-12 * trained // gpus)}
    if launch == "zero2_offload":
        parts |= {"gradients": 0, "optimizer": 0}
    if launch in ("zero2", "zero2_offload"):
        parts |= {"trained": width * trained, "buckets": width * BUCKET_ELEMENTS}
    if launch in DIVIDED and gpus > 1:
        divided = weights if launch == "zero3" else sizes.block_bytes
        live = width * LIVE_ELEMENTS if launch == "zero3" else LIVE_BLOCKS * sizes.largest_block_bytes
        parts |= {"weights": weights - divided + -(-divided // gpus), "gathered": min(divided, live)}
    return Memory(parts, capacity)


def quantisation_bytes(sizes: Sizes, precision: str, tokens: int, *, on_cpu: bool) -> int:
    """What a product with a quantised matrix takes besides its operands and its result, as bitsandbytes does it.

    8-bit products make a float16 and an int8 copy of their input and an int32 result; both formats unpack a matrix for
    the backward pass, 4-bit products for the forward pass as well.

    Args:
        sizes: The teacher's.
        precision: Of the frozen weights.
        tokens: Tokens of a micro-batch, padding included.
        on_cpu: Whether float32 is computed with.
    """
    rows, columns = sizes.largest_product
    unpacked = rows * columns * (4 if on_cpu else 2)
    if precision == "int8":
        return max(unpacked, tokens * (3 * columns + 4 * rows))
    return unpacked if precision == "int4" else 0


def host_bytes(
    trained: int, n_rows: int, history_length: int, gate_width: int, top_k: int, gpus: int, launch: str, loaded: int
) -> dict[str, int]:
    """What the machine's own memory holds, each process for itself but for what is offloaded.

    Args:
        trained: Trained parameters.
        n_rows: Training rows.
        history_length: Items of a history.
        gate_width: Width of the gate's inputs; 0 without any.
        top_k: Items per exported row.
        gpus: Processes.
        launch: One of `llm2rec.plan.settings.LAUNCHES`. What ``zero2_offload`` keeps here is float32 weights, gradients
            and averages; a model that is divided is whole here once, while it loads.
        loaded: Bytes of the frozen weights.
    """
    return {
        "rows": 4 * n_rows * (history_length + 2),
        "gate_inputs": 4 * n_rows * gate_width,
        "export": 2 * 8 * n_rows * top_k,  # blocks of items and scores, then both put together
        "optimizer": -(-16 * trained // gpus) if launch == "zero2_offload" else 0,
        "loading": -(-loaded // gpus) if launch in DIVIDED else 0,
    }


def largest_rows(peak: Callable[[int], int], room: float, most: int) -> int:
    """The largest micro-batch that fits, guessed along the line through two of them and then tried.

    Args:
        peak: Bytes of a micro-batch by its rows.
        room: Bytes that are left for it.
        most: Rows that are of any use.

    Returns:
        Rows, 0 if not even one fits.
    """
    one = peak(1)
    if one > room or most <= 1:
        return min(most, int(one <= room))
    slope = (peak(most) - one) / (most - 1)
    rows = most if slope <= 0 else min(most, 1 + int((room - one) / slope))
    while rows > 1 and peak(rows) > room:
        rows -= 1
    while rows < most and peak(rows + 1) <= room:
        rows += 1
    return rows
