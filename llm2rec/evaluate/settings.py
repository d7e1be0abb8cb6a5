"""Report configuration (Hydra structured config)."""

from dataclasses import dataclass

__all__ = ["ReportSettings"]


@dataclass
class ReportSettings:
    """Configuration of the report of `llm2rec.evaluate`.

    Attributes:
        baseline: Label or folder of the run that others are compared with, or ``popularity``; None for the first of
            the runs, which is the oldest one with ``runs=latest``.
    """

    baseline: str | None = None
