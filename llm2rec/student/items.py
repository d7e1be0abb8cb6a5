"""Item tables of a student: learned vectors, alone or together with a teacher's, such as those of the items' texts."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["INITIAL_STD", "FrozenItemTable", "FusedItemTable", "ItemTable", "ReadingItemTable"]

INITIAL_STD = 0.02
"""Standard deviation of the initial vectors of items."""


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
        nn.init.normal_(self.weight, std=INITIAL_STD)
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
        scaled = coordinates * (INITIAL_STD / coordinates.std())
        self.weight[: self.n_items, : coordinates.shape[1]] = scaled.to(self.weight)

    @torch.no_grad()
    def append(self, vectors: Tensor) -> None:
        """Append items with these vectors, shape ``(M, D)``; for tables that are served, not trained."""
        assert type(self) is ItemTable, "only a plain table can grow"
        items, padding = self.weight[: self.n_items], self.weight[self.n_items :]
        self.weight = nn.Parameter(torch.cat([items, vectors.to(self.weight), padding]), requires_grad=False)
        self.n_items += len(vectors)

    def vectors(self) -> Tensor:
        """Vectors of all items, shape ``(N, D)``."""
        return self.with_padding()[: self.n_items]

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up ``item_ids`` of any shape, padding included; returns ``(*shape, D)``."""
        return nn.functional.embedding(item_ids, self.weight, padding_idx=self.n_items, sparse=True)


class ReadingItemTable(ItemTable):
    """Item vectors made of a teacher's vectors and a learnable own part of each item.

    Items of `without_own`, and in training those of `drop_own`, have no own part: the teacher's vectors, such as those
    of their texts, represent them alone.

    Args:
        teacher_vectors: z, shape ``(N, c)``; neither trained nor saved.
        width: Width of the own part.
    """

    teacher_vectors: Tensor
    _has_own: Tensor | None  # (N + 1, 1), 1 or 0; None if all items have an own part

    def __init__(self, teacher_vectors: Tensor, width: int) -> None:
        super().__init__(len(teacher_vectors), width)
        with_padding = torch.cat(
            [teacher_vectors.float(), teacher_vectors.new_zeros(1, teacher_vectors.shape[1]).float()]
        )
        self.register_buffer("teacher_vectors", with_padding, persistent=False)
        self.register_buffer("_has_own", None, persistent=False)
        self._dropped: Tensor | None = None

    def without_own(self, items: Tensor) -> None:
        """Leave out the own part of some items, in training and evaluation.

        Args:
            items: Whether an item is one of them, shape ``(N,)``, bool.
        """
        self.register_buffer("_has_own", _column(~items, self.weight), persistent=False)

    def drop_own(self, items: Tensor | None) -> None:
        """Leave out the own part of some items in training, until the next call.

        Args:
            items: Whether an item is one of them, shape ``(N,)``, bool; None for no items.
        """
        self._dropped = items

    def _own_of_all(self) -> Tensor:
        """Own parts of all items and of padding, shape ``(N + 1, width)``."""
        kept = self._kept()
        return self.weight if kept is None else self.weight * kept

    def _own(self, item_ids: Tensor) -> Tensor:
        """Own parts of items, shape ``(*item_ids.shape, width)``."""
        kept, own = self._kept(), super().forward(item_ids)
        return own if kept is None else own * nn.functional.embedding(item_ids, kept)

    def _kept(self) -> Tensor | None:
        """Whether items and padding keep their own part, shape ``(N + 1, 1)``, 1 or 0; None if all do."""
        if not self.training or self._dropped is None:
            return self._has_own
        kept = _column(~self._dropped, self.weight)
        return kept if self._has_own is None else kept * self._has_own

    @abstractmethod
    def vector_map(self) -> Tensor:
        """Linear map from a teacher's vector to the vector of an item without own part, shape ``(D, c)``."""


