"""Student with embedding distillation."""

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.vectors import principal_components
from llm2rec.distill.kd_losses import alignment_loss, contrastive_alignment
from llm2rec.student.items import FusedItemTable, ItemTable
from llm2rec.student.models import SequentialRecommender

__all__ = ["DistilledStudent"]


class DistilledStudent(nn.Module):
    """Student that learns from the teacher's item vectors by initialisation, fusion, alignment, or several of them.

    Args:
        student: Freshly initialised student; fusion replaces its item tables.
        teacher_vectors: Shape ``(N, d_teacher)``.
        fusion_scale: Weight of the projected teacher vectors in the item vectors; 0 disables fusion.
        align: Whether alignment losses are used.
        fusion_sides: Item tables to fuse: ``both``, ``input`` or ``output``; a single side needs untied tables.
        alignment_sides: Item tables to align: ``input``, ``output`` or ``both``; the last two need untied tables.
        initialise: Initial item vectors of all tables: ``none``, ``pca`` or ``whitened``.

    Raises:
        ConfigError: If a side needs untied tables and the student ties them.
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
        alignment_sides: str = "input",
        initialise: str = "none",
    ) -> None:
        super().__init__()
        if fusion_scale and fusion_sides != "both" and student.tie_items:
            raise ConfigError(
                f"`fusion_sides` is {fusion_sides!r}, which needs separate input and output item tables; build the "
                "student with `tie_items=False`, or fuse both sides."
            )
        if align and alignment_sides != "input" and student.tie_items:
            raise ConfigError(
                f"distill.embedding.alignment_sides is {alignment_sides!r}, but the student ties its item tables; use "
                "'input', or set `student.model.tie_items=false`."
            )
        self.student = student
        self.register_buffer("teacher_vectors", teacher_vectors, persistent=False)
        if fusion_scale:
            self._fuse(fusion_scale, fusion_sides)
        if initialise != "none":
            start = principal_components(teacher_vectors, student.width, whiten=initialise == "whitened")
            for table in {id(table): table for table in (student.input_items, student.output_items)}.values():
                table.start_from(start)
        sides = ("input", "output") if alignment_sides == "both" else (alignment_sides,)
        self.to_teacher = nn.ModuleDict(
            {side: nn.Linear(student.width, teacher_vectors.shape[1]) for side in sides} if align else {}
        )

    def _fuse(self, scale: float, sides: str) -> None:
        student, vectors = self.student, self.teacher_vectors
        if sides != "output":
            student.input_items = FusedItemTable(vectors, student.width, scale)
        # The paper uses one item vector for both sides; untied tables get separate projections.
        if student.tie_items:
            student.output_items = student.input_items
        elif sides != "input":
            student.output_items = FusedItemTable(vectors, student.width, scale)

    def forward(self, *inputs: Tensor) -> Tensor:
        """User vectors; see the student's ``forward``."""
        return self.student(*inputs)

    def score(self, users: Tensor) -> Tensor:
        """Logits over all items, shape ``(B, N)``."""
        return self.student.score(users)

    @torch.no_grad()
    def logits_without_dropout(self, *inputs: Tensor) -> Tensor:
        """Logits ``(B, N)`` of a second pass in evaluation mode, without gradient; restores the mode."""
        mode = self.student.training
        self.student.eval()
        logits = self.student.score(self.student(*inputs))
        self.student.train(mode)
        return logits

    def projected(self, item_ids: Tensor) -> dict[str, Tensor]:
        """Student's vectors of ``item_ids`` (shape ``(B,)``) in the teacher's space, ``(B, d_teacher)``, by side."""
        tables: dict[str, ItemTable] = {"input": self.student.input_items, "output": self.student.output_items}
        return {side: to(tables[side](item_ids.unsqueeze(1)).squeeze(1)) for side, to in self.to_teacher.items()}

    def alignment(self, item_ids: Tensor, kind: str, temperature: float) -> Tensor:
        """Alignment loss of ``item_ids``, the mean over the aligned sides.

        Args:
            item_ids: Shape ``(B,)``.
            kind: ``mse``, ``cosine`` or ``contrastive``.
            temperature: Temperature of ``contrastive``.

        Returns:
            Shape ``(B,)``.
        """
        assert self.to_teacher, "built without alignment"
        losses = [
            contrastive_alignment(projected, self.teacher_vectors, item_ids, temperature)
            if kind == "contrastive"
            else alignment_loss(projected, self.teacher_vectors[item_ids], kind)
            for projected in self.projected(item_ids).values()
        ]
        return torch.stack(losses).mean(dim=0)
