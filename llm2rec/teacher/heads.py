"""Heads: scores of all items from the language model's user vectors."""

import torch
from torch import Tensor, nn

__all__ = ["HEADS", "ItemHead", "JoinedHead", "ProjectedHead", "build_head"]

HEADS = ("titles", "projected", "joined", "residual")


class ItemHead(nn.Module):
    """Scores by titles: ``s_i = scale · cos(h, v_i) + bias_i``. It has no trained parameters.

    Args:
        titles: The language model's vectors of the titles, shape ``(N, d)``, unit length.
        bias: Added to each item's score, shape ``(N,)``.
        scale: Factor on the cosine, an inverse temperature.
    """

    titles: Tensor
    bias: Tensor
    reads_recommender = False  # whether `forward` needs the recommender's user vectors

    def __init__(self, titles: Tensor, bias: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("titles", titles.float(), persistent=False)  # see `keep_titles`
        self.register_buffer("bias", bias.float(), persistent=False)
        self.scale = scale

    def forward(self, users: Tensor, recommender_users: Tensor | None = None) -> Tensor:
        """Score all items.

        Args:
            users: Unit vectors h of the language model, shape ``(B, d)``.
            recommender_users: User vectors u of the trained recommender, shape ``(B, D)``; `residual` heads read them.

        Returns:
            Logits of shape ``(B, N)``, float32.
        """
        return self.by_title(users.float()) + self.bias

    def by_title(self, users: Tensor) -> Tensor:
        """Title term of the scores, shape ``(B, N)``."""
        return self.scale * users @ self.titles.T

    def keep_titles(self) -> None:
        """Save the title vectors in checkpoints, since training refreshes them."""
        self.register_buffer("titles", self.titles, persistent=True)
        self.has_trained_buffers = True


class ProjectedHead(ItemHead):
    """Scores by titles through a trained map P: ``s_i = a · scale · cos(P h, v_i) + bias_i``; P starts as identity."""

    def __init__(self, titles: Tensor, bias: Tensor, scale: float) -> None:
        super().__init__(titles, bias, scale)
        self.title_weight = nn.Parameter(torch.ones(1))
        self.projection = nn.Linear(titles.shape[1], titles.shape[1], bias=False)
        nn.init.eye_(self.projection.weight)

    def by_title(self, users: Tensor) -> Tensor:
        """See `ItemHead.by_title`."""
        return self.title_weight * super().by_title(nn.functional.normalize(self.projection(users), dim=1))


class JoinedHead(ItemHead):
    """Scores by titles and by a trained recommender's item vectors.

    ``s_i = a · scale · cos(h, v_i) + <W h, e_i> + c_i + bias_i``, and with ``residual`` also ``b · <u, e_i>``, the
    recommender's own score, so that the language model learns what the recommender misses. a, b, c and W are trained;
    W and c start at zero, a and b at one.

    Args:
        titles: As in `ItemHead`.
        bias: As in `ItemHead`.
        scale: As in `ItemHead`; zero would remove the titles permanently.
        items: The recommender's output item vectors e, shape ``(N, D)``. Not trained.
        residual: Whether the recommender's own score is added.

    Attributes:
        residual_dropout: Probability that a training row is scored without the recommender's own score, so that the
            language model learns to rank on its own: the recommender has been trained on these rows and leaves little
            to learn.
    """

    items: Tensor
    residual_dropout = 0.0

    def __init__(self, titles: Tensor, bias: Tensor, scale: float, items: Tensor, residual: bool) -> None:
        super().__init__(titles, bias, scale)
        self.register_buffer("items", items.float(), persistent=False)
        self.title_weight = nn.Parameter(torch.ones(1))
        self.to_items = nn.Linear(titles.shape[1], items.shape[1], bias=False)
        nn.init.zeros_(self.to_items.weight)
        self.item_bias = nn.Parameter(torch.zeros(len(titles)))
        self.reads_recommender = residual
        self.recommender_weight = nn.Parameter(torch.ones(1)) if residual else None
        self._spread = titles.shape[1] ** 0.5  # h has unit length; linear maps train faster on unit mean square

    def forward(self, users: Tensor, recommender_users: Tensor | None = None) -> Tensor:
        """See `ItemHead.forward`."""
        users = users.float()
        collaborative = self.to_items(self._spread * users)  # (B, D)
        if self.recommender_weight is not None:
            assert recommender_users is not None, "a residual head needs the recommender's user vectors"
            residual = self.recommender_weight * recommender_users.float()
            if self.training and self.residual_dropout > 0:
                residual = residual * (torch.rand(len(residual), 1, device=residual.device) >= self.residual_dropout)
            collaborative = collaborative + residual
        by_items = collaborative @ self.items.T
        return self.title_weight * self.by_title(users) + by_items + self.item_bias + self.bias


def build_head(kind: str, titles: Tensor, bias: Tensor, scale: float, items: Tensor | None) -> ItemHead:
    """Build a head of `HEADS`; ``items``, the recommender's output item vectors, are for joined and residual heads."""
    if kind in ("joined", "residual"):
        assert items is not None, "the settings require a recommender"
        return JoinedHead(titles, bias, scale, items, residual=kind == "residual")
    return (ProjectedHead if kind == "projected" else ItemHead)(titles, bias, scale)
