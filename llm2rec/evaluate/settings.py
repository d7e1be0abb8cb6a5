"""What the report can be told; a Hydra schema and a plain value at once."""

from dataclasses import dataclass

__all__ = ["ReportSettings"]


@dataclass
class ReportSettings:
    """How runs are compared in the report of `llm2rec.evaluate`.

    Attributes:
        baseline: Label or folder of the run that others are compared with, or ``popularity``; None for the first run
            that is compared, the oldest one of ``runs=latest``.
    """

    baseline: str | None = None
