"""Preparation of item vectors (centring, soft whitening, unit length) and principal components."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llm2rec.core.errors import CheckpointError

__all__ = ["Preparation", "principal_components", "standardised"]

_BLOCK_ROWS = 65536


@dataclass(frozen=True)
class Preparation:
    """Centres vectors, optionally whitens their principal components softly, and scales each to unit length.

    It is fitted on a catalogue and prepares vectors of later items in the same way: a vector x becomes
    ``(x - mean) @ components``, or ``x - mean`` without components, divided by its length (a zero vector stays zero).
    Centring removes the large common direction of text vectors of one domain, which does not distinguish items.
    Whitening makes the directions of small variance count as much as those of large variance: the leading directions
    of text vectors of one domain are shared by most items too.

    Attributes:
        mean: Mean over the catalogue, shape ``(d,)``, float32.
        components: Principal directions, each times the variance along it to the power ``-whitening / 2``, largest
            variance first, shape ``(d, c)``, float32; None keeps the axes of the vectors.
    """

    mean: Tensor
    components: Tensor | None = None

    @classmethod
    def fit(cls, vectors: Tensor, *, whitening: float = 0.0, components: int | None = None) -> "Preparation":
        """Fit on the vectors of a catalogue.

        Args:
            vectors: Shape ``(N, d)``.
            whitening: Share of the whitening, 0 to 1: at 0 components keep their variances, at 1 all have variance 1.
            components: Number of principal components to keep, at most their rank; None for all.
        """
        mean = vectors.float().mean(dim=0)
        if whitening == 0 and components is None:  # a rotation would change no distance
            return cls(mean)
        variances, directions = _directions(vectors)
        scaled = directions * _signs(directions) * variances.pow(-whitening / 2)
        return cls(mean, scaled[:, :components].float())

    def __call__(self, vectors: Tensor) -> Tensor:
        """Prepare vectors ``(M, d)``, of this catalogue or of other items; returns ``(M, c)``, float32."""
        centred = vectors.float() - self.mean
        return functional.normalize(centred if self.components is None else centred @ self.components, dim=1)

    @property
    def width(self) -> int:
        """Width of prepared vectors, c."""
        return len(self.mean) if self.components is None else self.components.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The fitted tensors by name, to save them."""
        return {"mean": self.mean} | ({} if self.components is None else {"components": self.components})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Preparation":
        """Restore the result of `tensors`; other names are ignored.

        Raises:
            CheckpointError: If the tensors are not those of a preparation.
        """
        mean, components = tensors.get("mean"), tensors.get("components")
        if mean is None or mean.ndim != 1 or (components is not None and components.shape[:-1] != mean.shape):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise CheckpointError(f"the tensors {shapes} are no preparation of vectors; copy the whole folder again.")
        return cls(mean, components)


def standardised(vectors: Tensor) -> Tensor:
    """Centre vectors ``(N, d)`` over the catalogue and scale each to unit length; a `Preparation` without whitening."""
    return Preparation.fit(vectors)(vectors)


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
        squares, directions = torch.linalg.eigh(centred.T @ centred)
        coordinates = centred @ directions
    else:
        squares, left = torch.linalg.eigh(centred @ centred.T)
        coordinates = left * squares.clamp(min=0).sqrt()
    coordinates = coordinates[:, _kept(squares, n_items, input_width)].flip(1)[:, :width]
    coordinates = coordinates * _signs(coordinates)
    return (coordinates / coordinates.square().mean(dim=0).sqrt() if whiten else coordinates).float()


def _directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Variances ``(c,)`` and orthonormal directions ``(d, c)`` of the principal components, largest variance first.

    In float64; c is the rank of the centred vectors. Reads the vectors block by block: a catalogue may be large.
    """
    n_items, width = vectors.shape
    blocks = [vectors[start : start + _BLOCK_ROWS] for start in range(0, n_items, _BLOCK_ROWS)]
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / n_items
    if width <= n_items:
        gram = sum(((block.double() - mean).T @ (block.double() - mean) for block in blocks), mean.new_zeros(()))
        squares, directions = torch.linalg.eigh(gram)
        kept = _kept(squares, n_items, width)
        directions = directions[:, kept]
    else:  # few items: the other Gram matrix is smaller
        centred = vectors.double() - mean
        squares, left = torch.linalg.eigh(centred @ centred.T)
        kept = _kept(squares, n_items, width)
        directions = centred.T @ (left[:, kept] / squares[kept].sqrt())
    return squares[kept].flip(0) / n_items, directions.flip(1)


def _kept(squares: Tensor, n_items: int, width: int) -> Tensor:
    """Which eigenvalues of a Gram matrix are not zero up to rounding."""
    return squares > squares.max() * max(n_items, width) * torch.finfo(torch.float64).eps


def _signs(columns: Tensor) -> Tensor:
    """Sign of the largest number of each column, shape ``(1, c)``."""
    return columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)).sign()
