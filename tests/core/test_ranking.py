"""Ranks and top-k items in tiles equal those of the whole score matrix."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2rec.core import ranking
from llm2rec.core.errors import NonFiniteError
from llm2rec.core.metrics import target_ranks
from llm2rec.core.ranking import Catalogue, pair_scores, ranks_in_blocks, top_k_in_blocks

TILES = [1, 500, 4096, None]  # scores held at once; no tile is narrower than a chunk of 64 items


def all_scores(users, vectors):
    """The definition, as a matrix."""
    return (users.double() @ vectors.double().T).float()


def without(scores, seen):
    masked = scores.clone()
    if seen is not None:
        masked[seen] = -torch.inf
    return masked


def plain_ranks(users, vectors, targets, seen=None):
    scores = all_scores(users, vectors)
    masked = without(scores, seen).scatter(1, targets[:, None], scores.gather(1, targets[:, None]))
    return target_ranks(masked, targets)


def plain_top_k(users, vectors, k, seen=None):
    values, items = [], []
    for scores in without(all_scores(users, vectors), seen).tolist():
        best = sorted((item for item, score in enumerate(scores) if score > -torch.inf), key=lambda i: (-scores[i], i))
        values.append(([scores[item] for item in best] + [-torch.inf] * k)[:k])
        items.append((best + [-1] * k)[:k])
    return torch.tensor(values), torch.tensor(items)


def some_pairs(n_rows, n_items, n_pairs, generator):
    rows = torch.randint(n_rows, (n_pairs,), generator=generator)
    return rows, torch.randint(n_items, (n_pairs,), generator=generator)


def case(n_rows, n_items, width, seed, kind="random"):
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(n_rows, width, generator=generator)
    vectors = torch.randn(n_items, width, generator=generator)
    if kind == "tied":  # few different vectors: most scores have equals, in all tiles
        vectors = vectors[torch.randint(max(1, n_items // 9), (n_items,), generator=generator)]
    elif kind == "near":  # scores that differ in their last bits, or less
        vectors = vectors[:1] * (1 + torch.randint(-3, 4, (n_items, width), generator=generator) * 2.0**-23)
    elif kind == "whole":  # exact in any format and order
        users, vectors = (each.mul(2).round() for each in (users, vectors))
    elif kind == "outlier":
        vectors[n_items // 2] *= 1e4
    targets = torch.randint(n_items, (n_rows,), generator=generator)
    return users, vectors, targets, some_pairs(n_rows, n_items, 3 * n_rows, generator)


KINDS = ["random", "tied", "near", "whole", "outlier"]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_rows", "n_items"), [(7, 300), (3, 64), (1, 1000), (40, 5)])
def test_ranks_equal_those_of_the_whole_matrix(kind, n_rows, n_items, tile):
    users, vectors, targets, seen = case(n_rows, n_items, 16, 1, kind)
    catalogue = Catalogue(vectors)
    for each in (None, seen, (torch.arange(n_rows), targets)):
        ranks = ranks_in_blocks(users, catalogue, targets, each, tile_scores=tile)
        assert torch.equal(ranks, plain_ranks(users, vectors, targets, each))
        assert ranks.dtype == torch.int64


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n_rows", "n_items", "k"), [(7, 300, 1), (7, 300, 20), (3, 64, 64), (1, 1000, 10), (40, 5, 5)]
)
def test_top_k_equals_that_of_the_whole_matrix(kind, n_rows, n_items, k, tile):
    users, vectors, _, seen = case(n_rows, n_items, 16, 2, kind)
    for each in (None, seen):
        values, items = top_k_in_blocks(users, Catalogue(vectors), k, each, tile_scores=tile)
        expected_values, expected_items = plain_top_k(users, vectors, k, each)
        assert torch.equal(items, expected_items)
        assert torch.equal(values, expected_values)


def test_integer_scores_equal_the_float32_matrix():
    """If float32 is exact, results equal the matrix product bit for bit."""
    users, vectors, targets, _ = case(50, 700, 24, 3, "whole")
    assert torch.equal(ranks_in_blocks(users, Catalogue(vectors), targets), target_ranks(users @ vectors.T, targets))


quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(
    st.integers(1, 9), st.integers(1, 400), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from(KINDS), st.data()
)
def test_results_do_not_depend_on_tiles(n_rows, n_items, width, seed, kind, data):
    users, vectors, targets, seen = case(n_rows, n_items, width, seed, kind)
    catalogue, k = Catalogue(vectors), data.draw(st.integers(1, n_items))
    one, other = data.draw(st.lists(st.integers(1, 5000), min_size=2, max_size=2))
    ranks = ranks_in_blocks(users, catalogue, targets, seen, tile_scores=one)
    assert torch.equal(ranks, ranks_in_blocks(users, catalogue, targets, seen, tile_scores=other))
    values, items = top_k_in_blocks(users, catalogue, k, seen, tile_scores=one)
    again = top_k_in_blocks(users, catalogue, k, seen, tile_scores=other)
    assert torch.equal(values, again[0])
    assert torch.equal(items, again[1])
    for row in range(n_rows):  # nor does it matter who else is in the batch
        mine = (seen[0] == row).nonzero().squeeze(1)
        alone = torch.zeros_like(mine), seen[1][mine]
        found = ranks_in_blocks(users[row : row + 1], catalogue, targets[row : row + 1], alone)
        assert torch.equal(found, ranks[row : row + 1])
        assert torch.equal(top_k_in_blocks(users[row : row + 1], catalogue, k, alone)[1][0], items[row])


def test_matrix_products_alone_miscount_near_ties(monkeypatch):
    """Without exact recomputation near-ties are miscounted, so the test above can fail."""
    users, vectors, targets, _ = case(20, 2000, 64, 4, "near")
    expected = plain_ranks(users, vectors, targets)
    assert torch.equal(ranks_in_blocks(users, Catalogue(vectors), targets), expected)
    monkeypatch.setattr(ranking, "_ROUNDOFF", {"highest": 0.0})
    assert not torch.equal(ranks_in_blocks(users, Catalogue(vectors), targets), expected)


def test_equal_scores_give_the_last_rank_and_the_first_items():
    users, vectors = torch.zeros(2, 8), torch.randn(500, 8)
    targets = torch.tensor([0, 499])
    assert ranks_in_blocks(users, Catalogue(vectors), targets).tolist() == [499, 499]
    seen = torch.tensor([0, 0, 1]), torch.tensor([3, 3, 0])
    assert ranks_in_blocks(users, Catalogue(vectors), targets, seen).tolist() == [498, 498]
    values, items = top_k_in_blocks(users, Catalogue(vectors), 3, seen)
    assert items.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert values.abs().max() == 0


def test_rows_with_fewer_than_k_items():
    seen = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 3, 1])
    values, items = top_k_in_blocks(torch.ones(2, 1), Catalogue(torch.tensor([[3.0], [1], [2], [4]])), 3, seen)
    assert items.tolist() == [[1, -1, -1], [3, 0, 2]]
    assert values.tolist() == [[1, -torch.inf, -torch.inf], [4, 3, 2]]


def test_empty_batch():
    catalogue = Catalogue(torch.randn(9, 4))
    assert ranks_in_blocks(torch.zeros(0, 4), catalogue, torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert top_k_in_blocks(torch.zeros(0, 4), catalogue, 2)[1].shape == (0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_non_finite_vectors_raise(value):
    bad = torch.randn(5, 4)
    bad[3, 2] = value
    with pytest.raises(NonFiniteError, match="the vector of item 3 has length"):
        Catalogue(bad)
    catalogue = Catalogue(torch.randn(9, 4))
    with pytest.raises(NonFiniteError, match="the vector of user 3 has length"):
        ranks_in_blocks(bad, catalogue, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(NonFiniteError, match="the vector of user 3 has length"):
        top_k_in_blocks(bad, catalogue, 2)


def test_memory_is_bounded_by_one_tile(monkeypatch):
    """Even if every score is recomputed."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(ranking, "_PAIRS", 256)
    n_items, width, tile = 20000, 2, 4096
    catalogue = Catalogue(torch.zeros(n_items, width))
    with Watch():
        ranks_in_blocks(torch.ones(8, width), catalogue, torch.zeros(8, dtype=torch.int64), tile_scores=tile)
        top_k_in_blocks(torch.ones(8, width), catalogue, 5, tile_scores=tile)
    assert n_items > largest >= tile


def test_pair_scores_do_not_depend_on_the_batch():
    users, vectors, _, pairs = case(9, 100, 37, 5)
    together = pair_scores(users, Catalogue(vectors), pairs)
    alone = [pair_scores(users, Catalogue(vectors), (row[None], item[None])) for row, item in zip(*pairs, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, all_scores(users, vectors)[pairs])
