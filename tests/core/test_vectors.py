"""Preparation of vectors against NumPy."""

import numpy as np
import pytest
import torch

from llm2rec.core.errors import CheckpointError
from llm2rec.core.vectors import Preparation, standardised


def vectors(n_items, width, seed=0):
    """Correlated vectors around a large common direction, as those of texts."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(n_items, width)) @ generator.normal(size=(width, width))
    return torch.from_numpy(mixed + 7 * generator.normal(size=width)).float()


def plain_preparation(given, new, whitening, components):
    """By the singular values, row by row."""
    given, new = given.double().numpy(), new.double().numpy()
    mean = given.mean(axis=0)
    _, singular, directions = np.linalg.svd(given - mean, full_matrices=False)
    if whitening == 0 and components is None:  # directions that the catalogue does not have stay, too
        directions, singular = np.eye(given.shape[1]), np.ones(given.shape[1])
    kept = singular > singular[0] * 1e-6
    variances, directions = (singular[kept] ** 2 / len(given))[:components], directions[kept][:components]
    rows = np.array([[np.dot(row - mean, each) for each in directions] for row in new])
    rows *= variances ** (-whitening / 2)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("n_items", "width"), [(40, 6), (7, 12)])  # more items than numbers each, and fewer
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("components", [None, 3, 100])
def test_prepared_vectors_equal_numpy(n_items, width, whitening, components):
    given, new = vectors(n_items, width), vectors(5, width, seed=1)
    new = given[:3].mean(dim=0) + 0.1 * (new - new.mean(dim=0))  # near the catalogue
    preparation = Preparation.fit(given, whitening=whitening, components=components)
    for rows in (given, new):
        ours, expected = preparation(rows).double().numpy(), plain_preparation(given, rows, whitening, components)
        assert ours.dtype == np.float64
        # Signs and, without components, axes are free: inner products are not.
        np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=2e-4)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)
    rank = min(width, n_items - 1)
    plain = whitening == 0 and components is None
    assert preparation.width == preparation(new).shape[1] == (width if plain else min(rank, components or rank))


def test_whitening_evens_out_the_variances():
    given = vectors(200, 6)

    def spread(whitening):
        preparation = Preparation.fit(given, whitening=whitening, components=6)
        variances = ((given - preparation.mean) @ preparation.components).var(dim=0, correction=0)
        return (variances[0] / variances[-1]).item()

    assert spread(1.0) == pytest.approx(1, rel=1e-2)
    assert spread(0.5) == pytest.approx(spread(0.0) ** 0.5, rel=1e-2)
    assert spread(0.0) > 10


def test_without_whitening_it_is_the_standardisation_bit_for_bit():
    given = vectors(30, 5)
    centred = given - given.mean(dim=0)
    assert torch.equal(Preparation.fit(given)(given), torch.nn.functional.normalize(centred, dim=1))
    assert torch.equal(standardised(given), Preparation.fit(given)(given))


@pytest.mark.parametrize("options", [{}, {"whitening": 0.5}, {"components": 2}])
def test_saved_tensors_restore_it(options):
    given = vectors(30, 5)
    preparation = Preparation.fit(given, **options)
    again = Preparation.of(preparation.tensors() | {"other": torch.ones(2)})
    assert torch.equal(again(given), preparation(given))
    assert (again.width, set(again.tensors())) == (preparation.width, set(preparation.tensors()))


def test_equal_vectors_become_zero():
    same = torch.ones(4, 3)
    assert Preparation.fit(same)(same).tolist() == [[0] * 3] * 4
    assert Preparation.fit(same, whitening=0.5)(same).shape == (4, 0)


@pytest.mark.parametrize(
    "tensors", [{}, {"mean": torch.ones(2, 2)}, {"mean": torch.ones(2), "components": torch.ones(3, 2)}]
)
def test_other_tensors_are_refused(tensors):
    with pytest.raises(CheckpointError, match="are no preparation of vectors; copy the whole folder"):
        Preparation.of(tensors)
