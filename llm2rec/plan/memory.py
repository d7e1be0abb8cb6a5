"""Memory of a GPU by part, the largest micro-batch that fits, and disk space."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from llm2rec.plan.models import Sizes
from llm2rec.plan.settings import SHARDED
from llm2rec.plan.workload import Workload
from llm2rec.student.items import ItemTable
from llm2rec.student.models import build_model
from llm2rec.student.settings import StudentSettings

__all__ = ["Memory", "disk_bytes", "largest_rows", "memory_at_rest", "quantisation_bytes", "student_sizes"]

CONTEXT_BYTES = 2**30
"""CUDA's context and libraries."""

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's ``reduce_bucket_size``, allocated whole however few gradients there are."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's ``stage3_max_live_parameters``: gathered weights at one time."""

LIVE_BLOCKS = 2
"""Blocks that FSDP2 holds gathered: the one in use and the prefetched next."""

_CONFIDENCE_CHARACTERS = 11  # nine digits, the point and a space


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU.

    Attributes:
        parts: Bytes by part.
        capacity: Bytes of the card.
    """

    parts: dict[str, int]
    capacity: float

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the card holds all parts."""
        return self.total <= self.capacity

    def with_activations(self, size: int) -> "Memory":
        """The same, with the activations and temporaries of a step."""
        return Memory({**self.parts, "activations": size}, self.capacity)


def memory_at_rest(sizes: Sizes, launch: str, gpus: int, capacity: float, *, wide: bool, on_cpu: bool) -> Memory:
    """Memory of each GPU between two steps.

    Trained weights, gradients and AdamW's two averages are float32, 16 bytes a parameter, and several GPUs copy
    gradients into buckets. ZeRO-2 casts the model to bfloat16, keeps a float32 master copy beside the averages, and
    shards gradients and optimizer. ZeRO-3 and FSDP2 shard only the frozen weights (`llm2rec.core.train.sharding`),
    FSDP2 those inside blocks; weights in use are gathered.

    Args:
        sizes: The teacher's.
        launch: One of `llm2rec.plan.settings.LAUNCHES`.
        gpus: Number of GPUs.
        capacity: Bytes of a card.
        wide: Whether the teacher is trained in float32, which DeepSpeed does not cast.
        on_cpu: Whether it runs on a CPU.
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
    if launch in SHARDED and gpus > 1:
        sharded = weights if launch == "zero3" else sizes.block_bytes
        live = width * LIVE_ELEMENTS if launch == "zero3" else LIVE_BLOCKS * sizes.largest_block_bytes
        parts |= {"weights": weights - sharded + -(-sharded // gpus), "gathered": min(sharded, live)}
    return Memory(parts, capacity)


def quantisation_bytes(sizes: Sizes, precision: str, tokens: int, *, on_cpu: bool) -> int:
    """Workspace of a product with a quantised matrix in bitsandbytes.

    8-bit products make a float16 and an int8 copy of their input and an int32 result. Both formats dequantise a matrix
    for the backward pass, 4-bit products also for the forward pass.

    Args:
        sizes: The teacher's.
        precision: The teacher's precision.
        tokens: Tokens of a micro-batch, padding included.
        on_cpu: Whether products are in float32.
    """
    rows, columns = sizes.largest_product
    unpacked = rows * columns * (4 if on_cpu else 2)
    if precision == "int8":
        return max(unpacked, tokens * (3 * columns + 4 * rows))
    return unpacked if precision == "int4" else 0


def student_sizes(settings: StudentSettings, n_items: int) -> tuple[int, int]:
    """A student's parameters, and the bytes of its weights, gradients and optimizer state, in float32.

    Args:
        settings: The student's.
        n_items: Items of the catalogue, N.
    """
    with torch.device("meta"):
        model = build_model(settings.name, n_items=n_items, **asdict(settings.model))
    parameters = sum(each.numel() for each in model.parameters())
    if settings.item_optimizer != "rowwise":
        return parameters, 16 * parameters
    tables = {module for module in model.modules() if isinstance(module, ItemTable)}
    in_tables = sum(table.weight.numel() for table in tables)
    sampled = settings.loss.completed().n_negatives is not None and settings.loss.dros.weight == 0
    gradients = 0 if sampled and settings.training.max_grad_norm == 0 else in_tables  # of some rows, or of all
    state = 8 * sum(len(table.weight) for table in tables)
    return parameters, 16 * (parameters - in_tables) + 4 * (in_tables + gradients) + state


def disk_bytes(sizes: Sizes, work: Workload, *, width: int, gate_width: int, top_k: int, zero: bool) -> dict[str, int]:
    """Disk space by part.

    Args:
        sizes: The teacher's.
        work: Items and rows.
        width: Width of title vectors.
        gate_width: Width of cached gate inputs; 0 if none are cached.
        top_k: Items per exported row; 0 without export.
        zero: Whether checkpoints hold DeepSpeed's float32 copy of the weights.
    """
    trained, exported = sizes.trained_parameters, work.n_rows * min(top_k, work.n_items)
    text = len(str(work.n_items - 1)) + 1 + _CONFIDENCE_CHARACTERS
    return {
        "prepared_data": work.data_bytes,
        "llm": 2 * sizes.frozen_parameters,
        "gate_inputs": 4 * gate_width * (work.n_rows + work.n_validation_rows),
        # A new checkpoint is complete before the old one is deleted; best weights and adapter lie beside them.
        "checkpoints": (2 * (16 if zero else 12) + 8) * trained,
        "title_vectors": 4 * width * work.n_items * (2 if top_k else 1),
        # Text files and memory-mapped copies, and blocks until the export is finished.
        "outputs": exported * (text + 16),
    }


def largest_rows(peak: Callable[[int], int], room: float, most: int) -> int:
    """The largest micro-batch that fits, estimated on the line through two of them and then checked.

    Args:
        peak: Returns the bytes of a micro-batch of so many rows.
        room: Bytes left for it.
        most: Upper limit of rows.

    Returns:
        Rows, 0 if one row does not fit.
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
