"""Item vectors of any source on one scale."""

from torch import Tensor
from torch.nn import functional

__all__ = ["standardised"]


def standardised(vectors: Tensor) -> Tensor:
    """Centre vectors ``(N, d)`` over the catalogue and give each unit length (a zero vector stays zero).

    Texts of one domain share a large common direction, which says nothing about the item.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    return functional.normalize(centred, dim=1)
