"""Ranks and top-k items over a catalogue of any size, one tile of scores at a time.

A score is the inner product of a user vector and an item vector: the float64 sum of the exact products, rounded to
float32. A float32 matrix product is much faster, but its last bits depend on the shapes of the matrices. Tiles are
therefore scored by matrix products, and scores within the rounding error of a threshold are recomputed exactly. Results
depend neither on the tile size nor on the other rows of a batch, and items with equal vectors have equal scores.

The rounding error of a product is at most ``D u |user| |item|``, for a sum of D terms in any order and unit roundoff u
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Only one tile of scores is in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2rec.core.errors import NonFiniteError

__all__ = ["Catalogue", "Pairs", "pair_scores", "ranks_in_blocks", "top_k_in_blocks"]

Pairs = tuple[Tensor, Tensor]
"""Row numbers and item ids, both of shape ``(P,)`` and int64; may contain duplicates."""

# Scores per tile: 2 MiB on a CPU, where smaller and larger tiles are slower; on a GPU enough to keep it busy.
_TILE_SCORES = {"cpu": 2**19, "cuda": 2**26}
_ROWS = 64  # rows per top-k search: wide tiles have fewer contenders per score than narrow ones
_WIDEST = 2**22  # columns per tile; their counts must be exact in float32
_CHUNK = 64  # items per chunk, of which only the largest score is compared first
_PAIRS = 2**15  # pairs scored exactly at once, which bounds memory if all scores are equal
# Unit roundoff of products under each `torch.set_float32_matmul_precision`.
_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
_LONGEST = 1e18  # length of vectors; products must not approach the largest float32


class Catalogue:
    """Vectors of all items with their norms, reusable for many rankings.

    Args:
        vectors: Shape ``(N, D)``, on the device to compute on; not copied if they are float32 and contiguous.

    Raises:
        NonFiniteError: If a vector holds NaN or infinity.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors.detach().float().contiguous()
        self.norms = _norms(self.vectors, "item")  # (N,)

    def __len__(self) -> int:
        return len(self.vectors)


def pair_scores(users: Tensor, catalogue: Catalogue, pairs: Pairs) -> Tensor:
    """Score pairs of rows and items exactly; this is the module's definition of a score.

    Args:
        users: User vectors of shape ``(B, D)``, float32.
        catalogue: The items.
        pairs: P pairs of row and item.

    Returns:
        Scores of shape ``(P,)``, float32.
    """
    (rows, items), n_pairs = pairs, len(pairs[0])
    scores = users.new_empty(n_pairs)
    for start in range(0, n_pairs, _PAIRS):
        part = slice(start, start + _PAIRS)
        user, item = users.index_select(0, rows[part]), catalogue.vectors.index_select(0, items[part])
        scores[part] = (user.double() * item.double()).sum(dim=1)  # products of 24 by 24 bits are exact
    return scores


def ranks_in_blocks(
    users: Tensor,
    catalogue: Catalogue,
    targets: Tensor,
    seen: Pairs | None = None,
    *,
    tile_scores: int | None = None,
) -> Tensor:
    """Rank each row's target among all items; equivalent to `core.metrics.target_ranks` without a score matrix.

    Args:
        users: User vectors of shape ``(B, D)``.
        catalogue: The items.
        targets: Target item ids, shape ``(B,)``, int64.
        seen: Items to exclude from the rows' rankings; the target is never excluded.
        tile_scores: Scores per tile, by default depending on the device; does not affect results.

    Returns:
        0-based ranks of shape ``(B,)``, int64: the number of other items that score at least as high.

    Raises:
        NonFiniteError: If a user's vector holds NaN or infinity.
    """
    users, norms = users.float(), _norms(users.float(), "user")
    rows = torch.arange(len(users), device=users.device)
    target_scores = pair_scores(users, catalogue, (rows, targets)).unsqueeze(1)  # (B, 1)
    left_out = (rows, targets) if seen is None else (torch.cat([rows, seen[0]]), torch.cat([targets, seen[1]]))
    ranks, flags = torch.zeros_like(targets), users.new_empty(0)
    for tile in _tiles(users, norms, catalogue, left_out, tile_scores):
        low, high = target_scores - tile.doubt(target_scores), target_scores + tile.doubt(target_scores)
        flags = flags if len(flags) else torch.empty_like(tile.scores)
        # Summing comparisons as floats is several times as fast as summing booleans.
        surely = torch.gt(tile.scores, high, out=flags).sum(dim=1)
        perhaps = torch.ge(tile.scores, low, out=flags).sum(dim=1)
        ranks += surely.long()
        near = (perhaps != surely).nonzero().squeeze(1)
        if len(near):
            scores = tile.scores[near]
            row, column = ((scores >= low[near]) & (scores <= high[near])).nonzero(as_tuple=True)
            row = near[row]
            wins = pair_scores(users, catalogue, (row, tile.start + column)) >= target_scores[row, 0]
            ranks.index_add_(0, row, wins.long())
    return ranks


