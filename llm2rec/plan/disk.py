"""What a job leaves on disk, file by file."""

from llm2rec.plan.models import Sizes
from llm2rec.plan.workload import Workload

__all__ = ["disk_bytes"]

_CONFIDENCE_CHARACTERS = 11  # nine digits, the point and a space


def disk_bytes(
    sizes: Sizes, work: Workload, *, width: int, gate_width: int, top_k: int, zero: bool, student: int
) -> dict[str, int]:
    """Bytes by what they are.

    Args:
        sizes: The teacher's.
        work: Items and rows.
        width: Width of title vectors.
        gate_width: Width of cached gate inputs; 0 where none are cached.
        top_k: Items per exported row; 0 where nothing is exported.
        zero: Whether checkpoints hold DeepSpeed's float32 copy of the weights.
        student: Parameters of the student.
    """
    trained, exported = sizes.trained_parameters, work.n_rows * min(top_k, work.n_items)
    return {
        "prepared_data": work.data_bytes,
        "llm": 2 * sizes.frozen_parameters,
        "gate_inputs": 4 * gate_width * (work.n_rows + work.n_validation_rows),
        # A checkpoint is whole before the older one goes; the best weights lie beside them.
        "checkpoints": (2 * (16 if zero else 12) + 4) * trained,
        "adapter": 4 * trained,
        "title_vectors": 4 * width * work.n_items,
        "outputs_embeddings": 4 * width * work.n_items if top_k else 0,
        "outputs_text": exported * (len(str(work.n_items - 1)) + 1 + _CONFIDENCE_CHARACTERS),
        "outputs_mapped": 8 * exported,
        "outputs_blocks": 8 * exported,  # until the export is finished
        "student": 4 * student,
    }
