"""What a student can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field

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
    """

    n_blocks: int = 1
    n_heads: int = 2


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
    """

    name: str = "???"
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass
class SASRecStudent(StudentSettings):
    """Schema of ``conf/student/sasrec.yaml``."""

    name: str = "sasrec"
    model: SASRecSettings = field(default_factory=SASRecSettings)


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
