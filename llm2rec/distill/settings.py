"""What distillation can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field

from llm2rec.core.errors import ConfigError

__all__ = ["DistillSettings", "EmbeddingSettings", "RankingSettings"]


@dataclass
class RankingSettings:
    """Ranking distillation (DLLM2Rec, arXiv 2405.00338).

    Attributes:
        weight: Weight of the ranking loss in the total, λ_d; 0 leaves it out.
        top_k: Teacher candidates used per row, K.
        beta: Ranks over which the position weight falls by a factor e.
        gamma_position: Share of the position weight.
        gamma_confidence: Share of the confidence weight.
        gamma_consistency: Share of the consistency weight.
    """

    weight: float = 0.5
    top_k: int = 10
    beta: float = 1.0
    gamma_position: float = 0.3
    gamma_confidence: float = 0.5
    gamma_consistency: float = 0.1

    def __post_init__(self) -> None:
        gammas = (self.gamma_position, self.gamma_confidence, self.gamma_consistency)
        if self.weight < 0 or min(gammas) < 0:
            raise ConfigError(
                f"distill.ranking: weights must not be negative, got weight={self.weight}, gammas={gammas}."
            )
        if self.weight > 0 and self.gamma_position + self.gamma_confidence <= 0:
            raise ConfigError(
                "distill.ranking: `gamma_position` and `gamma_confidence` are both 0, so a row without any consistent "
                "candidate would have no weight; set one of them, or `weight: 0` to leave ranking distillation out."
            )
        if self.top_k < 1 or self.beta <= 0:
            raise ConfigError(f"distill.ranking: expected top_k >= 1 and beta > 0, got {self.top_k} and {self.beta}.")


@dataclass
class EmbeddingSettings:
    """Embedding distillation, in two forms that may be combined.

    Attributes:
        fusion_scale: Item vector = offset + fusion_scale · projected teacher vector (the paper); 0 leaves it out.
        alignment_weight: Weight of a loss that pulls projected item vectors to the teacher's; 0 leaves it out.
        alignment: ``mse`` or ``cosine``.
        standardise: Centre the teacher's vectors and give each unit length first, so that `fusion_scale` means the
            same for every teacher.
    """

    fusion_scale: float = 0.3
    alignment_weight: float = 0.0
    alignment: str = "cosine"
    standardise: bool = True

    def __post_init__(self) -> None:
        if self.alignment not in ("mse", "cosine"):
            raise ConfigError(f"distill.embedding.alignment is {self.alignment!r}, expected 'mse' or 'cosine'.")
        if self.alignment_weight < 0:
            raise ConfigError(f"distill.embedding.alignment_weight is {self.alignment_weight}, expected 0 or more.")


@dataclass
class DistillSettings:
    """How a student learns from a teacher.

    Attributes:
        name: Name of the recipe.
        teacher_outputs: Folder of the teacher's outputs.
        ranking: Ranking distillation.
        embedding: Embedding distillation.
    """

    name: str = "dllm2rec"
    teacher_outputs: str = "???"
    ranking: RankingSettings = field(default_factory=RankingSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
