"""Student with embedding distillation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.core.vectors import principal_components
from llm2rec.distill.kd_losses import alignment_loss, contrastive_alignment
from llm2rec.student.items import FrozenItemTable, FusedItemTable, ItemTable, ReadingItemTable
from llm2rec.student.models import SequentialRecommender

__all__ = ["DistilledStudent"]


class DistilledStudent(nn.Module):
    """Student that learns from the teacher's item vectors by initialisation, fusion, alignment, or several of them.

    Args:
        student: Freshly initialised student; fusion replaces its item tables.
        teacher_vectors: Shape ``(N, d_teacher)``.
        fusion_scale: Weight of the teacher's vectors in the item vectors; 0 disables fusion.
        align: Whether alignment losses are used.
        fusion_sides: Item tables to fuse: ``both``, ``input`` or ``output``; a single side needs untied tables.
        alignment_sides: Item tables to align: ``input``, ``output`` or ``both``; the last two need untied tables.
        initialise: Initial item vectors of all tables: ``none``, ``pca`` or ``whitened``.
        fusion: ``projection`` (`FusedItemTable`) or ``frozen`` (`FrozenItemTable`).
        fusion_unit: ``map`` or ``ids``; see `FusedItemTable`.
        id_dropout: Share of items that `drop_ids` drops.
        untrained: Items that training never shows, shape ``(N,)``, bool: fused tables represent them by the teacher's
            vectors alone. None for no items.

    Raises:
        ConfigError: If a side needs untied tables and the student ties them, or no columns are left beside frozen ones.
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
        fusion: str = "projection",
        fusion_unit: str = "map",
        id_dropout: float = 0.0,
        untrained: Tensor | None = None,
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
        if fusion_scale and fusion == "frozen" and teacher_vectors.shape[1] >= student.width:
            raise ConfigError(
                f"distill.embedding.fusion is 'frozen' with {teacher_vectors.shape[1]} columns, but item vectors have "
                f"{student.width}; lower `distill.embedding.components`, or raise `student.model.width`."
            )
        self.student, self.id_dropout = student, id_dropout
        self.register_buffer("teacher_vectors", teacher_vectors, persistent=False)
        if fusion_scale:
            self._fuse(
                fusion_sides, lambda: _fused_table(teacher_vectors, student.width, fusion_scale, fusion, fusion_unit)
            )
        if untrained is not None:
            for fused in self.reading_tables:
                fused.without_own(untrained)
        if initialise != "none":
            start = principal_components(teacher_vectors, student.width, whiten=initialise == "whitened")
            for table in {id(table): table for table in (student.input_items, student.output_items)}.values():
                table.start_from(start)
        sides = ("input", "output") if alignment_sides == "both" else (alignment_sides,)
        self.to_teacher = nn.ModuleDict(
            {side: nn.Linear(student.width, teacher_vectors.shape[1]) for side in sides} if align else {}
        )

    def _fuse(self, sides: str, fused_table: Callable[[], ReadingItemTable]) -> None:
        student = self.student
        if sides != "output":
            student.input_items = fused_table()
        # The paper uses one item vector for both sides; untied tables get separate projections.
        if student.tie_items:
            student.output_items = student.input_items
        elif sides != "input":
            student.output_items = fused_table()

    @property
    def reading_tables(self) -> list[ReadingItemTable]:
        """The fused item tables, each once."""
        tables = {id(table): table for table in (self.student.input_items, self.student.output_items)}
        return [table for table in tables.values() if isinstance(table, ReadingItemTable)]

    def drop_ids(self, seed: int) -> None:
        """Draw the items whose offset training leaves out until the next call; all tables leave out the same.

        A choice of items, not of occurrences: an item's vector is the same wherever a step reads or scores it, so that
        scoring the catalogue costs one product of ``(N, D)`` with ``(N, 1)``.

        Args:
            seed: Seed of the draw, the same on all processes and devices.
        """
        if self.id_dropout > 0:
            draws = torch.rand(self.student.n_items, generator=torch.Generator().manual_seed(seed))
            for table in self.reading_tables:
                table.drop_own((draws < self.id_dropout).to(table.weight.device))

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


def _fused_table(vectors: Tensor, width: int, scale: float, fusion: str, unit: str) -> ReadingItemTable:
    """An item table fused with the teacher's vectors ``(N, c)``."""
    if fusion == "frozen":
        return FrozenItemTable(vectors, width, scale)
    return FusedItemTable(vectors, width, scale, unit)
