"""Beam search over the titles of a catalogue: full ranking from a `title` teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError, NonFiniteError
from llm2rec.teacher.title.likelihood import Hold, prefill
from llm2rec.teacher.title.trie import TitleTrie

__all__ = ["Found", "constrained_beam_search"]

_NEVER = float("-inf")  # score of a place that holds no beam, or no item


class Found(NamedTuple):
    """The K most probable items that the search met, best first.

    Attributes:
        items: Item ids, shape ``(B, K)``, int64.
        log_probs: Of their titles and end tokens, shape ``(B, K)``, float32, in nats.
    """

    items: Tensor
    log_probs: Tensor


class _Beams(NamedTuple):
    """Titles that are being written, R over all rows of the batch, rows in order."""

    rows: Tensor  # (R,), row of the batch
    nodes: Tensor  # (R,), where in the trie
    scores: Tensor  # (R,), float32
    parents: Tensor  # (R,), the beam each continues, as numbered one token before


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
    """Write titles token by token, only such as the catalogue has, and keep the most probable ones.

    Log-probabilities are the model's own, over its whole vocabulary and not renormalised over the tokens that the
    trie allows, so they equal `title_log_probs` of the same titles. Neither are they divided by the length.

    ``beams`` beams run besides the items that are finished, and every beam leads to an item that may be returned, no
    two to the same one. With ``beams >= k`` the search therefore always returns k items: what is cut off leaves
    ``beams`` running. They are the k best of all where ``beams`` is large enough that nothing is cut off, as it is
    with ``beams`` of at least N. A row is done when no beam could still beat its k-th item (log-probabilities only
    fall), and its beams leave the batch.

    Args:
        llm: Causal language model of transformers, bare or in a PeftModel, in evaluation mode.
        hold: Makes the adapter use gates; called once per token.
        gates: Shape ``(B, E)`` or ``(B, G, E)``, or None where there are none.
        inputs_embeds: Prompts, shape ``(B, T, d)``.
        attention_mask: Shape ``(B, T)``, padding on the LEFT.
        trie: The catalogue's titles.
        beams: Beams that run per row; up to ``B * beams`` rows of T tokens are cached.
        k: Items to return, at most ``beams``.
        excluded: Items not to return, such as those of the history, shape ``(B, L)``, padded with N.

    Returns:
        Items and their log-probabilities, shape ``(B, k)``.

    Raises:
        ConfigError: If ``k`` or ``beams`` is out of range, the shapes do not fit, or the trie holds tokens that the
            model lacks.
        NonFiniteError: If an item came out with a log-probability that is not finite.
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
        raise NonFiniteError("a title came out with a log-probability that is not finite; check the model's weights.")
    return found


def _nothing_written(n_rows: int, k: int, device: torch.device) -> tuple[_Beams, Found]:
    """One beam a row, at the root, and k empty places for what will be found."""
    rows = torch.arange(n_rows, device=device)
    found = Found(rows.new_full((n_rows, k), -1), torch.full((n_rows, k), _NEVER, device=device))
    return _Beams(rows, torch.zeros_like(rows), torch.zeros(n_rows, device=device), rows), found


def _follow(cache: Any, parents: Tensor, n_before: int) -> None:
    """Let the rows of the cache follow the beams; where none was cut off or split there is nothing to move."""
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
    """Let the model read the last token of every beam; next logits of shape ``(R, V)``."""
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
    """Give every beam its children, put those that are items among the found, and keep the best of the others.

    Args:
        trie: The catalogue.
        running: R beams.
        logits: Of what follows them, shape ``(R, V)``.
        found: What was found so far, k per row.
        places: See `_excluded_places`.
        beams: Beams to keep per row.

    Returns:
        The beams one token later, and what is found now.
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
    # What cannot beat the k-th item any more is given up; while there are fewer than k, nothing is.
    inner = total.masked_fill((items >= 0) | (total <= found.log_probs[:, -1:]), _NEVER)
    kept = inner.topk(min(beams, inner.shape[1]), dim=1).indices.sort(dim=1).values  # in the order of their parents
    alive = inner.gather(1, kept) > _NEVER
    rows = alive.nonzero()[:, 0]
    chosen = kept[alive]
    return _Beams(rows, nodes[rows, chosen], inner[rows, chosen], parents[rows, chosen // width]), found


def _merge(found: Found, items: Tensor, scores: Tensor) -> Found:
    """The k best of what was found and of more items ``(B, n)``."""
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
    """Where the excluded items are among the sorted titles; refuse what leaves fewer than k items.

    Returns:
        Shape ``(B, L)``, int64, rising, each once, padded with N; None where nothing is excluded.

    Raises:
        ConfigError: If ``k``, ``beams`` or ``excluded`` does not fit.
    """
    n_items = trie.n_items
    if not 1 <= k <= min(beams, n_items):
        raise ConfigError(
            f"`k` is {k} with `beams` {beams} and {n_items} items; expected 1 <= k <= beams and k <= items; raise "
            "`beams` or lower `k`."
        )
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
        raise ConfigError(f"`k` is {k}, and what is excluded leaves row {row} {int(n_left[row])} items; lower `k`.")
    return places


def _check_vocabulary(trie: TitleTrie, n_tokens: int) -> None:
    """Refuse titles in tokens that the model does not know."""
    if n_tokens < trie.n_tokens:
        raise ConfigError(
            f"the titles hold token {trie.n_tokens - 1}, and the model knows {n_tokens} tokens; build the trie with "
            "the model's own tokenizer."
        )
