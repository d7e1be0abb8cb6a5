"""Log-probabilities of given titles as answers to a prompt: the scores of a `title` teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError

__all__ = [
    "MAX_SCORED_ROWS",
    "Hold",
    "Prefix",
    "check_attention",
    "check_cache",
    "first_log_probs",
    "prefill",
    "rest_log_probs",
    "title_log_probs",
]

MAX_SCORED_ROWS = 256  # continuations per forward pass

# Holds these gates for the adapter, one row per row of the forward passes inside; None: no gates.
Hold = Callable[[Tensor | None], AbstractContextManager[Any]]


class Prefix(NamedTuple):
    """Prompts after the forward pass.

    Attributes:
        logits: Of the token that follows each prompt, shape ``(B, V)``.
        cache: Keys and values of the T tokens, a transformers ``DynamicCache`` of B rows.
        n_tokens: Real tokens of each prompt, which is the position of the next one, shape ``(B,)``, int64.
    """

    logits: Tensor
    cache: Any
    n_tokens: Tensor


def prefill(llm: nn.Module, inputs_embeds: Tensor, attention_mask: Tensor) -> Prefix:
    """Run the model on prompts, to score their continuations; gates must be held.

    Args:
        llm: Causal language model of transformers, bare or in a PeftModel.
        inputs_embeds: Shape ``(B, T, d)``.
        attention_mask: Shape ``(B, T)``, padding on the LEFT.

    Returns:
        The prompts' caches and next logits.

    Raises:
        ConfigError: If the shapes do not fit, or a prompt does not end with a real token.
    """
    if attention_mask.shape != inputs_embeds.shape[:2]:
        raise ConfigError(
            f"prompts of shape {tuple(inputs_embeds.shape)} with an attention mask of shape "
            f"{tuple(attention_mask.shape)}; expected (B, T, d) and (B, T)."
        )
    if not bool(attention_mask[:, -1].all()):
        raise ConfigError("a prompt ends with padding, so nothing can follow it; pad prompts on the left.")
    positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    output = llm(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(output.logits[:, -1], output.past_key_values, positions[:, -1] + 1)


@torch.no_grad()
def title_log_probs(
    llm: nn.Module,
    hold: Hold,
    gates: Tensor | None,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    continuations: Tensor,
    lengths: Tensor,
    *,
    mean: bool = False,
    max_rows: int = MAX_SCORED_ROWS,
) -> Tensor:
    """Log-probabilities of C continuations of each prompt, summed over their tokens.

    Each prompt is processed once. Its continuations then run as ONE row, side by side, each attending to the prompt and
    itself (a 4-D attention mask): neither the prompt's keys and values nor its gates are repeated. With 300 prompt
    tokens, repeating them for 20 candidates would take 3 GB per prompt with a Llama 2 of 7B in bf16.

    Args:
        llm: Causal language model of transformers, bare or in a PeftModel, in evaluation mode, with ``eager`` or
            ``sdpa`` attention.
        hold: Holds the gates for the adapter.
        gates: Shape ``(B, E)`` or ``(B, G, E)``, or None without experts.
        inputs_embeds: Prompts, shape ``(B, T, d)``.
        attention_mask: Shape ``(B, T)``, padding on the LEFT.
        continuations: Tokens, end token included, shape ``(B, C, t)``, int64, padded on the right with any token.
        lengths: Tokens of each continuation, shape ``(B, C)``, from 1 to t.
        mean: Divide each sum by its number of tokens.
        max_rows: Continuations per forward pass, at least one per prompt; bounds the memory of their logits.

    Returns:
        Shape ``(B, C)``, float32, in nats, without gradient.

    Raises:
        ConfigError: If shapes, lengths or ``max_rows`` do not fit, or the model cannot run continuations side by side.
    """
    _check_continuations(continuations, lengths, len(inputs_embeds), max_rows)
    check_attention(llm)
    with hold(gates):
        prefix = prefill(llm, inputs_embeds, attention_mask)
        check_cache(prefix.cache, inputs_embeds.shape[1] + continuations.shape[2])
        total = first_log_probs(prefix.logits, continuations[:, :, 0])
        width = max(1, max_rows // len(continuations))
        for start in range(0, continuations.shape[1], width):
            chosen = slice(start, start + width)
            total[:, chosen] += rest_log_probs(
                llm, prefix, attention_mask, continuations[:, chosen], lengths[:, chosen]
            )
    return total / lengths if mean else total


def first_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens ``(B, C)`` under logits ``(B, V)``, in float32."""
    logits = logits.float()
    return logits.gather(1, tokens) - logits.logsumexp(dim=1, keepdim=True)


