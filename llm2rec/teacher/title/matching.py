"""Title matching: from generated texts to items, by the candidate named in a text or by the nearest title vector."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2rec.core.errors import ConfigError, DataError, NonFiniteError
from llm2rec.core.statistics import bootstrap_interval

__all__ = ["Grounded", "MatchingRule", "TitleMatches", "ground", "judge"]

MatchingRule = Literal["longest", "released"]


@dataclass(frozen=True)
class TitleMatches:
    """Candidates named in M generated texts.

    Attributes:
        valid: Whether exactly one candidate was named, shape ``(M,)``, bool.
        correct: Whether it was named and is the answer, shape ``(M,)``, bool; a row that is correct is valid.
    """

    valid: NDArray[np.bool_]
    correct: NDArray[np.bool_]

    @property
    def metrics(self) -> dict[str, float]:
        """Rates by name.

        ``hr@1``: correct rows over ALL rows. ``hr@1_valid``: correct rows over the valid ones, which the released
        iLoRA program prints as its hit ratio; it ignores rows on which the model failed, and is 0 if no row is
        valid. ``valid_ratio``: valid rows over all rows.
        """
        n_rows, n_valid, n_correct = len(self.valid), int(self.valid.sum()), int(self.correct.sum())
        return {
            "hr@1": n_correct / n_rows,
            "hr@1_valid": n_correct / n_valid if n_valid else 0.0,
            "valid_ratio": n_valid / n_rows,
        }

    def intervals(self, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals of the rates, rows drawn with replacement.

        Args:
            seed: Seed of the samples.

        Returns:
            Lower and upper end by the names of `metrics`, without ``hr@1_valid`` if no row is valid. Its numerator and
            denominator are drawn from the same rows, since the number of valid rows is random too.
        """
        valid, correct = self.valid.astype(np.float64), self.correct.astype(np.float64)
        ends = {"hr@1": bootstrap_interval(correct, seed=seed), "valid_ratio": bootstrap_interval(valid, seed=seed)}
        if self.valid.any():
            ends["hr@1_valid"] = bootstrap_interval(correct, weights=valid, seed=seed)
        return ends


def judge(
    generated: Sequence[str],
    candidates: Sequence[Sequence[str]],
    answers: Sequence[str],
    rule: MatchingRule = "longest",
) -> TitleMatches:
    """Find the candidate that each generated text names.

    Candidates are matched as substrings, in lower case and stripped. The two rules differ if one candidate's title is
    part of another's ("Heat" and "Heat 2"):

    - ``released``: as in the released program, a row is valid if exactly one element of the candidates occurs in the
      text. The text "Heat 2" names both, so the longer title can never be correct, nor any title listed twice. An
      answer outside its candidates is never correct, and an empty title occurs in every text.
    - ``longest``: an occurrence inside that of a longer candidate does not count, and a title listed twice is one
      title. "Heat 2" names the second film, "Heat, or Heat 2" both. An answer outside its candidates is an error, and
      an empty title never matches.

    Args:
        generated: Texts, M of them.
        candidates: Candidate titles, M lists.
        answers: Correct titles, M of them.
        rule: ``longest`` or ``released``.

    Returns:
        Valid and correct rows.

    Raises:
        ConfigError: If there is no such rule.
        DataError: If the lists are empty or differ in length, or (``longest``) an answer is not among its candidates.
    """
    if rule not in ("longest", "released"):
        raise ConfigError(f"`rule` is {rule!r}, expected 'longest' or 'released'.")
    if not (len(generated) == len(candidates) == len(answers) > 0):
        raise DataError(
            f"{len(generated)} generated texts, {len(candidates)} lists of candidates and {len(answers)} answers; "
            "expected the same number of each, at least one."
        )
    valid, correct = np.zeros(len(answers), np.bool_), np.zeros(len(answers), np.bool_)
    for row, (text, titles, answer) in enumerate(zip(generated, candidates, answers, strict=True)):
        written, folded, right = _fold(text), [_fold(title) for title in titles], _fold(answer)
        if rule == "longest" and right not in folded:
            raise DataError(
                f"row {row}: the answer {answer!r} is not among its {len(titles)} candidates, so it could never be "
                "correct; add it to them."
            )
        occurring = [title for title in folded if title in written]
        named = occurring if rule == "released" else _longest(written, set(occurring) - {""})
        valid[row] = len(named) == 1
        correct[row] = named == [right]
    return TitleMatches(valid, correct)


