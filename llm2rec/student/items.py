"""Item tables of a student: learned vectors, or vectors fused with the teacher's (DLLM2Rec)."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FusedItemTable", "ItemTable"]

_INITIAL_STD = 0.02


class ItemTable(nn.Module):
    """A learnable vector per item.

    Padding is id ``n_items``, one past the last item: its vector is zero, gets no gradient and is never scored.

    Lookups have sparse gradients, so a step allocates at most one dense gradient of the table.

    Args:
        n_items: Number of items, N.
        width: Width of the vectors, D.

    Attributes:
        sparse_gradients: Whether the optimizer gets sparse gradients, for row-wise updates; otherwise they are made
            dense.
    """

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.n_items = n_items
        self.weight = nn.Parameter(torch.empty(n_items + 1, width))
        nn.init.normal_(self.weight, std=_INITIAL_STD)
        with torch.no_grad():
            self.weight[n_items] = 0
        self.sparse_gradients = False
        self._register_hook()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; registers the hook again, since copies of a tensor have no hooks."""
        super().__setstate__(state)
        self._register_hook()

    def _register_hook(self) -> None:
        if self.weight.requires_grad:
            self.weight.register_post_accumulate_grad_hook(self._make_dense)

    def _make_dense(self, weight: Tensor) -> None:
        """Make a sparse gradient dense before the optimizer, DDP or DeepSpeed read it."""
        if weight.grad is not None and weight.grad.is_sparse and not self.sparse_gradients:
            weight.grad = weight.grad.to_dense()

    def with_padding(self) -> Tensor:
        """Vectors of all items and of padding, shape ``(N + 1, D)``; the weight itself, not a copy."""
        return self.weight

    @torch.no_grad()
    def start_from(self, coordinates: Tensor) -> None:
        """Initialise the first c columns with ``coordinates``, shape ``(N, c)``, c at most D.

        One factor scales them to the standard deviation of the random initialisation; other columns stay random.
        """
        scaled = coordinates * (_INITIAL_STD / coordinates.std())
        self.weight[: self.n_items, : coordinates.shape[1]] = scaled.to(self.weight)

    def vectors(self) -> Tensor:
        """Vectors of all items, shape ``(N, D)``."""
        return self.with_padding()[: self.n_items]

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up ``item_ids`` of any shape, padding included; returns ``(*shape, D)``."""
        return nn.functional.embedding(item_ids, self.weight, padding_idx=self.n_items, sparse=True)


class FusedItemTable(ItemTable):
    """Projected teacher vectors plus a learnable offset: ``e_i = b_i + scale · g(z_i)``.

    Embedding distillation of DLLM2Rec (arXiv 2405.00338): z are the teacher's vectors, g is a linear map, b the offset.
    Unlike in the released program, g has no bias, which would leak into padding.

    Args:
        teacher_vectors: z, shape ``(N, D_teacher)``; neither trained nor saved.
        width: Width of the student's vectors, D.
        scale: Weight of the projected vectors.
    """

    teacher_vectors: Tensor

    def __init__(self, teacher_vectors: Tensor, width: int, scale: float) -> None:
        super().__init__(len(teacher_vectors), width)
        with_padding = torch.cat(
            [teacher_vectors.float(), teacher_vectors.new_zeros(1, teacher_vectors.shape[1]).float()]
        )
        self.register_buffer("teacher_vectors", with_padding, persistent=False)
        self.projection = nn.Linear(teacher_vectors.shape[1], width, bias=False)
        self.scale = scale

    def with_padding(self) -> Tensor:
        """Vectors of all items and of padding, shape ``(N + 1, D)``."""
        return self.weight + self.scale * self.projection(self.teacher_vectors)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up ``item_ids`` of any shape, padding included; returns ``(*shape, D)``."""
        # Histories share items, and the teacher's vectors are wide, so project each distinct item once.
        distinct, places = torch.unique(item_ids, return_inverse=True)
        projected = self.scale * self.projection(self.teacher_vectors.index_select(0, distinct))
        return super().forward(item_ids) + nn.functional.embedding(places, projected)
