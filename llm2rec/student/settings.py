"""What a student can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field

from llm2rec.core.errors import ConfigError
from llm2rec.core.training import TrainingSettings

__all__ = [
    "CaserSettings",
    "CaserStudent",
    "GRU4RecSettings",
    "GRU4RecStudent",
    "ModelSettings",
    "SASRecSettings",
    "SASRecStudent",
    "StudentSettings",
]


@dataclass
class ModelSettings:
    """Arguments that every student takes; see `llm2rec.student.models`.

    Attributes:
        width: Width of item and user vectors.
        max_length: Longest history.
        dropout: Dropout probability.
        tie_items: Whether one item table serves input and output.
    """

    width: int = 64
    max_length: int = 10
    dropout: float = 0.2
    tie_items: bool = True


@dataclass
class SASRecSettings(ModelSettings):
    """Arguments of SASRec.

    Attributes:
        n_blocks: Transformer blocks.
        n_heads: Attention heads.
        positions: Whether they are counted from the most ``recent`` item or from the ``oldest``.
    """

    n_blocks: int = 1
    n_heads: int = 2
    positions: str = "recent"


@dataclass
class GRU4RecSettings(ModelSettings):
    """Arguments of GRU4Rec.

    Attributes:
        hidden_width: Width of the recurrent state.
        n_layers: Recurrent layers.
    """

    dropout: float = 0.3
    hidden_width: int = 128
    n_layers: int = 1


@dataclass
class CaserSettings(ModelSettings):
    """Arguments of Caser.

    Attributes:
        n_horizontal: Horizontal filters of each height.
        n_vertical: Vertical filters.
        heights: Heights of the horizontal filters; null is every height up to ``max_length``.
    """

    n_horizontal: int = 16
    n_vertical: int = 4
    heights: list[int] | None = None


@dataclass
class StudentSettings:
    """A student and its training.

    Attributes:
        name: Name in `llm2rec.student.models.MODELS`.
        model: Arguments of the model.
        training: Length, batch and rate; distillation uses the same.
        examples: What a forward pass reads for the training rows: ``windows`` (each row's own history) or
            ``sequences`` (pieces of users' sequences, each answering many rows; see
            `llm2rec.student.segments.SegmentData`). Every row is trained once an epoch in both, and sizes of batches
            count rows in both; with ``sequences`` they are met on average, as pieces stay whole.
    """

    name: str = "???"
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    examples: str = "windows"

    def __post_init__(self) -> None:
        if self.examples not in ("windows", "sequences"):
            raise ConfigError(f"student.examples is {self.examples!r}, expected 'windows' or 'sequences'.")


@dataclass
class SASRecStudent(StudentSettings):
    """Schema of ``conf/student/sasrec.yaml``."""

    name: str = "sasrec"
    model: SASRecSettings = field(default_factory=SASRecSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples == "sequences" and self.model.positions != "oldest":
            raise ConfigError(
                f"student.examples=sequences answers a row at every item it reads, but student.model.positions="
                f"{self.model.positions} counts from each row's own last item; add `student.model.positions=oldest`, "
                "or use `student.examples=windows`."
            )


@dataclass
class GRU4RecStudent(StudentSettings):
    """Schema of ``conf/student/gru4rec.yaml``."""

    name: str = "gru4rec"
    model: GRU4RecSettings = field(default_factory=GRU4RecSettings)


@dataclass
class CaserStudent(StudentSettings):
    """Schema of ``conf/student/caser.yaml``."""

    name: str = "caser"
    model: CaserSettings = field(default_factory=CaserSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples == "sequences":
            raise ConfigError(
                "student.examples=sequences needs a student that reads item by item, which Caser does not; use "
                "`student.examples=windows`, or student=sasrec or gru4rec."
            )
