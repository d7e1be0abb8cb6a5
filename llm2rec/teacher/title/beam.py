"""Beam search over the catalogue's titles, constrained by a prefix tree: full ranking from a `title` teacher."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError, DataError, NonFiniteError
from llm2rec.teacher.title.likelihood import Hold, prefill

__all__ = ["Found", "TitleTrie", "constrained_beam_search"]

_NEVER = float("-inf")  # score of an empty beam or item slot


class Found(NamedTuple):
    """The K most probable items found, best first.

    Attributes:
        items: Item ids, shape ``(B, K)``, int64.
        log_probs: Log-probabilities of their titles and end tokens, shape ``(B, K)``, float32, in nats.
    """

    items: Tensor
    log_probs: Tensor


class _Beams(NamedTuple):
    """Unfinished titles, R over all rows of the batch, rows in order."""

    rows: Tensor  # (R,), row of the batch
    nodes: Tensor  # (R,), nodes of the trie
    scores: Tensor  # (R,), float32
    parents: Tensor  # (R,), index of the beam each continues, one token before


@torch.no_grad()
def constrained_beam_search(
    llm: nn.Module,
    hold: Hold,
    gates: Tensor | None,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    trie: TitleTrie,
    *,
    beams: int,
    k: int,
    excluded: Tensor | None = None,
) -> Found:
    """Decode titles of the catalogue token by token, and keep the most probable ones.

    Log-probabilities are taken over the whole vocabulary, not renormalised over the tokens of the trie and not divided
    by the length, so they equal `title_log_probs` of the same titles.

    ``beams`` beams run besides the finished items, and each leads to a returnable item, no two to the same one. With
    ``beams >= k`` the search therefore always returns k items. They are the k best of all if nothing is pruned, which
    ``beams >= N`` guarantees. A row is done when no beam can beat its k-th item (log-probabilities only fall), and its
    beams leave the batch.

    Args:
        llm: Causal language model of transformers, bare or in a PeftModel, in evaluation mode.
        hold: Holds the gates for the adapter; called once per token.
        gates: Shape ``(B, E)`` or ``(B, G, E)``, or None without experts.
        inputs_embeds: Prompts, shape ``(B, T, d)``.
        attention_mask: Shape ``(B, T)``, padding on the LEFT.
        trie: The catalogue's titles.
        beams: Beams per row; up to ``B * beams`` rows of T tokens are cached.
        k: Items to return, at most ``beams``.
        excluded: Items to exclude, such as those of the history, shape ``(B, L)``, padded with N.

    Returns:
        Items and their log-probabilities, shape ``(B, k)``.

    Raises:
        ConfigError: If ``k`` or ``beams`` is out of range, the shapes do not fit, or the trie has tokens outside the
            model's vocabulary.
        NonFiniteError: If a log-probability is not finite.
    """
    device, n_rows = inputs_embeds.device, len(inputs_embeds)
    trie = trie.to(device)
    places = _excluded_places(trie, excluded, n_rows, beams, k)
    with hold(gates):
        logits, cache, n_tokens = prefill(llm, inputs_embeds, attention_mask)
    _check_vocabulary(trie, logits.shape[-1])
    running, found = _nothing_written(n_rows, k, device)
    running, found = _advance(trie, running, logits, found, places, beams)
    while len(running.rows):
        _follow(cache, running.parents, len(logits))
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(n_rows, 1)], dim=1)
        logits = _read(llm, hold, gates, trie, running, cache, attention_mask, n_tokens)
        n_tokens = n_tokens + 1
        running, found = _advance(trie, running, logits, found, places, beams)
    if not bool(found.log_probs.isfinite().all()):
        raise NonFiniteError("the log-probability of a title is not finite; check the model's weights.")
    return found


def _nothing_written(n_rows: int, k: int, device: torch.device) -> tuple[_Beams, Found]:
    """One beam per row, at the root, and k empty slots for found items."""
    rows = torch.arange(n_rows, device=device)
    found = Found(rows.new_full((n_rows, k), -1), torch.full((n_rows, k), _NEVER, device=device))
    return _Beams(rows, torch.zeros_like(rows), torch.zeros(n_rows, device=device), rows), found


def _follow(cache: Any, parents: Tensor, n_before: int) -> None:
    """Reorder the cache by the beams, unless none was pruned or split."""
    if len(parents) != n_before or not bool((parents.diff() == 1).all()):
        cache.reorder_cache(parents)


def _read(
    llm: nn.Module,
    hold: Hold,
    gates: Tensor | None,
    trie: TitleTrie,
    running: _Beams,
    cache: Any,
    mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """Run the model on the last token of every beam; next-token logits of shape ``(R, V)``."""
    with hold(None if gates is None else gates[running.rows]):
        output = llm(
            input_ids=trie.token[running.nodes].unsqueeze(1),
            attention_mask=mask[running.rows],
            position_ids=positions[running.rows].unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        )
    logits: Tensor = output.logits[:, -1]
    return logits


def _advance(
    trie: TitleTrie, running: _Beams, logits: Tensor, found: Found, places: Tensor | None, beams: int
) -> tuple[_Beams, Found]:
    """Expand every beam, add finished items to the found ones, and keep the best unfinished beams.

    Args:
        trie: The catalogue.
        running: R beams.
        logits: Their next-token logits, shape ``(R, V)``.
        found: Items found so far, k per row.
        places: See `_excluded_places`.
        beams: Beams to keep per row.

    Returns:
        The beams one token later, and the items found so far.
    """
    children = trie.children(running.nodes)  # (R, W)
    logits = logits.float()
    scores = running.scores.unsqueeze(1) + logits.gather(1, trie.token[children].clamp(min=0))
    scores = scores - logits.logsumexp(dim=1, keepdim=True)
    scores = scores.masked_fill((children == 0) | _is_barred(trie, children, running.rows, places), _NEVER)
    # Beams of a row side by side: (B, K * W), K the most beams that a row has.
    n_rows, width = len(found.items), children.shape[1]
    slots = _slots(running.rows, n_rows)
    n_slots = int(slots.max()) + 1
    spread = scores.new_full((n_rows, n_slots, width), _NEVER)
    spread[running.rows, slots] = scores
    nodes, parents = children.new_zeros(spread.shape), children.new_zeros(n_rows, n_slots)
    nodes[running.rows, slots] = children
    parents[running.rows, slots] = torch.arange(len(slots), device=slots.device)
    total, nodes = spread.flatten(1), nodes.flatten(1)
    items = trie.item[nodes]
    found = _merge(found, items, total.masked_fill(items < 0, _NEVER))
    # Prune what cannot beat the k-th item; with fewer than k items, nothing is pruned.
    inner = total.masked_fill((items >= 0) | (total <= found.log_probs[:, -1:]), _NEVER)
    kept = inner.topk(min(beams, inner.shape[1]), dim=1).indices.sort(dim=1).values  # in the order of their parents
    alive = inner.gather(1, kept) > _NEVER
    rows = alive.nonzero()[:, 0]
    chosen = kept[alive]
    return _Beams(rows, nodes[rows, chosen], inner[rows, chosen], parents[rows, chosen // width]), found


def _merge(found: Found, items: Tensor, scores: Tensor) -> Found:
    """The k best of the found items and new ones ``(B, n)``."""
    scores, best = torch.cat([found.log_probs, scores], dim=1).topk(found.items.shape[1], dim=1)
    return Found(torch.cat([found.items, items], dim=1).gather(1, best), scores)


def _slots(rows: Tensor, n_rows: int) -> Tensor:
    """Number the beams of each row from 0, from ``rows`` in order, shape ``(R,)``."""
    counts = torch.bincount(rows, minlength=n_rows)
    return torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]


def _is_barred(trie: TitleTrie, nodes: Tensor, rows: Tensor, places: Tensor | None) -> Tensor:
    """Whether all items at or below nodes ``(R, W)`` are excluded for their rows."""
    if places is None:
        return torch.zeros_like(nodes, dtype=torch.bool)
    first = trie.first_item[nodes]
    own = places[rows]  # (R, L)
    n_excluded = torch.searchsorted(own, first + trie.n_below[nodes]) - torch.searchsorted(own, first)
    return n_excluded == trie.n_below[nodes]


def _excluded_places(trie: TitleTrie, excluded: Tensor | None, n_rows: int, beams: int, k: int) -> Tensor | None:
    """Positions of the excluded items among the sorted titles.

    Returns:
        Shape ``(B, L)``, int64, ascending, each once, padded with N; None if nothing is excluded.

    Raises:
        ConfigError: If ``k``, ``beams`` or ``excluded`` does not fit, or fewer than k items remain for a row.
    """
    n_items = trie.n_items
    if not 1 <= k <= min(beams, n_items):
        raise ConfigError(f"`k` is {k} with beams={beams} and {n_items} items; expected 1 <= k <= min(beams, items).")
    if excluded is None:
        return None
    if excluded.ndim != 2 or len(excluded) != n_rows or excluded.min() < 0 or excluded.max() > n_items:
        raise ConfigError(
            f"`excluded` must have shape ({n_rows}, L) and hold item ids from 0, padded with {n_items}, got shape "
            f"{tuple(excluded.shape)}."
        )
    places = trie.place[excluded.long()].sort(dim=1).values
    repeated = torch.nn.functional.pad(places[:, 1:] == places[:, :-1], (1, 0))
    places = places.masked_fill(repeated, n_items).sort(dim=1).values
    n_left = n_items - (places < n_items).sum(dim=1)
    if bool((n_left < k).any()):
        row = int((n_left < k).int().argmax())
        left = int(n_left[row])
        raise ConfigError(f"`k` is {k} but only {left} items remain for row {row} after exclusions; use k <= {left}.")
    return places


def _check_vocabulary(trie: TitleTrie, n_tokens: int) -> None:
    """Raise if titles have tokens outside the model's vocabulary."""
    if n_tokens < trie.n_tokens:
        raise ConfigError(
            f"the titles have token {trie.n_tokens - 1}, but the model's vocabulary has {n_tokens} tokens; build the "
            "trie with the model's own tokenizer."
        )


