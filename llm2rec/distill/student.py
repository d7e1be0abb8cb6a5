"""A student prepared for embedding distillation."""

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.student.items import FusedItemTable
from llm2rec.student.models import SequentialRecommender

__all__ = ["DistilledStudent"]


class DistilledStudent(nn.Module):
    """A student whose item vectors are tied to the teacher's, by fusion, by alignment, or both.

    Args:
        student: Freshly initialised student; its item tables are replaced where fusion is asked for.
        teacher_vectors: Shape ``(N, d_teacher)``.
        fusion_scale: Weight of the projected teacher vectors in the item vectors; 0 leaves the tables alone.
        align: Whether alignment losses will be asked for.
        fusion_sides: ``both`` fuses the vectors that items are read and scored with; ``input`` only the former, and
            needs a student that keeps them apart.

    Raises:
        ConfigError: If fusion on the input side alone is asked of a student with one table for both sides.
    """

    teacher_vectors: Tensor

    def __init__(
        self,
        student: SequentialRecommender,
        teacher_vectors: Tensor,
        *,
        fusion_scale: float,
        align: bool,
        fusion_sides: str = "both",
    ) -> None:
        super().__init__()
        if fusion_scale and fusion_sides == "input" and student.tie_items:
            raise ConfigError(
                "fusion on the input side alone needs a student that scores items with vectors of their own; build it "
                "with `tie_items=False`, or fuse on both sides."
            )
        self.student = student
        self.register_buffer("teacher_vectors", teacher_vectors, persistent=False)
        if fusion_scale:
            student.input_items = FusedItemTable(teacher_vectors, student.width, fusion_scale)
            # The paper's item vector serves both sides; untied tables each get their own projection.
            if student.tie_items:
                student.output_items = student.input_items
            elif fusion_sides == "both":
                student.output_items = FusedItemTable(teacher_vectors, student.width, fusion_scale)
        self.to_teacher = nn.Linear(student.width, teacher_vectors.shape[1]) if align else None

    def forward(self, *inputs: Tensor) -> Tensor:
        """User vectors; see the student's own ``forward``."""
        return self.student(*inputs)

    def score(self, users: Tensor) -> Tensor:
        """Logits over all items, shape ``(B, N)``."""
        return self.student.score(users)

    @torch.no_grad()
    def logits_without_dropout(self, *inputs: Tensor) -> Tensor:
        """Logits ``(B, N)`` of a second pass in evaluation mode; the mode is put back and no gradient flows."""
        mode = self.student.training
        self.student.eval()
        logits = self.student.score(self.student(*inputs))
        self.student.train(mode)
        return logits

    def projected(self, item_ids: Tensor) -> Tensor:
        """Student's vectors of ``item_ids`` (shape ``(B,)``) in the teacher's space, shape ``(B, d_teacher)``."""
        assert self.to_teacher is not None, "built without alignment"
        return self.to_teacher(self.student.input_items(item_ids.unsqueeze(1)).squeeze(1))
