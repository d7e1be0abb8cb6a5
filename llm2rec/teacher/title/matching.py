"""Judges the titles that a language model wrote: HR@1 of a `title` teacher that generates freely."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.core.statistics import bootstrap_interval

__all__ = ["HitRule", "TitleHits", "judge"]

HitRule = Literal["longest", "released"]


@dataclass(frozen=True)
class TitleHits:
    """What was made of M generated texts.

    Attributes:
        valid: Whether exactly one candidate was named, shape ``(M,)``, bool.
        correct: Whether it was named and is the answer, shape ``(M,)``, bool; a row that is correct is valid.
    """

    valid: NDArray[np.bool_]
    correct: NDArray[np.bool_]

    @property
    def metrics(self) -> dict[str, float]:
        """The rates.

        ``hr@1``: correct rows over ALL rows. ``hr@1_valid``: correct rows over the valid ones, which is what the
        released iLoRA program prints as its hit ratio; it leaves out the rows on which the model failed. It is 0 where
        no row is valid. ``valid_ratio``: valid rows over all rows.
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
            seed: Of the samples.

        Returns:
            Lower and upper end by the names of `metrics`, but for ``hr@1_valid`` where no row is valid. That one draws
            its numerator and denominator from the same rows, for the number of valid rows is random too.
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
    rule: HitRule = "longest",
) -> TitleHits:
    """Find out which candidate each generated text names.

    A candidate is looked for as a substring, in lower case and without white space at its ends. The two rules differ
    where one candidate's title is part of another's ("Heat" and "Heat 2"):

    - ``released``: as in the released program, a row is valid when exactly one element of the candidates occurs in the
      text. The text "Heat 2" then names both, so that the longer title can never be hit, nor any title that is listed
      twice. An answer that is not among its candidates is missed, and an empty title occurs in every text.
    - ``longest``: an occurrence that lies inside that of a longer candidate does not count, and a title listed twice
      is one title. "Heat 2" names the second film, "Heat, or Heat 2" both. An answer that is not among its candidates
      is an error, and an empty title is never found.

    Args:
        generated: Texts, M of them.
        candidates: Titles to choose from, M lists.
        answers: The right titles, M of them.
        rule: ``longest`` or ``released``.

    Returns:
        What was valid, and what correct.

    Raises:
        ConfigError: If there is no such rule.
        DataError: If there are no rows, not as many of each, or (``longest``) an answer is not among its candidates.
    """
    if rule not in ("longest", "released"):
        raise ConfigError(f"`rule` is {rule!r}, expected 'longest' or 'released'; name one of them.")
    if not (len(generated) == len(candidates) == len(answers) > 0):
        raise DataError(
            f"{len(generated)} generated texts, {len(candidates)} lists of candidates and {len(answers)} answers; "
            "expected as many of each, at least one; give a row of each per example."
        )
    valid, correct = np.zeros(len(answers), np.bool_), np.zeros(len(answers), np.bool_)
    for row, (text, titles, answer) in enumerate(zip(generated, candidates, answers, strict=True)):
        written, folded, right = _fold(text), [_fold(title) for title in titles], _fold(answer)
        if rule == "longest" and right not in folded:
            raise DataError(
                f"row {row}: the answer {answer!r} is not among its {len(titles)} candidates, so it could never be "
                "hit; put it among them."
            )
        occurring = [title for title in folded if title in written]
        named = occurring if rule == "released" else _longest(written, set(occurring) - {""})
        valid[row] = len(named) == 1
        correct[row] = named == [right]
    return TitleHits(valid, correct)


def _fold(text: str) -> str:
    return text.strip().lower()


def _longest(text: str, occurring: Collection[str]) -> list[str]:
    """Those of the titles that occur outside the occurrences of longer ones."""
    covered: list[tuple[int, int]] = []  # occurrences of the titles so far, all of them longer
    named = []
    for title in sorted(occurring, key=len, reverse=True):
        free = [
            (begin, begin + len(title))
            for begin in _starts(text, title)
            if not any(low <= begin and begin + len(title) <= high for low, high in covered)
        ]
        # What lies inside an occurrence that does not count lies inside the longer one around it as well.
        covered += free
        named += [title] if free else []
    return named


def _starts(text: str, title: str) -> Iterator[int]:
    """Where a title begins in a text, overlapping occurrences included."""
    begin = text.find(title)
    while begin >= 0:
        yield begin
        begin = text.find(title, begin + 1)
