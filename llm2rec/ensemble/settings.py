"""What the ensemble can be told; a Hydra schema and plain values at once."""

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
        batch_rows: Rows scored at once, each on the whole catalogue.
    """

    name: str = "ensemble"
    neighbours: float = 0.5
    top_k: int = 100
    block_rows: int = 16384
    batch_rows: int = 512

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"ensemble.name is {self.name!r}, expected the name of a folder.")
        if not 0 <= self.neighbours <= 1:
            raise ConfigError(f"ensemble.neighbours is {self.neighbours}, expected a part of the whole, 0 to 1.")
        if min(self.top_k, self.block_rows, self.batch_rows) < 1:
            raise ConfigError("ensemble: top_k, block_rows and batch_rows must be at least 1.")