class TitleTrie:
    """Prefix tree of N titles, with one leaf per title.

    Nodes are numbered level by level from the root, 0, and within a level by parent, then token. The children of a
    node are therefore contiguous, and so are the items below a node once they are sorted by their tokens.

    Args:
        titles: Token ids of each title, row = item id, without end token.
        end_id: Token appended to each title, so that no title is a prefix of another.

    Attributes:
        token: Token leading to each node, shape ``(M,)``, int64; -1 for the root.
        first_child: First child of each node, shape ``(M,)``, int64.
        n_children: Number of its children, shape ``(M,)``, int64; 0 for a leaf.
        item: Item that ends at each node, shape ``(M,)``, int64; -1 inside the tree.
        first_item: Position of its first item in the sorted order, shape ``(M,)``, int64.
        n_below: Number of items at or below it, shape ``(M,)``, int64.
        place: Each item's position in the sorted order, shape ``(N + 1,)``, int64; N (padding) is at N.
        n_tokens: One more than the largest token id.

    Raises:
        DataError: If there are no titles, two have the same tokens, or one has the end token or a negative id.
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
            raise DataError("there are no titles for the trie; expected one per item of the catalogue.")
        lengths = np.array([len(title) for title in titles], np.int64) + 1
        tokens = np.concatenate([part for title in titles for part in (title, [end_id])]).astype(np.int64)
        starts = lengths.cumsum() - lengths
        _check_tokens(tokens, starts, lengths, end_id)
        self.n_items, self.n_tokens = len(titles), int(tokens.max()) + 1
        levels = _levels(tokens, starts, lengths, self.n_tokens)
        for name, values in _arrays(levels, len(titles)).items():
            setattr(self, name, torch.from_numpy(values))

    def to(self, device: torch.device) -> TitleTrie:
        """Copy to a device."""
        moved = copy(self)
        moved.__dict__.update(
            {name: value.to(device) for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        )
        return moved

    def children(self, nodes: Tensor) -> Tensor:
        """Child nodes.

        Args:
            nodes: Shape ``(R,)``.

        Returns:
            Children in the order of their tokens, padded on the right with 0, the root; shape ``(R, W)``, W the largest
            number of children.
        """
        counts = self.n_children[nodes].unsqueeze(1)
        slots = torch.arange(int(counts.max()), device=nodes.device)
        return torch.where(slots < counts, self.first_child[nodes].unsqueeze(1) + slots, 0)


_Level = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _levels(
    tokens: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64], n_tokens: int
) -> list[_Level]:
    """Levels of depth 1, 2, ..., with equal prefixes merged.

    Returns:
        Per depth: the nodes' parents, tokens and item counts; and the items that end there, with their nodes.

    Raises:
        DataError: If two titles are equal.
    """
    items, node = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)  # unfinished titles and their nodes
    levels, n_nodes, depth = [], 1, 0
    while len(items):
        # (parent, token) as one number: the tokens of all titles times the vocabulary fit into int64.
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
    """Attributes of `TitleTrie`, from its levels."""
    parent = np.concatenate([[-1], *(level[0] for level in levels)])
    n_below = np.concatenate([[n_items], *(level[2] for level in levels)])
    n_nodes = len(parent)
    n_children = np.bincount(parent[1:], minlength=n_nodes)
    first_child = 1 + n_children.cumsum() - n_children
    item = np.full(n_nodes, -1, np.int64)
    first_item = np.zeros(n_nodes, np.int64)
    # Items before a node on its level, minus those before its first sibling.
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
    """Raise for tokens that cannot be inside a title."""
    wrong = (tokens < 0) | (tokens == end_id)
    wrong[starts + lengths - 1] = end_id < 0
    if wrong.any():
        position = int(wrong.argmax())
        item = int(np.searchsorted(starts, position, side="right")) - 1
        raise DataError(
            f"the title of item {item} has token {tokens[position]}, and the end token is {end_id}; expected ids from "
            "0 without the end token, which the trie appends. Tokenise titles without special tokens."
        )


def _check_distinct(items: NDArray[np.int64], leaves: NDArray[np.int64]) -> None:
    """Raise if two titles end at one node."""
    order = np.argsort(leaves, kind="stable")
    same = np.flatnonzero(leaves[order][1:] == leaves[order][:-1])
    if len(same):
        first, second = items[order][same[0] : same[0] + 2]
        raise DataError(
            f"items {first} and {second} have the same title tokens; make the titles unique, for example by adding the "
            "item id to titles that occur twice."
        )
