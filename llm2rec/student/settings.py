"""Student configuration (Hydra structured configs)."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from llm2rec.core.errors import ConfigError, Ignored, one_of
from llm2rec.core.train.settings import TrainingSettings

__all__ = [
    "CaserSettings",
    "CaserStudent",
    "DrosSettings",
    "GRU4RecSettings",
    "GRU4RecStudent",
    "LossSettings",
    "ModelSettings",
    "SASRecSettings",
    "SASRecStudent",
    "StudentSettings",
]


@dataclass
class ModelSettings:
    """Arguments of all students; see `llm2rec.student.models`.

    Attributes:
        width: Width of item and user vectors.
        max_length: Maximum history length.
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
        positions: ``recent`` counts positions from the most recent item, ``oldest`` from the oldest.
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
        heights: Heights of the horizontal filters; null uses every height up to ``max_length``.
    """

    n_horizontal: int = 16
    n_vertical: int = 4
    heights: list[int] | None = None


@dataclass
class DrosSettings:
    """Distributionally robust optimisation (DROS, SIGIR 2023); formula in `llm2rec.student.losses.dros`.

    Attributes:
        weight: Weight of the DROS loss relative to the task loss; 0 disables it.
        beta: Robust radius.
        propensity_power: Exponent of item popularity in the propensities; 0 makes them equal.
    """

    weight: float = 0.0
    beta: float = 1.0
    propensity_power: float = 0.05

    def __post_init__(self) -> None:
        if self.weight < 0 or self.propensity_power < 0 or self.beta <= 0:
            raise ConfigError(
                "dros: expected weight >= 0, propensity_power >= 0 and beta > 0, got "
                f"{self.weight}, {self.propensity_power} and {self.beta}."
            )


_LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "sampled_softmax": {"n_negatives": 256, "sharing": "step", "proposal": "uniform"},
    "bce": {"n_negatives": 1, "sharing": "row"},
    "gbce": {"n_negatives": 256, "sharing": "row", "calibration": 0.75},
}


@dataclass
class LossSettings:
    """The task loss; formulas in `llm2rec.student.losses`.

    Options that are null take the default of the loss, given below. Options that the loss does not read are rejected.

    Attributes:
        name: ``cross_entropy`` over the whole catalogue, computed in tiles if it is large; or a loss with sampled
            negatives, whose cost does not depend on the catalogue: ``sampled_softmax``, ``bce`` (SASRec) or ``gbce``
            (gSASRec).
        n_negatives: Negatives, K: 256 for ``sampled_softmax`` and ``gbce``, 1 for ``bce``.
        sharing: ``row``: separate negatives per row, a function of seed, epoch and row, which gathers K vectors per
            row; the default of ``bce`` and ``gbce``. ``step``: all rows of an optimizer step share negatives, a
            function of seed and step, which costs one matrix product; the default of ``sampled_softmax``, recommended
            for many negatives.
        proposal: Proposal of ``sampled_softmax``: ``uniform`` (default) or ``popularity`` in the training rows; both
            are corrected. The other losses draw uniformly.
        calibration: t of ``gbce``, 0 to 1; 0.75 by default, as in the paper.
        dros: Additional robust loss, always over the whole catalogue.
    """

    name: str = "cross_entropy"
    n_negatives: int | None = None
    sharing: str | None = None
    proposal: str | None = None
    calibration: float | None = None
    dros: DrosSettings = field(default_factory=DrosSettings)

    def __post_init__(self) -> None:
        """Reject options that are out of range or that the chosen loss ignores."""
        one_of("student.loss.name", self.name, *_LOSS_DEFAULTS)
        for option in ("n_negatives", "sharing", "proposal", "calibration"):
            readers = [name for name, defaults in _LOSS_DEFAULTS.items() if option in defaults]
            if getattr(self, option) is not None and self.name not in readers:
                raise ConfigError(
                    f"student.loss.{option} is {getattr(self, option)!r}, which {self.name} does not read; leave it "
                    f"null, or use student.loss.name={' or '.join(readers)}."
                )
        if self.n_negatives is not None and self.n_negatives < 1:
            raise ConfigError(f"student.loss.n_negatives is {self.n_negatives}, expected at least 1.")
        if self.calibration is not None and not 0 <= self.calibration <= 1:
            raise ConfigError(f"student.loss.calibration is {self.calibration}, expected 0 to 1.")
        one_of("student.loss.sharing", self.sharing or "row", "row", "step")
        one_of("student.loss.proposal", self.proposal or "uniform", "uniform", "popularity")

    def completed(self) -> "LossSettings":
        """Fill null options with the defaults of the loss."""
        defaults = _LOSS_DEFAULTS[self.name]
        return replace(self, **{option: value for option, value in defaults.items() if getattr(self, option) is None})


@dataclass
class StudentSettings:
    """Student configuration; the schema ``base_student`` is for students without extra arguments.

    Attributes:
        name: Name in `llm2rec.student.models.MODELS`.
        model: Arguments of the model.
        training: Training settings, shared with distillation.
        examples: Input of a forward pass in training: ``windows`` (the history of each row) or ``sequences`` (segments
            of users' sequences, each predicting many rows; see `llm2rec.student.datamodule.Rows.in_segments`). Both
            train every row once per epoch and count batch sizes in rows; with ``sequences`` they hold on average,
            because segments are not split.
        loss: The task loss, shared with distillation unless its recipe sets another.
        item_optimizer: ``adamw``, or ``rowwise`` for large item tables; see `llm2rec.core.train.optimizer`.
    """

    name: str = "???"
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    examples: str = "windows"
    loss: LossSettings = field(default_factory=LossSettings)
    item_optimizer: str = "adamw"

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        Ignored(("loss.dros.beta", "loss.dros.propensity_power"), "loss.dros.weight", (0,)),
    )

    def __post_init__(self) -> None:
        one_of("student.examples", self.examples, "windows", "sequences")
        one_of("student.item_optimizer", self.item_optimizer, "adamw", "rowwise")


@dataclass
class SASRecStudent(StudentSettings):
    """Schema of ``conf/student/sasrec.yaml``."""

    name: str = "sasrec"
    model: SASRecSettings = field(default_factory=SASRecSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples == "sequences" and self.model.positions != "oldest":
            raise ConfigError(
                "student.examples=sequences needs `student.model.positions=oldest`, but it is "
                f"{self.model.positions!r}, whose positions differ for each row of a sequence; set it, or use "
                "`student.examples=windows`."
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
                "student.examples=sequences needs a causal student, which Caser is not; use "
                "`student.examples=windows`, or student=sasrec or gru4rec."
            )
