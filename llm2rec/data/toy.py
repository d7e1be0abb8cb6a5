"""A generated dataset whose titles carry at once what item ids show only after many interactions.

Titles are made of words, `Crystal Harbor Racing 3`: a world, a place, a genre and a volume. Every series (world, place
and genre) has the same number of volumes; every world has several series. Users mostly continue with another volume
of the same series, or stay in its world. So the words of the last titles are words of the next one, while each item is
rare: a model of ids hardly ever sees the same transition twice and has to find the groups first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from llm2rec.data.spec import DatasetSpec, RawData

__all__ = ["Toy"]

# fmt: off
_WORLDS = (
    "Crystal", "Iron", "Silent", "Golden", "Frozen", "Crimson", "Hidden", "Ancient", "Electric", "Paper",
    "Hollow", "Emerald", "Broken", "Velvet", "Wandering", "Burning", "Distant", "Copper", "Midnight", "Savage",
    "Gentle", "Painted", "Salted", "Thunder", "Marble", "Woven", "Scarlet", "Lunar", "Rusty", "Amber",
    "Bitter", "Cobalt", "Drifting", "Endless", "Feral", "Glass", "Humble", "Ivory", "Jagged", "Kindled",
)
_PLACES = (
    "Harbor", "Forest", "Citadel", "Valley", "Station", "Desert", "Island", "Temple", "Garden", "Canyon",
    "Tower", "Village", "Reef", "Bridge", "Market", "Cavern", "Meadow", "Fortress", "Lagoon", "Summit",
    "Orchard", "Quarry", "Theater", "Lighthouse", "Marsh", "Palace", "Railway", "Shipyard", "Glacier", "Arcade",
    "Bazaar", "Chapel", "Dockyard", "Estuary", "Foundry", "Gallery", "Hamlet", "Junction", "Kingdom", "Library",
)
_GENRES = ("Racing", "Puzzle", "Quest", "Tactics", "Farming", "Detective", "Football", "Survival")
# fmt: on


@dataclass
class Toy(DatasetSpec):
    """Generated users who follow series and worlds.

    Attributes:
        n_users: Users.
        n_items: Items; a multiple of `n_volumes`.
        n_volumes: Items of one series.
        n_worlds: Worlds the series are dealt to, at most 40.
        min_length: Fewest interactions of a user.
        max_length: Most interactions of a user.
        same_series_probability: Chance that the next item is another volume of the present series, while there is
            one the user has not had.
        same_world_probability: Chance that it is any item of the same world; what remains is any item at all.
        seed: Seed of the generator.
    """

    _target_: str = "llm2rec.data.toy.Toy"
    name: str = "toy"
    domain: str = "game"
    n_users: int = 500
    n_items: int = 900
    n_volumes: int = 6
    n_worlds: int = 30
    min_length: int = 8
    max_length: int = 12
    same_series_probability: float = 0.6
    same_world_probability: float = 0.3
    seed: int = 0

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.n_volumes < 1 or self.n_items < self.n_volumes or self.n_items % self.n_volumes:
            problems.append(f"`n_items` must be a multiple of `n_volumes`, got {self.n_items} and {self.n_volumes}")
        if not 1 <= self.n_worlds <= len(_WORLDS):
            problems.append(f"`n_worlds` must be from 1 to {len(_WORLDS)}, got {self.n_worlds}")
        most_items = self.n_worlds * len(_PLACES) * self.n_volumes
        if self.n_items > most_items:
            problems.append(
                f"`n_items` must be at most {most_items} with {self.n_worlds} worlds of {self.n_volumes} volumes, "
                f"got {self.n_items}"
            )
        if self.n_users < 1:
            problems.append(f"`n_users` must be at least 1, got {self.n_users}")
        if not 1 <= self.min_length <= self.max_length < self.n_items:
            problems.append(
                "`min_length` and `max_length` must be in order, at least 1 and fewer than the items, "
                f"got {self.min_length} and {self.max_length}"
            )
        chances = (self.same_series_probability, self.same_world_probability)
        if min(chances) < 0 or sum(chances) > 1:
            problems.append(
                "`same_series_probability` and `same_world_probability` must not be negative and sum to at most 1, "
                f"got {chances[0]} and {chances[1]}"
            )
        if self.seed < 0:
            problems.append(f"`seed` must not be negative, got {self.seed}")
        return problems

    def raw_files(self) -> list[Path]:
        """Return no files: everything is generated."""
        return []

    def raw_digest(self) -> str:
        """Hash what is generated, so that a changed generator is noticed like a changed file."""
        raw = self.read()
        content = raw.interactions.to_csv(index=False) + raw.items.to_csv(index=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def read(self) -> RawData:
        """Generate interactions and titles; `timestamp` counts each user's interactions."""
        rng = np.random.default_rng(self.seed)
        titles, world_of_series = self._titles(rng)
        # Numbered at random, so that neighbouring ids carry no information.
        item_ids = np.array([f"t{number:05d}" for number in rng.permutation(self.n_items)])
        lengths = rng.integers(self.min_length, self.max_length + 1, self.n_users)
        visits = np.concatenate([self._walk(rng, int(length), world_of_series) for length in lengths])
        user_ids = [f"u{user:05d}" for user in np.repeat(np.arange(self.n_users), lengths)]
        interactions = pd.DataFrame(
            {
                "user_id": pd.Series(user_ids, dtype="str"),
                "item_id": pd.Series(item_ids[visits], dtype="str"),
                "timestamp": np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            }
        )
        items = pd.DataFrame({"item_id": pd.Series(item_ids, dtype="str"), "title": pd.Series(titles, dtype="str")})
        return RawData(interactions, items.sort_values("item_id", ignore_index=True))

    def _titles(self, rng: np.random.Generator) -> tuple[list[str], npt.NDArray[np.int64]]:
        """Return the title of each item, volumes of a series in a row, and the world of each series."""
        n_series = self.n_items // self.n_volumes
        worlds = np.arange(n_series) % self.n_worlds
        # Within a world each place comes once, so every series has a name of its own.
        places = np.stack([rng.permutation(len(_PLACES)) for _ in range(self.n_worlds)])
        genres = rng.integers(len(_GENRES), size=n_series)
        titles = [
            f"{_WORLDS[world]} {_PLACES[places[world, series // self.n_worlds]]} {_GENRES[genres[series]]} {volume + 1}"
            for series, world in enumerate(worlds)
            for volume in range(self.n_volumes)
        ]
        return titles, worlds

    def _walk(self, rng: np.random.Generator, length: int, world_of_series: npt.NDArray[np.int64]) -> list[int]:
        """Return one user's items, ``(length,)``, none of them twice."""
        world_of_item = np.repeat(world_of_series, self.n_volumes)
        series_of_item = np.repeat(np.arange(len(world_of_series)), self.n_volumes)
        unseen = np.ones(self.n_items, dtype=bool)
        walk = [int(rng.integers(self.n_items))]
        while len(walk) < length:
            unseen[walk[-1]] = False
            draw = rng.random()
            in_series = unseen & (series_of_item == series_of_item[walk[-1]])
            in_world = unseen & (world_of_item == world_of_item[walk[-1]])
            pool = unseen
            if draw < self.same_series_probability and in_series.any():
                pool = in_series
            elif draw < self.same_series_probability + self.same_world_probability and in_world.any():
                pool = in_world
            walk.append(int(rng.choice(np.flatnonzero(pool))))
        return walk
