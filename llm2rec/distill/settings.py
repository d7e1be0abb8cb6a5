"""Distillation configuration (Hydra structured configs).

Defaults are the objective of the DLLM2Rec paper (arXiv 2405.00338); `DLLM2RecCodeSettings` is the objective of its
released program (github.com/istarryn/DLLM2Rec).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from llm2rec.core.errors import ConfigError, Ignored, one_of
from llm2rec.student import settings as student

__all__ = ["DLLM2RecCodeSettings", "DistillSettings", "DrosSettings", "EmbeddingSettings", "RankingSettings"]


# Values of `negative` that each ranking loss supports.
_NEGATIVES = {
    "weighted_bce": ("none", "one_minus_score", "one_minus_probability"),
    "listwise": ("none",),
    "ranknet": ("none", "ranked_last"),
    "margin": ("none", "ranked_last"),
}
# What weighs candidates, which only the weighted loss does.
_OF_WEIGHTS = (
    *(f"ranking.gamma_{part}" for part in ("position", "confidence", "consistency")),
    *("ranking.beta", "ranking.confidence", "ranking.normalise_consistency", "ranking.weight_floor"),
    *("ranking.renormalise", "ranking.consistency_dropout"),
)


@dataclass
class RankingSettings:
    """Ranking distillation; formulas in `llm2rec.distill.kd_losses`.

    Attributes:
        weight: Weight of the ranking loss in the total, λ_d; 0 leaves it out.
        loss: ``weighted_bce`` (paper and program): the weighted log-sigmoid of the candidates' scores. ``listwise``: KL
            divergence from the teacher's distribution over its K candidates. ``ranknet`` and ``margin``: pairwise
            losses on the teacher's order. Only ``weighted_bce`` reads the options of candidate weights (``beta``,
            ``gamma_*``, ``confidence``, ``normalise_consistency``, ``weight_floor``, ``renormalise``,
            ``consistency_dropout``).
        top_k: Teacher candidates used per row, K.
        temperature: Temperature of ``listwise``; larger values flatten both distributions.
        over: Items over which ``listwise`` normalises the student's scores: ``catalogue``; ``sampled``, an estimate of
            that from the candidates and the negatives of `student.loss`, at a cost independent of the catalogue size;
            or ``candidates``, the K alone.
        margin: Margin of the ``margin`` loss.
        beta: Ranks over which the position weight falls by a factor e.
        gamma_position: Share of the position weight.
        gamma_confidence: Share of the confidence weight.
        gamma_consistency: Share of the consistency weight.
        confidence: ``per_candidate`` (program): each candidate's distance, normalised over K. ``per_row`` (paper):
            the distance of the row's target for all candidates; a target outside the stored list gets the distance of
            its last item.
        normalise_consistency: Whether consistency weights sum to 1 over K like the others; neither paper nor program.
        weight_floor: Added to consistency, and to confidence ``per_candidate`` before it is normalised: 1e-8 in the
            program, 0 in the paper.
        renormalise: Whether a row's mixed weights are renormalised to sum to 1 over K (program); the paper does not.
        consistency_dropout: Whether the student's top K comes from its training pass, with dropout (program), or from
            a second pass without dropout.
        negative: What one sampled negative adds per candidate: ``none`` (paper), ``one_minus_score`` (-log σ(1 - s),
            program), or ``one_minus_probability`` (-log(1 - σ(s)), binary cross-entropy). ``ranknet`` and ``margin``
            support ``none`` and ``ranked_last``: the negative forms a pair with every candidate.
    """

    weight: float = 0.5
    loss: str = "weighted_bce"
    top_k: int = 10
    temperature: float = 1.0
    over: str = "catalogue"
    margin: float = 1.0
    beta: float = 1.0
    gamma_position: float = 0.3
    gamma_confidence: float = 0.5
    gamma_consistency: float = 0.1
    confidence: str = "per_row"
    normalise_consistency: bool = False
    weight_floor: float = 0.0
    renormalise: bool = False
    consistency_dropout: bool = True
    negative: str = "none"

    def __post_init__(self) -> None:
        gammas = (self.gamma_position, self.gamma_confidence, self.gamma_consistency)
        if self.weight < 0 or min(gammas) < 0:
            raise ConfigError(
                f"distill.ranking: weights must not be negative, got weight={self.weight}, gammas={gammas}."
            )
        if not 0 <= self.weight_floor < float("inf"):
            raise ConfigError(f"distill.ranking.weight_floor is {self.weight_floor}, expected 0 (none) or more.")
        weighs = self.weight > 0 and self.loss == "weighted_bce"
        if weighs and self.gamma_position + self.gamma_confidence + self.weight_floor <= 0:
            raise ConfigError(
                "distill.ranking: `gamma_position` and `gamma_confidence` are both 0, so rows without a consistent "
                "candidate have no weight; set one of them, or disable ranking distillation with `weight: 0`."
            )
        if self.top_k < 1 or self.beta <= 0:
            raise ConfigError(f"distill.ranking: expected top_k >= 1 and beta > 0, got {self.top_k} and {self.beta}.")
        one_of("distill.ranking.confidence", self.confidence, "per_candidate", "per_row")
        one_of("distill.ranking.loss", self.loss, *_NEGATIVES)
        one_of("distill.ranking.over", self.over, "catalogue", "sampled", "candidates")
        if not (0 < self.temperature < float("inf") and 0 < self.margin < float("inf")):
            raise ConfigError(
                "distill.ranking: expected a positive `temperature` and `margin`, got "
                f"{self.temperature} and {self.margin}."
            )
        with_loss = "" if self.loss == "weighted_bce" else f" (with loss={self.loss})"
        one_of(f"distill.ranking.negative{with_loss}", self.negative, *_NEGATIVES[self.loss])
        if self.loss in ("ranknet", "margin") and self.top_k < 2 and self.negative == "none":
            raise ConfigError(
                f"distill.ranking.loss is {self.loss!r}, which needs pairs, but `top_k` is 1; raise `top_k`, or set "
                "`negative=ranked_last`."
            )
        if self.loss == "listwise" and self.over == "candidates" and self.top_k < 2:
            raise ConfigError(
                "distill.ranking.loss is 'listwise' over the candidates, but `top_k` is 1, so the loss is always 0; "
                "raise `top_k`, or use `over=catalogue`."
            )

    @property
    def needs_logits(self) -> bool:
        """Whether the loss needs the scores of all items, not only of candidates and negatives."""
        return self.over_catalogue or (self.weight > 0 and self.loss == "weighted_bce")

    @property
    def over_catalogue(self) -> bool:
        """Whether the loss normalises over all items, for which the log-sum-exp of the scores is enough."""
        return self.weight > 0 and self.loss == "listwise" and self.over == "catalogue"

    @property
    def samples(self) -> bool:
        """Whether the sum over the catalogue is estimated from the negatives of the task loss."""
        return self.weight > 0 and self.loss == "listwise" and self.over == "sampled"


@dataclass
class DrosSettings(student.DrosSettings):
    """DROS of the distillation recipe, an alternative to `student.loss.dros`.

    Its weight, α, applies to the DROS terms of the task loss and of the ranking loss.

    Attributes:
        in_ranking: DROS of the teacher's candidates inside the ranking loss: ``none`` (paper), ``per_row``, or
            ``broadcast`` (program: a candidate's loss is weighted by the batch's mean weight at its rank; requires one
            micro-batch on one process per optimizer step).
    """

    in_ranking: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("distill.dros.in_ranking", self.in_ranking, "none", "per_row", "broadcast")


@dataclass
class EmbeddingSettings:
    """Embedding distillation, in forms that may be combined.

    With ``fusion_sides=both`` and teacher outputs whose vectors are those of the items' titles, fusion makes a student
    that reads: items that training never showed have no offset, in training and later, and titles represent them.

    Attributes:
        fusion_scale: Item vector = offset + fusion_scale · projected teacher vector (the paper); 0 leaves it out.
        fusion: ``projection`` (paper and program), or ``frozen``: the prepared vectors fill the first `components`
            columns of the item vector and are not trained, and offsets are learned in the other columns (AlphaFuse,
            arXiv 2504.19218). ``fusion_scale`` is then the standard deviation of the frozen columns, in units of that
            of the initial offsets.
        fusion_unit: What a ``fusion_scale`` of 1 means for ``projection``. ``map``: the linear map as torch initialises
            it (paper and program), whose output is smaller the wider the teacher's vectors. ``ids``: initial projected
            vectors have the standard deviation of the initial offsets, .02, for any width.
        id_dropout: Share of items whose offset is left out in a training step, 0 to below 1, as history items, targets,
            candidates and negatives alike; each step draws other items. The student learns from it to represent items
            by the teacher's vectors alone. Offsets are not rescaled: evaluation uses both kinds of items as they are.
        fusion_sides: Item tables that are fused: ``both`` (paper); ``input`` (program): the output table is separate
            and plain, even with `student.model.tie_items`; ``output``: the input table is separate and plain. ``input``
            and ``output`` untie the tables even if ``fusion_scale`` is 0.
        alignment_weight: Weight of the alignment loss of projected item vectors; 0 disables it. The loss covers the
            target items of distilled rows, so items that are never a target are not aligned.
        alignment: ``mse``, ``cosine``, or ``contrastive``: an item's teacher vector against all others (InfoNCE).
        alignment_sides: Item tables that are aligned: ``input``, ``output``, or ``both`` (the mean of both losses).
            Tied tables support ``input`` only.
        alignment_temperature: Temperature of ``contrastive``, whose cosines lie within -1 to 1; smaller values put more
            weight on the most similar items.
        initialise: Initial item vectors of the student: random (``none``), the principal components of the teacher's
            vectors (``pca``), or these with unit variance (``whitened``); see
            `llm2rec.core.vectors.principal_components`.
        standardise: Whether to centre the teacher's vectors and scale each to unit length, so that `fusion_scale` has
            the same effect for all teachers of one width; the program does not. With unit length, `mse`, a mean over
            the width, is tens of times weaker than `cosine` at the same `alignment_weight`.
        whitening: Soft whitening of the centred vectors before they get unit length: each principal component is
            multiplied by its variance to the power ``-whitening / 2``. 0 only centres, 1 whitens fully.
        components: Principal components of the centred vectors to keep; null keeps all.
    """

    fusion_scale: float = 0.3
    fusion: str = "projection"
    fusion_unit: str = "map"
    id_dropout: float = 0.0
    fusion_sides: str = "both"
    alignment_weight: float = 0.0
    alignment: str = "cosine"
    alignment_sides: str = "input"
    alignment_temperature: float = 0.1
    initialise: str = "none"
    standardise: bool = True
    whitening: float = 0.0
    components: int | None = None

    def __post_init__(self) -> None:
        one_of("distill.embedding.fusion", self.fusion, "projection", "frozen")
        one_of("distill.embedding.fusion_unit", self.fusion_unit, "map", "ids")
        one_of("distill.embedding.fusion_sides", self.fusion_sides, "both", "input", "output")
        one_of("distill.embedding.alignment", self.alignment, "mse", "cosine", "contrastive")
        one_of("distill.embedding.alignment_sides", self.alignment_sides, "input", "output", "both")
        one_of("distill.embedding.initialise", self.initialise, "none", "pca", "whitened")
        if not 0 < self.alignment_temperature < float("inf"):
            raise ConfigError(
                f"distill.embedding.alignment_temperature is {self.alignment_temperature}, expected a positive number."
            )
        if self.alignment_weight < 0:
            raise ConfigError(f"distill.embedding.alignment_weight is {self.alignment_weight}, expected 0 or more.")
        if not 0 <= self.whitening <= 1:
            raise ConfigError(f"distill.embedding.whitening is {self.whitening}, expected 0 (none) to 1 (full).")
        if self.components is not None and self.components < 1:
            raise ConfigError(
                f"distill.embedding.components is {self.components}, expected at least 1, or null for all."
            )
        if not 0 <= self.id_dropout < 1:
            raise ConfigError(f"distill.embedding.id_dropout is {self.id_dropout}, expected 0 to below 1.")
        if self.id_dropout > 0 and self.fusion_sides != "both":
            raise ConfigError(
                f"distill.embedding.id_dropout is {self.id_dropout}, but `fusion_sides` is {self.fusion_sides!r}, so "
                "that items of the other side are their offset alone; use `fusion_sides=both`, or `id_dropout=0`."
            )
        if self.fusion == "frozen" and (self.components is None or not self.standardise or self.initialise != "none"):
            raise ConfigError(
                "distill.embedding.fusion is 'frozen', which needs the number of frozen columns (`components`), "
                f"`standardise=true` and `initialise=none`; got {self.components}, {self.standardise} and "
                f"{self.initialise!r}."
            )

    @property
    def reads(self) -> bool:
        """Whether the teacher's vectors are part of the item vectors of both sides."""
        return self.fusion_scale != 0 and self.fusion_sides == "both"

    @property
    def unties(self) -> bool:
        """Whether the student needs separate input and output item tables."""
        return self.fusion_sides != "both"


