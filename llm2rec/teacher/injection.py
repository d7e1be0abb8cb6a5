"""Item vectors of a trained recommender, projected into a language model's input (LLaRA, arXiv 2312.02445; iLoRA)."""

import math

from torch import Tensor, nn

__all__ = ["ItemProjector", "embedded"]


class ItemProjector(nn.Module):
    """Two layers from a recommender's width to the language model's.

    Input and output are scaled by constants: the item vectors to unit mean square, the output to the root mean square
    of the model's token embeddings, so that injected vectors and words have the same magnitude.

    Args:
        items: Item vectors, shape ``(N, D)``. Neither trained nor saved with the weights.
        width: Width d of the language model.
        output_rms: Root mean square of its token embeddings.
    """

    items: Tensor

    def __init__(self, items: Tensor, width: int, output_rms: float) -> None:
        super().__init__()
        self.register_buffer("items", items.float() / items.float().square().mean().sqrt(), persistent=False)
        self.inner, self.outer = nn.Linear(items.shape[1], width), nn.Linear(width, width)
        for layer, gain in ((self.inner, math.sqrt(2)), (self.outer, 1.0)):  # GELU keeps about half of the square
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        self.output_rms = output_rms

    def forward(self, item_ids: Tensor) -> Tensor:
        """Projected vectors of items ``(M,)``, shape ``(M, d)``."""
        hidden = nn.functional.gelu(self.inner(self.items[item_ids]))
        projected: Tensor = self.output_rms * self.outer(hidden)
        return projected


def embedded(
    table: nn.Module, projector: ItemProjector, input_ids: Tensor, item_ids: Tensor, padding_id: int
) -> Tensor:
    """Input embeddings of hybrid prompts.

    Args:
        table: The language model's token embeddings.
        projector: Computes the injected vectors.
        input_ids: Shape ``(B, T)``; ids at positions of injected vectors are not looked up.
        item_ids: Item injected at each position, shape ``(B, T)``, N for none.
        padding_id: Any id in the table.

    Returns:
        Shape ``(B, T, d)``, in the table's dtype.
    """
    injected = item_ids < len(projector.items)
    words: Tensor = table(input_ids.masked_fill(injected, padding_id))
    return words.index_put(tuple(injected.nonzero(as_tuple=True)), projector(item_ids[injected]).to(words.dtype))
