"""A numeric probe of the language model: whether titles scored side by side have the scores of titles scored alone."""

import inspect
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.title.likelihood import (
    Prefix,
    check_attention,
    check_cache,
    first_log_probs,
    prefill,
    rest_log_probs,
)

__all__ = ["check_side_by_side"]

_PROMPTS = (7, 4)  # tokens of the probe's two prompts; the shorter one is padded on the left
_ANSWERS = (4, 3)  # tokens of its two continuations
_MAX_GAP = 2048  # bounds the memory of the probe; the widest window by row index that models are known to have is 256
_TOLERANCE = {torch.float32: 2e-3}  # of the standard deviation of the logits, per token; rounding is below 1e-5
_ROUGH_TOLERANCE = 0.25  # bfloat16 and quantised weights: rounding is below .05, a wrong prompt is about 1


@torch.no_grad()
def check_side_by_side(llm: nn.Module, tokens: Sequence[int], *, max_tokens: int, longest_row: int) -> None:
    """Score two continuations of two short prompts side by side, and each alone; raise if the scores differ.

    No list of architectures decides, so that unknown ones are covered: alone, a continuation is an ordinary row without
    cache, mask or padding. A model that masks or counts by row index instead of ``position_ids`` differs as soon as
    rows are as long as they are in a run; for that, unused keys are put between prompt and continuations, which cost no
    forward pass.

    Args:
        llm: Causal language model of transformers, in evaluation mode.
        tokens: Tokens of texts, such as titles, for prompts and continuations; at least one.
        max_tokens: Tokens of the longest prompt with its answer, which a sliding window has to cover.
        longest_row: Tokens of the longest row of continuations with its prompt.

    Raises:
        ConfigError: If the scores differ, or the model cannot compute them.
    """
    try:
        check_attention(llm)
        difference = _largest_difference(llm, tokens, max_tokens, longest_row)
        _check_generation(llm)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ConfigError as error:
        raise _refusal(llm, str(error).rstrip(".")) from error
    except Exception as error:  # from a model's own code, of any class
        why = next(iter(str(error).splitlines()), "")
        reason = f"scoring two of them failed with {type(error).__name__}: {why}"
        if "position_ids" not in inspect.signature(llm.forward).parameters:
            reason = "its forward pass takes no `position_ids`"
        raise _refusal(llm, reason) from error
    tolerance = _TOLERANCE.get(_table(llm).weight.dtype, _ROUGH_TOLERANCE)
    if getattr(llm, "is_quantized", False):
        tolerance = _ROUGH_TOLERANCE
    if not difference <= tolerance:
        raise _refusal(
            llm,
            f"log-probabilities side by side differ from those alone by {difference:.2g} standard deviations of the "
            f"logits per token, expected at most {tolerance:g}: its attention does not follow `position_ids` and a "
            "4-D mask",
        )


def _check_generation(llm: nn.Module) -> None:
    """Raise for models, such as multimodal ones, that cannot generate after embeddings: prompts are embedded."""
    prepare = getattr(llm, "prepare_inputs_for_generation", None)
    if prepare is not None and "inputs_embeds" not in inspect.signature(prepare).parameters:
        raise ConfigError("its `generate` accepts no `inputs_embeds`")


def _refusal(llm: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"`teacher.objective=title` scores titles side by side, which models of type "
        f"{getattr(getattr(llm, 'config', None), 'model_type', type(llm).__name__)!r} cannot do here ({why}); use "
        "another decoder, such as `llm=llama2_7b`, or `teacher.objective=item`."
    )


def _largest_difference(llm: nn.Module, tokens: Sequence[int], max_tokens: int, longest_row: int) -> float:
    """Largest difference of a continuation's log-probabilities, over its tokens and standard deviations of logits."""
    device = _table(llm).weight.device
    n_used = sum(_PROMPTS) + len(_PROMPTS) * sum(_ANSWERS)
    ids = [token for _, token in zip(range(n_used), _endless(tokens), strict=False)]
    drawn = iter(ids)
    prompts = [[next(drawn) for _ in range(n)] for n in _PROMPTS]
    answers = [[[next(drawn) for _ in range(n)] for n in _ANSWERS] for _ in prompts]
    alone, deviation = _alone(llm, prompts, answers, device)

    width, longest = max(_PROMPTS), max(_ANSWERS)
    padded = torch.tensor([[tokens[0]] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    continuations = torch.tensor(
        [[each + [tokens[0]] * (longest - len(each)) for each in row] for row in answers], device=device
    )
    lengths = torch.tensor([_ANSWERS] * len(prompts), device=device)
    prefix = prefill(llm, _table(llm)(padded), mask)
    check_cache(prefix.cache, max_tokens)
    gap = max(0, min(_MAX_GAP, longest_row - width - len(_ANSWERS) * longest))
    differences = []
    for n_unused in (0, gap):
        wide, wide_mask = _with_gap(prefix, mask, n_unused)
        scores = first_log_probs(prefix.logits, continuations[:, :, 0])
        scores = scores + rest_log_probs(llm, wide, wide_mask, continuations, lengths)
        differences.append(((scores - alone).abs() / lengths).max())
    return float(torch.stack(differences).max() / deviation)


def _alone(
    llm: nn.Module, prompts: list[list[int]], answers: list[list[list[int]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each answer, shape ``(B, C)``, and the standard deviation of the logits."""
    scores, deviations = [], []
    for prompt, row in zip(prompts, answers, strict=True):
        for answer in row:
            ids = torch.tensor([prompt + answer], device=device)
            logits = llm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # (n, V)
            of_tokens = logits.log_softmax(dim=1).gather(1, ids[0, len(prompt) :].unsqueeze(1))
            scores.append(of_tokens.sum())
            deviations.append(logits.std())
    return torch.stack(scores).view(len(prompts), -1), torch.stack(deviations).mean()


def _endless(tokens: Sequence[int]) -> Any:
    while True:
        yield from tokens


def _table(llm: nn.Module) -> Any:
    return llm.get_input_embeddings()  # type: ignore[operator]


def _with_gap(prefix: Prefix, mask: Tensor, n_unused: int) -> tuple[Prefix, Tensor]:
    """The prompts followed by keys and values that no token attends to, and their mask."""
    if n_unused == 0:
        return prefix, mask
    cache = copy(prefix.cache)
    cache.layers = [copy(layer) for layer in prefix.cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = (nn.functional.pad(each, (0, 0, 0, n_unused)) for each in (layer.keys, layer.values))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = layer.cumulative_length + n_unused
    return prefix._replace(cache=cache), nn.functional.pad(mask, (0, n_unused))