def top_k_in_blocks(
    users: Tensor, catalogue: Catalogue, k: int, seen: Pairs | None = None, *, tile_scores: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find each row's best items; of equal scores the lower id comes first.

    Args:
        users: User vectors of shape ``(B, D)``.
        catalogue: The items.
        k: Number of items, at least 1.
        seen: Items to exclude from the rows' rankings.
        tile_scores: Scores per tile, by default depending on the device; does not affect results.

    Returns:
        Scores, float32, and item ids, int64, of shape ``(B, k)``, best first. If fewer than k items remain for a row,
        its last scores are ``-inf`` and their ids -1.

    Raises:
        NonFiniteError: If a user's vector holds NaN or infinity.
    """
    users, norms = users.float(), _norms(users.float(), "user")
    values = users.new_full((len(users), k), -torch.inf)
    items = torch.full((len(users), k), -1, device=users.device)
    groups = -(-len(users) // _ROWS)
    for number, out in enumerate(_split_pairs(seen, None if seen is None else seen[0] // _ROWS, groups)):
        part = slice(number * _ROWS, (number + 1) * _ROWS)
        out = None if out is None else (out[0] - part.start, out[1])
        for tile in _tiles(users[part], norms[part], catalogue, out, tile_scores):
            row, column = _contenders(tile, values[part, -1:], k)
            if len(row):
                pairs = row, tile.start + column
                _merge(values[part], items[part], pairs, pair_scores(users[part], catalogue, pairs))
    return values, items


def _norms(vectors: Tensor, what: str) -> Tensor:
    """Norms of vectors ``(M, D)``, shape ``(M,)``; checks that scores cannot overflow."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    fit = norms < _LONGEST  # NaN is not
    if not bool(fit.all()):
        row = int(fit.int().argmin())
        raise NonFiniteError(
            f"the vector of {what} {row} has length {float(norms[row])}, expected a finite length below {_LONGEST:g}; "
            "check the model before ranking."
        )
    return norms


@dataclass(frozen=True)
class _Tile:
    """Scores of all rows for consecutive items, up to rounding.

    Attributes:
        scores: Shape ``(B, C)``, C a multiple of `_CHUNK`; ``-inf`` for excluded items and after the last item.
        start: Id of the first item.
        rounding: Bound of the rounding error of each row's scores, shape ``(B, 1)``.
    """

    scores: Tensor
    start: int
    rounding: Tensor

    def doubt(self, threshold: Tensor) -> Tensor:
        """Distance from a threshold ``(B, 1)`` within which scores must be recomputed exactly."""
        return self.rounding + threshold.abs() * 2.0**-22  # plus the rounding of threshold ± doubt


def _tiles(
    users: Tensor, norms: Tensor, catalogue: Catalogue, left_out: Pairs | None, tile_scores: int | None
) -> Iterator[_Tile]:
    """Score the catalogue tile by tile, in one reused buffer."""
    n_rows, n_items = len(users), len(catalogue)
    n_columns = _tile_width(n_rows, n_items, tile_scores or _TILE_SCORES[users.device.type])
    roundoff = 1.01 * (users.shape[1] + 8) * _ROUNDOFF[torch.get_float32_matmul_precision()]
    scores = users.new_empty(n_rows, n_columns)
    starts = range(0, n_items, n_columns)
    number = None if left_out is None else left_out[1] // n_columns
    for start, out in zip(starts, _split_pairs(left_out, number, len(starts)), strict=True):
        vectors = catalogue.vectors[start : start + n_columns]
        longest = catalogue.norms[start : start + n_columns].max()
        torch.mm(users, vectors.T, out=scores[:, : len(vectors)])
        scores[:, len(vectors) :] = -torch.inf
        if out is not None:
            scores[out[0], out[1] - start] = -torch.inf
        # The last term bounds the error of subnormal products.
        yield _Tile(scores, start, (norms * longest * roundoff + 1e-37).unsqueeze(1))


def _tile_width(n_rows: int, n_items: int, tile_scores: int) -> int:
    """Number of columns per tile, a multiple of `_CHUNK` that makes tiles about equally wide."""
    widest = min(_WIDEST, max(1, tile_scores // max(1, n_rows) // _CHUNK) * _CHUNK)
    n_tiles = max(1, -(-n_items // widest))
    return max(1, -(-n_items // (n_tiles * _CHUNK))) * _CHUNK


def _split_pairs(pairs: Pairs | None, part: Tensor | None, n_parts: int) -> Sequence[Pairs | None]:
    """Split pairs by their part numbers, shape ``(P,)``."""
    if pairs is None or part is None or n_parts <= 1:
        return [pairs] * n_parts
    order = (part.short() if n_parts < 2**15 else part).argsort()  # sorting int16 is several times as fast
    counts = torch.bincount(part, minlength=n_parts).tolist()
    rows, items = (each.index_select(0, order).split(counts) for each in pairs)
    return list(zip(rows, items, strict=True))


def _contenders(tile: _Tile, kth: Tensor, k: int) -> Pairs:
    """Rows and columns of a tile that may be among the best k, sorted by row, then by column.

    Args:
        tile: Scores.
        kth: The k-th best scores so far, shape ``(B, 1)``; ``-inf`` while there are fewer.
        k: Number of items.
    """
    chunks = tile.scores.unflatten(1, (-1, _CHUNK))  # (B, C / _CHUNK, _CHUNK)
    largest = chunks.amax(dim=2)
    # The k-th largest chunk maximum is a valid bound, but too low if there are few chunks.
    reached = largest if largest.shape[1] >= 4 * k else tile.scores
    if reached.shape[1] >= k and bool((kth == -torch.inf).any()):
        here = reached.topk(k).values[:, -1:]
        kth = torch.maximum(kth, here - tile.doubt(here))
    low = kth - tile.doubt(kth)
    row, chunk = (largest >= low).nonzero(as_tuple=True)
    scores = chunks[row, chunk]
    index, column = ((scores >= low[row]) & (scores > -torch.inf)).nonzero(as_tuple=True)
    return row[index], chunk[index] * _CHUNK + column


def _merge(values: Tensor, items: Tensor, pairs: Pairs, scores: Tensor) -> None:
    """Merge contenders into the best items; they are sorted by row and item, with higher ids than earlier tiles."""
    (row, item), k = pairs, values.shape[1]
    changed, place, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[place]
    shape = len(changed), int(counts.max())
    new_values = values.new_full(shape, -torch.inf).index_put_((place, within), scores)
    new_items = items.new_full(shape, -1).index_put_((place, within), item)
    # Ids are ascending, so a stable sort breaks ties by id.
    best, order = torch.cat([values[changed], new_values], dim=1).sort(dim=1, descending=True, stable=True)
    values[changed] = best[:, :k]
    items[changed] = torch.cat([items[changed], new_items], dim=1).gather(1, order[:, :k])