@dataclass
class DistillSettings:
    """Distillation recipe.

    Attributes:
        name: Name of the recipe.
        teacher_outputs: Folder of the teacher's outputs.
        task_loss: ``student``: the loss of `student.loss`, the same as the baseline's; ``cross_entropy`` over the
            catalogue; or ``sampled_bce`` (program): binary cross-entropy of the target and one sampled negative.
        dros: Robust losses.
        ranking: Ranking distillation.
        embedding: Embedding distillation.
    """

    name: str = "dllm2rec"
    teacher_outputs: str = "???"
    task_loss: str = "student"
    dros: DrosSettings = field(default_factory=DrosSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)

    IGNORED: ClassVar[tuple[Ignored, ...]] = (
        Ignored(("dros.beta", "dros.propensity_power", "dros.in_ranking"), "dros.weight", (0,)),
        Ignored(_OF_WEIGHTS, "ranking.loss", ("listwise", "ranknet", "margin")),
        Ignored(("ranking.temperature", "ranking.over"), "ranking.loss", ("weighted_bce", "ranknet", "margin")),
        Ignored(("ranking.margin",), "ranking.loss", ("weighted_bce", "listwise", "ranknet")),
        Ignored(
            tuple(f"embedding.alignment{part}" for part in ("", "_sides", "_temperature")),
            "embedding.alignment_weight",
            (0,),
        ),
        Ignored(("embedding.alignment_temperature",), "embedding.alignment", ("mse", "cosine")),
        Ignored(
            tuple(f"embedding.{name}" for name in ("fusion", "fusion_unit", "id_dropout")),
            "embedding.fusion_scale",
            (0,),
        ),
        Ignored(("embedding.fusion_unit",), "embedding.fusion", ("frozen",)),
        Ignored(("embedding.whitening", "embedding.components"), "embedding.standardise", (False,)),
    )

    def __post_init__(self) -> None:
        one_of("distill.task_loss", self.task_loss, "student", "cross_entropy", "sampled_bce")
        if self.ranking.loss != "weighted_bce" and self.dros.in_ranking != "none":
            raise ConfigError(
                f"distill.dros.in_ranking is {self.dros.in_ranking!r}, which requires "
                f"distill.ranking.loss=weighted_bce, but that is {self.ranking.loss!r}; leave `in_ranking` at 'none'."
            )

    @property
    def teaches(self) -> bool:
        """Whether any part of the recipe uses the teacher."""
        embedding = self.embedding
        vectors = embedding.fusion_scale != 0 or embedding.alignment_weight > 0 or embedding.initialise != "none"
        return self.ranking.weight > 0 or vectors

    @property
    def weighs_rows(self) -> bool:
        """Whether any loss uses the row weights of a selection policy."""
        return self.ranking.weight > 0 or self.embedding.alignment_weight > 0

    @property
    def needs_negatives(self) -> bool:
        """Whether any loss reads a sampled negative."""
        return self.task_loss == "sampled_bce" or (self.ranking.weight > 0 and self.ranking.negative != "none")

    @property
    def robust_ranking(self) -> bool:
        """Whether DROS is part of the ranking loss."""
        return self.ranking.weight > 0 and self.dros.weight > 0 and self.dros.in_ranking != "none"


@dataclass
class DLLM2RecCodeSettings(DistillSettings):
    """Schema of ``conf/distill/dllm2rec_code.yaml``: the released program's objective, its README's weights."""

    name: str = "dllm2rec_code"
    task_loss: str = "sampled_bce"
    dros: DrosSettings = field(default_factory=partial(DrosSettings, weight=0.5, in_ranking="broadcast"))
    ranking: RankingSettings = field(
        default_factory=partial(
            RankingSettings,
            weight=0.7,
            confidence="per_candidate",
            weight_floor=1e-8,
            renormalise=True,
            negative="one_minus_score",
        )
    )
    embedding: EmbeddingSettings = field(
        default_factory=partial(EmbeddingSettings, fusion_sides="input", standardise=False)
    )
