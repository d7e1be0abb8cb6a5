"""The catalogue's titles as a prefix tree of tokens, which a beam search walks so that it writes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import DataError

__all__ = ["TitleTrie"]


class TitleTrie:
    """Prefix tree of N titles, with one leaf per title.

    Nodes are numbered level by level from the root, 0, and within a level by parent, then token. The children of a
    node are therefore neighbours, and two numbers per node say which they are. The items below a node are neighbours
    too, once they are sorted by their tokens.

    Args:
        titles: Token ids of each title, row = item id. The end token is appended here.
        end_id: Token that ends a title; without it a title could not be told from a longer one that begins like it.

    Attributes:
        token: Token that leads to each node, shape ``(M,)``, int64; -1 for the root.
        first_child: First child of each node, shape ``(M,)``, int64.
        n_children: Number of its children, shape ``(M,)``, int64; 0 for a leaf.
        item: Item that ends at each node, shape ``(M,)``, int64; -1 inside the tree.
        first_item: Place of its first item in the sorted order, shape ``(M,)``, int64.
        n_below: Number of items at or below it, shape ``(M,)``, int64.
        place: Each item's place in the sorted order, shape ``(N + 1,)``, int64; N, the padding of histories, is at N.
        n_tokens: One more than the largest token id.

    Raises:
        DataError: If there are no titles, two items have the same tokens, or a title holds the end token or a negative
            one.
    """

    token: Tensor
    first_child: Tensor
    n_children: Tensor
    item: Tensor
    first_item: Tensor
    n_below: Tensor
    place: Tensor

    def __init__(self, titles: Sequence[NDArray[np.integer]], end_id: int) -> None:
        if len(titles) == 0:
            raise DataError("there are no titles to build a trie of; expected one per item of the catalogue.")
        lengths = np.array([len(title) for title in titles], np.int64) + 1
        tokens = np.concatenate([part for title in titles for part in (title, [end_id])]).astype(np.int64)
        starts = lengths.cumsum() - lengths
        _check_tokens(tokens, starts, lengths, end_id)
        self.n_items, self.n_tokens = len(titles), int(tokens.max()) + 1
        levels = _levels(tokens, starts, lengths, self.n_tokens)
        for name, values in _arrays(levels, len(titles)).items():
            setattr(self, name, torch.from_numpy(values))

    def to(self, device: torch.device) -> TitleTrie:
        """The same tree on a device."""
        moved = copy(self)
        moved.__dict__.update(
            {name: value.to(device) for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        )
        return moved

    def children(self, nodes: Tensor) -> Tensor:
        """Nodes that may follow.

        Args:
            nodes: Shape ``(R,)``.

        Returns:
            Children in the order of their tokens, padded on the right with 0, which is nobody's child; shape
            ``(R, W)`` for W the largest number of them.
        """
        counts = self.n_children[nodes].unsqueeze(1)
        slots = torch.arange(int(counts.max()), device=nodes.device)
        return torch.where(slots < counts, self.first_child[nodes].unsqueeze(1) + slots, 0)


_Level = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _levels(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], n_tokens: int
) -> list[_Level]:
    """Tokens of depth 1, 2, ... merged where the titles are the same so far.

    Returns:
        Per depth: the nodes' parents, tokens and numbers of items; and the items that end there, with their nodes.

    Raises:
        DataError: If two titles are the same to the end.
    """
    items, node = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)  # titles not ended yet, and where they are
    levels, n_nodes, depth = [], 1, 0
    while len(items):
        # (parent, token) as one number: as many nodes as tokens in all the titles, times a vocabulary, fit easily.
        keys, found, counts = np.unique(
            node * n_tokens + tokens[starts[items] + depth], return_inverse=True, return_counts=True
        )
        node = n_nodes + found
        ends = lengths[items] == depth + 1
        _check_distinct(items[ends], node[ends])
        levels.append((keys // n_tokens, keys % n_tokens, counts, items[ends], node[ends]))
        items, node = items[~ends], node[~ends]
        n_nodes, depth = n_nodes + len(keys), depth + 1
    return levels


def _arrays(levels: Sequence[_Level], n_items: int) -> dict[str, NDArray[np.int64]]:
    """The attributes of `TitleTrie`, from its levels."""
    parent = np.concatenate([[-1], *(level[0] for level in levels)])
    n_below = np.concatenate([[n_items], *(level[2] for level in levels)])
    n_nodes = len(parent)
    n_children = np.bincount(parent[1:], minlength=n_nodes)
    first_child = 1 + n_children.cumsum() - n_children
    item = np.full(n_nodes, -1, np.int64)
    first_item = np.zeros(n_nodes, np.int64)
    # Items in front of a node on its level, less those in front of its eldest sibling.
    before = n_below.cumsum() - n_below
    begin = 1
    for parents, _, _, ended, leaves in levels:
        here = slice(begin, begin + len(parents))
        first_item[here] = first_item[parents] + before[here] - before[first_child[parents]]
        item[leaves] = ended
        begin += len(parents)
    place = np.full(n_items + 1, n_items, np.int64)
    leaves = np.flatnonzero(item >= 0)
    place[item[leaves]] = first_item[leaves]
    return {
        "token": np.concatenate([[-1], *(level[1] for level in levels)]),
        "first_child": first_child,
        "n_children": n_children,
        "item": item,
        "first_item": first_item,
        "n_below": n_below,
        "place": place,
    }


def _check_tokens(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], end_id: int
) -> None:
    """Refuse tokens that cannot be inside a title."""
    wrong = (tokens < 0) | (tokens == end_id)
    wrong[starts + lengths - 1] = end_id < 0
    if wrong.any():
        position = int(wrong.argmax())
        item = int(np.searchsorted(starts, position, side="right")) - 1
        raise DataError(
            f"the title of item {item} holds token {tokens[position]}, where the end token is {end_id}; expected "
            "token ids from 0 without the end token, which the trie appends; tokenise titles without special tokens."
        )


def _check_distinct(items: NDArray[np.int64], leaves: NDArray[np.int64]) -> None:
    """Refuse two titles that end at one node."""
    order = np.argsort(leaves, kind="stable")
    same = np.flatnonzero(leaves[order][1:] == leaves[order][:-1])
    if len(same):
        first, second = items[order][same[0] : same[0] + 2]
        raise DataError(
            f"items {first} and {second} have titles of the same tokens, so that nothing written could tell them "
            "apart; make the titles unique, for example by adding the item id to those that occur twice."
        )
