"""Item vectors of any source on one scale."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["principal_components", "standardised"]


def standardised(vectors: Tensor) -> Tensor:
    """Centre vectors ``(N, d)`` over the catalogue and give each unit length (a zero vector stays zero).

    Texts of one domain share a large common direction, which says nothing about the item.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    return functional.normalize(centred, dim=1)


def principal_components(vectors: Tensor, width: int, *, whiten: bool = False) -> Tensor:
    """Describe vectors by their coordinates along the directions in which they vary most.

    The same vectors give the same coordinates wherever they are computed with the same library: of the two signs of a
    direction the one is taken that makes its largest coordinate positive.

    Args:
        vectors: Shape ``(N, d)``.
        width: Coordinates wanted.
        whiten: Whether each coordinate is scaled to a variance of 1.

    Returns:
        Shape ``(N, c)``, float32, largest variance first. c is ``width``, or less where the vectors vary in fewer
        directions.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    n_items, given = centred.shape
    if given <= n_items:  # of two matrices with the same eigenvalues, the smaller
        variances, directions = torch.linalg.eigh(centred.T @ centred)
        coordinates = centred @ directions
    else:
        variances, left = torch.linalg.eigh(centred @ centred.T)
        coordinates = left * variances.clamp(min=0).sqrt()
    kept = variances > variances.max() * max(n_items, given) * torch.finfo(torch.float64).eps
    coordinates = coordinates[:, kept].flip(1)[:, :width]
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))  # (1, c)
    coordinates = coordinates * largest.sign()
    return (coordinates / coordinates.square().mean(dim=0).sqrt() if whiten else coordinates).float()
