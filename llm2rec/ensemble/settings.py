"""What the ensemble can be told; a Hydra schema and plain values at once."""

import re
from dataclasses import dataclass

from llm2rec.core.errors import ConfigError

__all__ = ["EnsembleSettings"]


@dataclass
class EnsembleSettings:
    """Of what the ensemble is made, besides its members, and what it writes down.

    Attributes:
        name: Name of its outputs, ``<teacher outputs>/<dataset>/<name>``.
        neighbours: Part of its distribution that item neighbours have, 0 to 1; the members share the rest.
        top_k: Items per training row.
        block_rows: Rows per resumable block.
        batch_rows: Rows scored at once, each on the whole catalogue; fewer where that is large.
    """

    name: str = "ensemble"
    neighbours: float = 0.5
    top_k: int = 100
    block_rows: int = 16384
    batch_rows: int = 512

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not re.fullmatch(r"\w[\w. -]{0,99}", self.name):
            raise ConfigError(
                f"ensemble.name is {self.name!r}, expected the name of a folder: up to 100 letters, digits, `_`, `-`, "
                "`.` and spaces, the first a letter or digit."
            )
        if not 0 <= self.neighbours <= 1:
            raise ConfigError(f"ensemble.neighbours is {self.neighbours}, expected a part of the whole, 0 to 1.")
        for name in ("top_k", "block_rows", "batch_rows"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"ensemble.{name} is {value}, expected at least 1.")
