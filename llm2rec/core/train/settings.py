"""Training configuration of all stages."""

from dataclasses import dataclass

from llm2rec.core.errors import ConfigError, one_of

__all__ = ["TrainingSettings"]


@dataclass
class TrainingSettings:
    """Training configuration (Hydra structured config).

    Attributes:
        epochs: Maximum passes over the training rows; 0 keeps the initial model.
        batch_size: Rows per optimizer step, over all processes and micro-batches. With
            `student.examples=sequences` sequences are not split, and it holds on average.
        micro_batch_size: Maximum rows per process and forward pass; smaller values need less memory and give the same
            results. It is halved when a GPU runs out of memory.
        learning_rate: Peak learning rate.
        min_learning_rate_ratio: Learning rate at the last step as a fraction of the peak; 1 keeps it constant.
        warmup_ratio: Fraction of all steps with linear warm-up.
        warmup_start_ratio: Learning rate at the first step of the warm-up as a fraction of the peak.
        weight_decay: Decoupled weight decay (AdamW), on matrices only.
        max_grad_norm: Maximum gradient norm for clipping; 0 disables it.
        patience: Evaluations without improvement after which training stops.
        evaluate_every_steps: Optimizer steps between evaluations; 0 means once an epoch.
        checkpoint_every_steps: Optimizer steps between checkpoints, in addition to one after each evaluation; 0
            disables it.
        keep_checkpoints: Newest checkpoints to keep during the run, in addition to the best weights.
        nonfinite: Action if a loss or gradient is not finite: ``stop`` the run, or ``skip`` the step.
        max_skipped: Maximum number of skipped steps in a run; the next one stops it.
        spike_ratio: Log loss and gradient norm above this multiple of their recent median; 0 disables it.
    """

    epochs: int = 100
    batch_size: int = 256
    micro_batch_size: int = 256
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 1.0
    warmup_ratio: float = 0.0
    warmup_start_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    patience: int = 10
    evaluate_every_steps: int = 0
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 1
    nonfinite: str = "stop"
    max_skipped: int = 10
    spike_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Check all values and report every problem at once."""
        one_of("training settings: `nonfinite`", self.nonfinite, "stop", "skip")
        problems = [
            f"`{name}` is {getattr(self, name)}, expected {expected}"
            for name, expected, ok in (
                ("epochs", "0 or more", self.epochs >= 0),
                ("batch_size", "at least 1", self.batch_size >= 1),
                ("micro_batch_size", "at least 1", self.micro_batch_size >= 1),
                ("learning_rate", "a positive number", self.learning_rate > 0),
                ("min_learning_rate_ratio", "0 to 1", 0 <= self.min_learning_rate_ratio <= 1),
                ("warmup_ratio", "0 to 1", 0 <= self.warmup_ratio <= 1),
                ("warmup_start_ratio", "0 to 1", 0 <= self.warmup_start_ratio <= 1),
                ("weight_decay", "0 or more", self.weight_decay >= 0),
                ("max_grad_norm", "0 (off) or more", self.max_grad_norm >= 0),
                ("patience", "at least 1", self.patience >= 1),
                ("evaluate_every_steps", "0 (once an epoch) or more", self.evaluate_every_steps >= 0),
                ("checkpoint_every_steps", "0 (off) or more", self.checkpoint_every_steps >= 0),
                ("keep_checkpoints", "at least 1", self.keep_checkpoints >= 1),
                ("max_skipped", "0 or more", self.max_skipped >= 0),
                ("spike_ratio", "0 (off) or above 1", self.spike_ratio == 0 or self.spike_ratio > 1),
            )
            if not ok
        ]
        if problems:
            raise ConfigError("training settings: " + "; ".join(problems) + ".")

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps in one pass over ``n_rows`` rows; the last may have fewer rows."""
        return -(-n_rows // self.batch_size)

    def evaluation_is_due(self, steps_done: int, n_rows: int) -> bool:
        """Whether to evaluate after ``steps_done`` steps: at the interval, and after the last step."""
        per_epoch = self.steps_per_epoch(n_rows)
        return steps_done % (self.evaluate_every_steps or per_epoch) == 0 or steps_done == self.epochs * per_epoch

    def checkpoint_is_due(self, steps_done: int, n_rows: int) -> bool:
        """Whether to write a checkpoint after ``steps_done`` steps: at the interval, and after each evaluation."""
        at_interval = self.checkpoint_every_steps > 0 and steps_done % self.checkpoint_every_steps == 0
        return at_interval or self.evaluation_is_due(steps_done, n_rows)