def _fold(text: str) -> str:
    return text.strip().lower()


def _longest(text: str, occurring: Collection[str]) -> list[str]:
    """Titles that occur outside the occurrences of longer ones."""
    covered: list[tuple[int, int]] = []  # occurrences of longer titles
    named = []
    for title in sorted(occurring, key=len, reverse=True):
        free = [
            (begin, begin + len(title))
            for begin in _starts(text, title)
            if not any(low <= begin and begin + len(title) <= high for low, high in covered)
        ]
        # Anything inside an occurrence that does not count is also inside the longer one around it.
        covered += free
        named += [title] if free else []
    return named


def _starts(text: str, title: str) -> Iterator[int]:
    """Start positions of a title in a text, including overlapping occurrences."""
    begin = text.find(title)
    while begin >= 0:
        yield begin
        begin = text.find(title, begin + 1)


class Grounded(NamedTuple):
    """The items nearest to B vectors, nearest first.

    Attributes:
        items: Item ids, shape ``(B, K)``, int64.
        distances: Their L2 distances, shape ``(B, K)``, float32, rising.
    """

    items: Tensor
    distances: Tensor


@torch.no_grad()
def ground(predictions: Tensor, item_vectors: Tensor, k: int, block_items: int = 65536) -> Grounded:
    """Grounding (BIGRec, arXiv 2308.08434): the items nearest to each vector by L2 distance, ties by lower id.

    Items are processed in blocks, without a ``(B, N)`` matrix. The result does not depend on the block size.

    Args:
        predictions: Vectors of generated texts, shape ``(B, d)``.
        item_vectors: Vectors of the items' titles, shape ``(N, d)``, on any device; blocks are moved to the device
            of the predictions.
        k: Number of items.
        block_items: Items per block.

    Returns:
        Items and distances of shape ``(B, k)``, on the device of the predictions.

    Raises:
        ConfigError: If the shapes do not fit, or ``k`` or ``block_items`` is out of range.
        NonFiniteError: If a vector is not finite.
    """
    _check_grounding(predictions, item_vectors, k, block_items)
    predictions = predictions.float()
    nearest = torch.empty(len(predictions), 0, dtype=torch.int64, device=predictions.device)
    for start in range(0, len(item_vectors), block_items):
        block = item_vectors[start : start + block_items].to(predictions.device, torch.float32)
        _check_finite(block)
        keys = torch.cat([nearest, _keys(predictions, block, start)], dim=1)
        nearest = keys.topk(min(k, keys.shape[1]), largest=False).values
    return Grounded(nearest & 0xFFFFFFFF, (nearest >> 32).int().view(torch.float32))


def _keys(predictions: Tensor, block: Tensor, start: int) -> Tensor:
    """Distance and item id packed into one integer, shape ``(B, n)``, so that one top-k orders by both.

    Non-negative floats sort like the integers of the same bits. Distances are computed from differences: by a matrix
    product, three times as fast on a CPU, equal item vectors could get different distances, and a vector equal to an
    item's would be at a distance of about 1e-3.
    """
    distances = torch.cdist(predictions, block, compute_mode="donot_use_mm_for_euclid_dist")
    ids = torch.arange(start, start + len(block), device=block.device)
    return (distances.view(torch.int32).long() << 32) | ids


def _check_grounding(predictions: Tensor, item_vectors: Tensor, k: int, block_items: int) -> None:
    if predictions.ndim != 2 or item_vectors.ndim != 2 or predictions.shape[1] != item_vectors.shape[1]:
        raise ConfigError(
            f"predictions of shape {tuple(predictions.shape)} and item vectors of shape {tuple(item_vectors.shape)}; "
            "expected (B, d) and (N, d) of one width, from the same model."
        )
    if not 1 <= k <= len(item_vectors) or block_items < 1:
        raise ConfigError(
            f"`k` is {k} and `block_items` is {block_items}; expected 1 <= k <= {len(item_vectors)} (the items) and "
            "block_items >= 1."
        )
    _check_finite(predictions)


def _check_finite(vectors: Tensor) -> None:
    if not bool(vectors.isfinite().all()):
        raise NonFiniteError("a predicted or an item vector is not finite; check the model's weights.")