def rest_log_probs(
    llm: nn.Module, prefix: Prefix, attention_mask: Tensor, continuations: Tensor, lengths: Tensor
) -> Tensor:
    """Sums over all tokens of continuations ``(B, C, t)`` except the first, shape ``(B, C)``."""
    n_rows, n_titles = lengths.shape
    n_read = int(lengths.max()) - 1  # the last token is only predicted
    if n_read == 0:
        return torch.zeros(n_rows, n_titles, device=continuations.device)
    steps = torch.arange(n_read, device=continuations.device)
    output = llm(
        input_ids=continuations[:, :, :n_read].flatten(1),
        attention_mask=_side_by_side(attention_mask, n_titles, n_read, prefix.cache.layers[0].keys.dtype),
        position_ids=(prefix.n_tokens.unsqueeze(1) + steps).repeat(1, n_titles),
        past_key_values=_branch(prefix.cache),
        use_cache=True,
    )
    scored = steps < (lengths - 1).unsqueeze(2)  # (B, C, n_read)
    logits = output.logits.view(n_rows, n_titles, n_read, -1)[scored].float()  # real tokens only, (n, V)
    tokens = continuations[:, :, 1 : n_read + 1][scored]
    log_probs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)
    return torch.zeros(scored.shape, device=scored.device).masked_scatter(scored, log_probs).sum(dim=2)


def _side_by_side(attention_mask: Tensor, n_titles: int, n_read: int, dtype: torch.dtype) -> Tensor:
    """Attention mask of the continuations: each token attends to the prompt and to its own continuation so far.

    Returns:
        Added to attention scores, shape ``(B, 1, C * n, T + C * n)``. Padding attends to itself, so no softmax row is
        empty.
    """
    n_rows, n_new = len(attention_mask), n_titles * n_read
    tokens = torch.arange(n_new, device=attention_mask.device)
    title = tokens // n_read
    among = (title == title.unsqueeze(1)) & (tokens <= tokens.unsqueeze(1))  # (C * n, C * n)
    seen = torch.cat(
        [attention_mask.bool().unsqueeze(1).expand(-1, n_new, -1), among.expand(n_rows, -1, -1)], dim=2
    ).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _branch(cache: Any) -> Any:
    """A cache that grows without changing the original: layers replace their tensors and never write to them.

    (``crop`` would undo the growth too, but not past a sliding window.)
    """
    branch = copy(cache)
    branch.layers = [copy(layer) for layer in cache.layers]
    return branch


def _check_continuations(continuations: Tensor, lengths: Tensor, n_rows: int, max_rows: int) -> None:
    if continuations.ndim != 3 or continuations.shape[:2] != lengths.shape or len(continuations) != n_rows:
        raise ConfigError(
            f"continuations of shape {tuple(continuations.shape)} and lengths of shape {tuple(lengths.shape)} for "
            f"{n_rows} prompts; expected (B, C, t) and (B, C)."
        )
    if lengths.numel() == 0 or not bool(((lengths >= 1) & (lengths <= continuations.shape[2])).all()):
        raise ConfigError(
            f"lengths must be from 1 to {continuations.shape[2]}, the width of the continuations, got "
            f"{lengths.flatten()[:8].tolist()}; count each title's tokens and its end token."
        )
    if max_rows < 1:
        raise ConfigError(f"`max_rows` is {max_rows}, expected at least 1.")


def check_attention(llm: nn.Module) -> None:
    """Raise for attention implementations that silently ignore a 4-D mask."""
    kind = getattr(getattr(llm, "config", None), "_attn_implementation", "eager")
    if kind not in ("eager", "sdpa"):
        raise ConfigError(
            f"continuations run side by side with attention 'eager' or 'sdpa', and this model has {kind!r}; load it "
            "with attn_implementation='sdpa'."
        )


def check_cache(cache: Any, n_tokens: int) -> None:
    """Raise for models whose cache is not the keys and values of every token, ``n_tokens`` of them.

    Raises:
        ConfigError: If a layer of the cache is of another kind, or has a window of fewer tokens.
    """
    if not getattr(cache, "layers", None):
        raise ConfigError(
            f"the model returns {type(cache).__name__} instead of a cache of keys and values; use a model with plain "
            "attention in all layers."
        )
    for layer in cache.layers:
        if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise ConfigError(
                f"this model's cache has layers of type {type(layer).__name__}, where continuations cannot run side by "
                "side; use a model with plain attention in all layers."
            )
        if layer.is_sliding and n_tokens > layer.sliding_window:
            raise ConfigError(
                f"prompt and title take {n_tokens} tokens, but layers of this model attend to {layer.sliding_window}; "
                "shorten the prompt (`llm.prompt.max_tokens`)."
            )
