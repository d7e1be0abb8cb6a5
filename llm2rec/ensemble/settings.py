"""Ensemble configuration (Hydra structured config)."""

import re
from dataclasses import dataclass

from llm2rec.core.errors import ConfigError

__all__ = ["EnsembleSettings"]


@dataclass
class EnsembleSettings:
    """Weights of an ensemble's parts and its exported outputs.

    Attributes:
        name: Name of its outputs, ``<teacher outputs>/<dataset>/<name>``.
        neighbours: Weight of the item neighbours, 0 to 1; the members share the rest.
        top_k: Items per training row.
        block_rows: Rows per resumable block.
        batch_rows: Rows per batch, fewer with a large catalogue.
    """

    name: str = "ensemble"
    neighbours: float = 0.5
    top_k: int = 100
    block_rows: int = 16384
    batch_rows: int = 512

    def __post_init__(self) -> None:
        """Reject invalid values."""
        if not re.fullmatch(r"\w[\w. -]{0,99}", self.name):
            raise ConfigError(
                f"ensemble.name is {self.name!r}, expected the name of a folder: up to 100 letters, digits, `_`, `-`, "
                "`.` and spaces, the first a letter or digit."
            )
        if not 0 <= self.neighbours <= 1:
            raise ConfigError(f"ensemble.neighbours is {self.neighbours}, expected a weight from 0 to 1.")
        for name in ("top_k", "block_rows", "batch_rows"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"ensemble.{name} is {value}, expected at least 1.")
