"""Standardisation and principal components of item vectors."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["principal_components", "standardised"]


def standardised(vectors: Tensor) -> Tensor:
    """Centre vectors ``(N, d)`` over the catalogue and scale each to unit length (a zero vector stays zero).

    Centring removes the large common direction of text vectors of one domain, which does not distinguish items.
    """
    centred = vectors.float() - vectors.float().mean(dim=0)
    return functional.normalize(centred, dim=1)


def principal_components(vectors: Tensor, width: int, *, whiten: bool = False) -> Tensor:
    """Principal components (PCA scores) of vectors.

    The sign of each component is chosen so that its largest coordinate is positive, which makes results reproducible.

    Args:
        vectors: Shape ``(N, d)``.
        width: Number of components.
        whiten: Whether to scale each component to a variance of 1.

    Returns:
        Shape ``(N, c)``, float32, largest variance first. c is ``width``, or less if the rank of the vectors is lower.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    n_items, input_width = centred.shape
    if input_width <= n_items:  # decompose the smaller of the two Gram matrices
        variances, directions = torch.linalg.eigh(centred.T @ centred)
        coordinates = centred @ directions
    else:
        variances, left = torch.linalg.eigh(centred @ centred.T)
        coordinates = left * variances.clamp(min=0).sqrt()
    kept = variances > variances.max() * max(n_items, input_width) * torch.finfo(torch.float64).eps
    coordinates = coordinates[:, kept].flip(1)[:, :width]
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))  # (1, c)
    coordinates = coordinates * largest.sign()
    return (coordinates / coordinates.square().mean(dim=0).sqrt() if whiten else coordinates).float()
