"""Do the titles belong to the items? If so, titles of items that follow each other are more alike than by chance."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from llm2rec.data.recdata import RecData

__all__ = ["TitleAgreement", "title_agreement"]

_USERS, _PAIRS_OF_A_USER = 4000, 20
_ENOUGH = 2000  # pairs; MovieLens, with a weak signal, differs from chance with 500
_SURE = 5.0  # standard errors; pairs of one user are not independent


@dataclass(frozen=True)
class TitleAgreement:
    """Similarity of titles that follow each other, and of titles paired by chance.

    Attributes:
        pairs: Number of pairs of items that follow each other and have different titles.
        following: Mean similarity of their titles, 0 to 1: the cosine of their letter trigrams, weighted by rarity.
        by_chance: The same for the same titles in other pairs.
        errors: The difference in standard errors.
    """

    pairs: int
    following: float
    by_chance: float
    errors: float

    def doubt(self) -> str | None:
        """A warning if titles do not predict the next item; None if they do, or if there are too few pairs."""
        if self.pairs < _ENOUGH or self.errors >= _SURE:
            return None
        return (
            f"titles of items that follow each other are no more similar than random pairs ({self.following:.4f} and "
            f"{self.by_chance:.4f}, {self.errors:+.1f} standard errors over {self.pairs:,} pairs): do the titles "
            "belong to these item ids? A teacher that reads them cannot predict the next item"
        )


def title_agreement(data: RecData) -> TitleAgreement:
    """Compare titles within sequences with titles across them.

    Args:
        data: A prepared dataset; of a large one, pairs of 4,000 users are read.

    Returns:
        The comparison.
    """
    users = np.unique(np.linspace(0, len(data.sequences) - 1, min(_USERS, len(data.sequences))).astype(int))
    pairs: list[tuple[int, int]] = []
    for sequence in data.sequences.select(users)["items"]:
        places = np.unique(np.linspace(0, len(sequence) - 2, min(_PAIRS_OF_A_USER, len(sequence) - 1)).astype(int))
        pairs += [(sequence[place], sequence[place + 1]) for place in places]
    items = sorted({item for pair in pairs for item in pair})
    titles = dict(zip(items, data.items.select(items)["title"], strict=True))
    vectors = _vectors(titles)
    half = len(pairs) // 2
    shifted = [(first, pairs[number - half][1]) for number, (first, _) in enumerate(pairs)]
    following, by_chance = (
        np.array([_cosine(vectors[a], vectors[b]) for a, b in each if titles[a] != titles[b]])
        for each in (pairs, shifted)
    )
    if min(len(following), len(by_chance)) < 2:
        return TitleAgreement(len(following), 0.0, 0.0, 0.0)
    error = math.sqrt(following.var(ddof=1) / len(following) + by_chance.var(ddof=1) / len(by_chance))
    difference = float(following.mean() - by_chance.mean())
    errors = difference / error if error > 0 else 0.0
    return TitleAgreement(len(following), float(following.mean()), float(by_chance.mean()), errors)


def _vectors(titles: dict[int, str]) -> dict[int, dict[str, float]]:
    """Letter trigrams of each title with weights of unit norm; they work for any language, with or without spaces."""
    # In order of appearance: a set's order differs between processes, and with it the last digit of the sums.
    triples = {
        item: dict.fromkeys(text[i : i + 3] for i in range(max(1, len(text) - 2)))
        for item, text in _folded(titles).items()
    }
    counts = Counter(triple for each in triples.values() for triple in each)
    found = {}
    for item, each in triples.items():
        weights = {triple: math.log((len(titles) + 1) / counts[triple]) for triple in each}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        found[item] = {triple: weight / length for triple, weight in weights.items()}
    return found


def _folded(titles: dict[int, str]) -> dict[int, str]:
    return {item: f" {' '.join(title.casefold().split())} " for item, title in titles.items()}


def _cosine(one: dict[str, float], other: dict[str, float]) -> float:
    return sum(weight * other[triple] for triple, weight in one.items() if triple in other)