class FusedItemTable(ReadingItemTable):
    """Projected vectors plus a learnable offset: ``e_i = b_i + scale · g(z_i)``.

    Embedding distillation of DLLM2Rec (arXiv 2405.00338): z are the teacher's vectors, g is a linear map, b the offset.
    Unlike in the released program, g has no bias, which would leak into padding.

    Args:
        teacher_vectors: z, shape ``(N, c)``; neither trained nor saved.
        width: Width of the student's vectors, D.
        scale: Weight of the projected vectors.
        unit: Initial weights of g: ``map``, those of `torch.nn.Linear` (paper and program), with which vectors of unit
            length are projected to a standard deviation of ``1 / sqrt(3 c)``; or ``ids``, normal with a standard
            deviation that projects the vectors to the one of the initial offsets, `INITIAL_STD`, for any c.
    """

    def __init__(self, teacher_vectors: Tensor, width: int, scale: float, unit: str = "map") -> None:
        super().__init__(teacher_vectors, width)
        self.projection = nn.Linear(teacher_vectors.shape[1], width, bias=False)
        if unit == "ids":
            nn.init.normal_(self.projection.weight, std=INITIAL_STD / _typical_length(teacher_vectors))
        self.scale = scale

    def with_padding(self) -> Tensor:
        """Vectors of all items and of padding, shape ``(N + 1, D)``."""
        return self._own_of_all() + self._projected(self.teacher_vectors, self._has_own)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up ``item_ids`` of any shape, padding included; returns ``(*shape, D)``."""
        # Histories share items, and the vectors are wide, so project each distinct item once.
        distinct, places = torch.unique(item_ids, return_inverse=True)
        has_own = None if self._has_own is None else self._has_own[distinct]
        projected = self._projected(self.teacher_vectors.index_select(0, distinct), has_own)
        return self._own(item_ids) + nn.functional.embedding(places, projected)

    def _projected(self, vectors: Tensor, has_own: Tensor | None) -> Tensor:
        """Scaled projections of vectors ``(M, c)``, shape ``(M, D)``.

        Items of `without_own`, which are never targets but negatives in every step, do not train the projection: it
        would learn to keep titles like theirs away from all users.
        """
        projected: Tensor = self.scale * self.projection(vectors)
        return projected if has_own is None else torch.where(has_own > 0, projected, projected.detach())

    def vector_map(self) -> Tensor:
        """See `ReadingItemTable.vector_map`."""
        return self.scale * self.projection.weight.detach()


class FrozenItemTable(ReadingItemTable):
    """The teacher's vectors in the first c columns, which are not trained, and own vectors in the others.

    ``e_i = (a · z_i, b_i)``: the idea of AlphaFuse (arXiv 2504.19218), which learns the ids in the directions that the
    leading principal components of a language model's vectors leave free.

    Args:
        teacher_vectors: z, shape ``(N, c)``, c below ``width``; neither trained nor saved.
        width: Width of the student's vectors, D.
        scale: Standard deviation of the first columns (a · z) in units of that of the initial own vectors.
    """

    def __init__(self, teacher_vectors: Tensor, width: int, scale: float) -> None:
        n_columns = teacher_vectors.shape[1]
        super().__init__(teacher_vectors, width - n_columns)
        self._factor = scale * INITIAL_STD * n_columns**0.5 / _typical_length(teacher_vectors)
        self.teacher_vectors *= self._factor

    def with_padding(self) -> Tensor:
        """Vectors of all items and of padding, shape ``(N + 1, D)``."""
        return torch.cat([self.teacher_vectors, self._own_of_all()], dim=1)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Look up ``item_ids`` of any shape, padding included; returns ``(*shape, D)``."""
        return torch.cat([nn.functional.embedding(item_ids, self.teacher_vectors), self._own(item_ids)], dim=-1)

    def vector_map(self) -> Tensor:
        """See `ReadingItemTable.vector_map`."""
        n_columns, n_own = self.teacher_vectors.shape[1], self.weight.shape[1]
        return self._factor * torch.eye(n_columns + n_own, n_columns, device=self.weight.device)


def _typical_length(vectors: Tensor) -> float:
    """Root mean square of the lengths of vectors ``(N, c)``; 1 if all are zero."""
    return float(vectors.float().square().sum(dim=1).mean().sqrt()) or 1.0


def _column(items: Tensor, like: Tensor) -> Tensor:
    """Items ``(N,)``, bool, and padding (False) as a column ``(N + 1, 1)`` of 1 and 0, in the dtype of ``like``."""
    return nn.functional.pad(items, (0, 1)).to(like).unsqueeze(1)
