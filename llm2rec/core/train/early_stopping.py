"""Stop when validation has not improved for a while."""

from dataclasses import dataclass
from typing import Any

__all__ = ["EarlyStopping"]


@dataclass
class EarlyStopping:
    """Keeps the best validation value seen; larger is better.

    Attributes:
        patience: Evaluations without improvement after which to stop.
        best: Best value so far, or None before the first.
        best_step: Step of the best value.
        waited: Evaluations since the best value.
    """

    patience: int
    best: float | None = None
    best_step: int = -1
    waited: int = 0

    def update(self, value: float, step: int, *, waits: bool = True) -> bool:
        """Note a value; returns whether it is the best so far. NaN never is.

        Args:
            value: Larger is better.
            step: Step of the value.
            waits: Whether a value that is not the best takes from the patience.
        """
        if value == value and (self.best is None or value > self.best):
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += waits
        return False

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """What to store in a checkpoint."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
