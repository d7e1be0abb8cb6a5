"""Search for the top-k items of user vectors: exact, or approximate and faster with an index."""

from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import replaced_file
from llm2rec.core.logging import Progress
from llm2rec.core.ranking import Catalogue, Pairs, pair_scores, top_k_in_blocks

__all__ = ["ExactSearch", "HnswSearch", "ItemSearch", "SearchKind"]

SearchKind = Literal["exact", "hnsw"]
_ITEMS_PER_PART = 2**14  # added to an index at once


class ItemSearch(Protocol):
    """Item search of a `Recommender`."""

    def top_k(self, users: Tensor, k: int, seen: Pairs | None) -> tuple[Tensor, Tensor]:
        """Scores and item ids, ``(B, k)``, best first; see `core.ranking.top_k_in_blocks`."""
        ...


class ExactSearch:
    """Scores every item.

    Args:
        catalogue: The items.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def top_k(self, users: Tensor, k: int, seen: Pairs | None) -> tuple[Tensor, Tensor]:
        """See `core.ranking.top_k_in_blocks`."""
        return top_k_in_blocks(users, self._catalogue, k, seen)


class HnswSearch:
    """Approximate search in a graph of neighbouring items (HNSW, arXiv 1603.09320), by Faiss.

    Found items are scored exactly, with the same scores as in an exact search. The recall depends on the vectors;
    `Recommender.recall` measures it.

    Args:
        catalogue: The items.
        index: A Faiss index over the same vectors, in the same order, by inner product.
        ef_search: Size of the candidate list of a search; larger has a higher recall and takes longer.

    Raises:
        CheckpointError: If the index holds other vectors.
    """

    def __init__(self, catalogue: Catalogue, index: Any, ef_search: int = 128) -> None:
        vectors = catalogue.vectors.cpu()
        size = index.ntotal, index.d
        if size != vectors.shape or not torch.equal(torch.from_numpy(index.reconstruct_n(0, size[0])), vectors):
            raise CheckpointError(
                f"the index holds {size[0]} vectors of width {size[1]} that are not those of this model's "
                f"{len(catalogue)} items; delete the file to rebuild it."
            )
        self._catalogue, self._index, self._ef_search = catalogue, index, ef_search

    @classmethod
    def build(cls, catalogue: Catalogue, links: int = 32, ef_construction: int = 100) -> "HnswSearch":
        """Build the graph, which takes minutes for a million items.

        Args:
            catalogue: The items.
            links: Neighbours of each item in the graph.
            ef_construction: Size of the candidate list while the graph is built.
        """
        faiss = _faiss()
        index = faiss.IndexHNSWFlat(catalogue.vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = ef_construction
        with Progress("build index", len(catalogue), "item") as progress:
            for part in catalogue.vectors.cpu().split(_ITEMS_PER_PART):
                index.add(part.numpy())
                progress.advance(len(part))
        return cls(catalogue, index)

    @classmethod
    def load_or_build(cls, catalogue: Catalogue, file: Path | None) -> "HnswSearch":
        """Read the index from a file; if the file does not exist, build the index and write it.

        Raises:
            CheckpointError: If the file cannot be read, or holds the items of another model.
        """
        if file is None or not file.exists():
            search = cls.build(catalogue)
            if file is not None:
                with replaced_file(file) as aside:
                    _faiss().write_index(search._index, str(aside))
            return search
        try:
            index = _faiss().read_index(str(file))
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} is not an index that Faiss can read; delete the file to rebuild it."
            ) from error
        return cls(catalogue, index)

    def with_items(self, catalogue: Catalogue) -> "HnswSearch":
        """A search that also finds the items that ``catalogue`` has after those of this one; the graph grows."""
        index = _faiss().clone_index(self._index)
        index.add(catalogue.vectors[index.ntotal :].cpu().numpy())
        return HnswSearch(catalogue, index, self._ef_search)

    def top_k(self, users: Tensor, k: int, seen: Pairs | None) -> tuple[Tensor, Tensor]:
        """As `ExactSearch.top_k`, among the items that are found."""
        n_rows, n_items = len(users), len(self._catalogue)
        n_seen = 0 if seen is None or not len(seen[0]) else int(torch.bincount(seen[0]).max())
        n_found = min(n_items, k + n_seen)  # so that k are left
        faiss, efs = _faiss(), max(self._ef_search, n_found)
        _, found = self._index.search(
            users.float().cpu().numpy(), n_found, params=faiss.SearchParametersHNSW(efSearch=efs)
        )
        items = torch.from_numpy(found).to(users.device).sort(dim=1).values  # (B, n_found); -1 for none
        rows = torch.arange(n_rows, device=users.device).repeat_interleave(n_found)
        scores = pair_scores(users.float(), self._catalogue, (rows, items.flatten().clamp(min=0))).view_as(items)
        gone = items < 0
        if seen is not None:
            gone |= torch.isin(rows * n_items + items.flatten(), seen[0] * n_items + seen[1]).view_as(items)
        # Of equal scores the lower id first: ids ascend, and the sort is stable.
        values, order = scores.masked_fill(gone, -torch.inf).sort(dim=1, descending=True, stable=True)
        best = items.masked_fill(gone, -1).gather(1, order)
        missing = max(0, k - n_found)
        return (
            torch.nn.functional.pad(values[:, :k], (0, missing), value=-torch.inf),
            torch.nn.functional.pad(best[:, :k], (0, missing), value=-1),
        )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "an index needs Faiss, which is not installed: `pip install 'llm2rec[serve]'`, or `search=exact`."
        ) from error
    return faiss
