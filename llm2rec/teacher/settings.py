"""Teacher configuration (Hydra structured configs); `llm_settings` has that of the language model."""

from dataclasses import MISSING, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, ClassVar

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import derived_seed
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.teacher.heads import HEADS
from llm2rec.teacher.llm_settings import LLMSettings, PromptSettings, ShapeSettings, TinyRandomSettings

__all__ = [
    "AdapterSettings",
    "ExportSettings",
    "LLMSettings",
    "PromptSettings",
    "ShapeSettings",
    "TeacherSettings",
    "TinyRandomSettings",
    "TitleSettings",
    "is_hybrid",
]

PRECISIONS = ("auto", "float32", "bfloat16", "int8", "int4")
GATE_INPUTS = ("llm", "sequence")
OBJECTIVES = ("item", "title")
TUNINGS = ("ilora", "lora", "none")
PROMPTS = ("text", "hybrid")
RANKINGS = ("search", "grounding")
HIT_RULES = ("longest", "released")
CURRICULA = ("off", "linear", "linear_per_epoch", "two_stage")


@dataclass
class AdapterSettings:
    """The iLoRA adapter: arguments of `llm2rec.ilora.ILoraConfig`, which documents and checks them.

    Its types and defaults are repeated here (only ``dropout`` differs), because importing PEFT would double the start
    time of every command. A plain LoRA reads the fields in `LORA_OPTIONS`.
    """

    r: int = 16
    num_experts: int = 4
    alpha: float = 32
    dropout: float = 0.05
    scaling: str = "total"
    target_modules: Any = None
    exclude_modules: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    gate: str = "linear"
    gate_per_layer: bool = False
    gate_temperature: float = 1.0
    gate_top_k: int | None = None
    gate_hidden_size: int | None = None
    gate_noise: float | None = None
    gate_dropout: float | None = None

    DOCUMENTED_IN: ClassVar = ("ilora/config.py", "ILoraConfig")


LORA_OPTIONS = ("r", "alpha", "dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


@dataclass
class ExportSettings:
    """Export of the teacher outputs.

    Attributes:
        enabled: Whether outputs are exported; a teacher that is only evaluated needs none.
        top_k: Items per training row.
        block_rows: Rows per resumable block.
        batch_tokens: Tokens per forward pass, padding included.
        confidence: Kind of confidences: ``neg_log_prob``, ``log_prob`` or ``prob``. A teacher that ranks by grounding
            has no probabilities and accepts only ``neg_log_prob``: it exports distances (also lower is more confident)
            and records that in the manifest.
    """

    enabled: bool = True
    top_k: int = 20
    block_rows: int = 2048
    batch_tokens: int = 8192
    confidence: str = "neg_log_prob"

    def __post_init__(self) -> None:
        if self.confidence not in ("neg_log_prob", "log_prob", "prob"):
            raise ConfigError(
                f"teacher.export.confidence is {self.confidence!r}, expected neg_log_prob, log_prob or prob."
            )
        if min(self.top_k, self.block_rows, self.batch_tokens) < 1:
            raise ConfigError("teacher.export: top_k, block_rows and batch_tokens must be at least 1.")


@dataclass
class TitleSettings:
    """The `title` objective: the language model reads a history and candidates, and writes the next item's title.

    Attributes:
        n_candidates: Candidates in a prompt, including the answer; 0 for prompts without candidates. The paper has 20
            besides the answer, its program 19.
        redraw_candidates: Whether training draws new candidates in each epoch, as the program does; evaluation never.
        mean_log_prob: Whether candidates are compared by the mean log-probability per token instead of the sum.
        generation_beams: Beams of free generation; 1 is greedy.
        search_beams: Beams of the search over the catalogue's titles.
        ranking: How the whole catalogue is ranked: ``search`` (most probable titles) or ``grounding`` (BIGRec: the
            items with the vectors nearest to that of the generated title).
        hit_rule: Title matching rule, ``longest`` or ``released``; see `llm2rec.teacher.title.matching.judge`.
    """

    n_candidates: int = 20
    redraw_candidates: bool = False
    mean_log_prob: bool = False
    generation_beams: int = 1
    search_beams: int = 20
    ranking: str = "search"
    hit_rule: str = "longest"

    def __post_init__(self) -> None:
        if self.n_candidates == 1 or self.n_candidates < 0:
            raise ConfigError(f"teacher.title.n_candidates is {self.n_candidates}, expected 0 (none) or at least 2.")
        if min(self.generation_beams, self.search_beams) < 1:
            raise ConfigError("teacher.title: generation_beams and search_beams must be at least 1.")
        _check_choice("teacher.title.ranking", self.ranking, RANKINGS)
        _check_choice("teacher.title.hit_rule", self.hit_rule, HIT_RULES)


@dataclass
class TeacherSettings:
    """How the teacher is built and trained.

    Attributes:
        name: Name of the teacher in results and teacher outputs.
        objective: ``item``: next-item classification over the whole catalogue; ``title`` (the paper): writing the
            answer's title.
        tuning: How the language model is tuned: ``ilora``, one plain ``lora`` of the same rank, or ``none``.
        precision: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16``, ``int8`` or ``int4``
            (base weights quantised by bitsandbytes).
        gradient_checkpointing: Whether activations are recomputed in the backward pass: less memory, a third more
            time.
        logit_scale: Factor on the cosine between user and item vectors, an inverse temperature.
        exclude_history: Whether the items of a history are excluded from its ranking, in training too; None does as
            ``metrics.mask_seen``.
        popularity_prior: Weight of the log of an item's training frequency, added to its logit; not trained.
        head: How the `item` objective scores: by ``titles``, titles through a trained map (``projected``), titles and
            the recommender's item vectors (``joined``), or these and the recommender's own score (``residual``); see
            `llm2rec.teacher.heads`.
        residual_dropout: Probability that a training row is scored without the recommender's own score, so that the
            language model learns to rank on its own; for ``head=residual``.
        item_refresh_steps: Optimizer steps between recomputations of the title vectors with the adapter; 0 keeps those
            of the language model without adapter.
        train_rows: Training rows used, chosen by the seed; None uses all.
        validation_rows: Validation rows used for early stopping, chosen by the seed; None uses all.
        recommender_run: Folder of the run of a trained student, of ``llm2rec.student`` or ``llm2rec.distill`` on the
            same dataset; for ``gate_input=sequence``, ``prompts=hybrid`` and the heads ``joined`` and ``residual``.
        gate_input: Input of the gate: ``llm``, the pooled states of the language model without adapter; or ``sequence``
            (the paper), the user vector of the recommender.
        prompts: ``text``, or ``hybrid`` (the paper): each title is followed by the recommender's vector of the item,
            projected into the language model's input.
        curriculum: Optimizer steps of hybrid training that use the vectors: all (``off``), ``linear``ly more, the same
            begun anew in each epoch (``linear_per_epoch``), or the second half (``two_stage``); see `is_hybrid`.
        gate_learning_rate_ratio: Learning rate of the gate networks as a multiple of ``training.learning_rate``. Their
            inputs have unit length: at 1 gates stay near the even mixture, at 100 they collapse (see
            ``benchmarks/results/teacher_gates.json``).
        projector_learning_rate_ratio: The same for the projector of hybrid prompts.
        head_learning_rate_ratio: The same for the head's parameters.
        gate_weight_decay: Weight decay of the gate networks; None for ``training.weight_decay``.
        projector_weight_decay: Weight decay of the projector; None for ``training.weight_decay``.
        balance_loss: Weight of the load-balance loss, which evens out the use of the experts over a step's rows; 0 for
            none.
        adapter: The iLoRA adapter; a plain LoRA uses its rank, alpha, dropout and layers.
        title: The `title` objective.
        training: Epochs, batch size and learning rate.
        export: Export of the teacher outputs.
    """

    name: str = "ilora"
    objective: str = "item"
    tuning: str = "ilora"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    logit_scale: float = 20.0
    exclude_history: bool | None = None
    popularity_prior: float = 0.0
    head: str = "titles"
    residual_dropout: float = 0.0
    item_refresh_steps: int = 0
    train_rows: int | None = None
    validation_rows: int | None = None
    recommender_run: str | None = None
    gate_input: str = "llm"
    prompts: str = "text"
    curriculum: str = "off"
    gate_learning_rate_ratio: float = 10.0
    projector_learning_rate_ratio: float = 1.0
    head_learning_rate_ratio: float = 1.0
    gate_weight_decay: float | None = None
    projector_weight_decay: float | None = None
    balance_loss: float = 0.0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    title: TitleSettings = field(default_factory=TitleSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", OBJECTIVES),
            ("tuning", TUNINGS),
            ("precision", PRECISIONS),
            ("gate_input", GATE_INPUTS),
            ("prompts", PROMPTS),
            ("head", HEADS),
            ("curriculum", CURRICULA),
        ):
            _check_choice(f"teacher.{name}", getattr(self, name), choices)
        for name in ("train_rows", "validation_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"teacher.{name} is {value}, expected at least 1, or null for all rows.")
        for name in ("gate", "projector", "head"):
            ratio = getattr(self, f"{name}_learning_rate_ratio")
            if not 0 < ratio < float("inf"):
                raise ConfigError(
                    f"teacher.{name}_learning_rate_ratio is {ratio}, expected a positive finite number; 1 trains it at "
                    "the rate of the rest."
                )
        for name in ("balance_loss", "gate_weight_decay", "projector_weight_decay", "item_refresh_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"teacher.{name} is {value}, expected 0 (off) or a positive finite number.")
        if not 0 <= self.residual_dropout < 1:
            raise ConfigError(f"teacher.residual_dropout is {self.residual_dropout}, expected 0 to below 1.")
        self._check_recommender()
        self._check_confidence()
        _check_unread(self)

    @property
    def kind(self) -> dict[str, str]:
        """The choices that define a kind of teacher, for the manifest."""
        names = ("objective", "tuning", "prompts", "head")
        kind = {name: str(getattr(self, name)) for name in names}
        return kind | ({"ranking": self.title.ranking} if self.objective == "title" else {})

    @property
    def label(self) -> str:
        """Choices that differ from the defaults, for tables of results."""
        defaults = ("item", "ilora", "text", "titles", "search")
        changed = [value for value in self.kind.values() if value not in defaults and value != self.name]
        return "".join(f" {value}" for value in changed)

    def excluding(self, mask_seen: bool) -> "TeacherSettings":
        """The settings with `exclude_history` as ``mask_seen`` if it is None."""
        return self if self.exclude_history is not None else replace(self, exclude_history=mask_seen)

    def _check_recommender(self) -> None:
        readers = {
            "teacher.gate_input=sequence": self.gate_input == "sequence",
            "teacher.prompts=hybrid": self.prompts == "hybrid",
            f"teacher.head={self.head}": self.head in ("joined", "residual"),
        }
        reading = [name for name, reads in readers.items() if reads]
        if reading and not self.recommender_run:
            raise ConfigError(
                f"{' and '.join(reading)} need a trained student, and teacher.recommender_run is "
                f"{self.recommender_run!r}; add `teacher.recommender_run=result/result_...`."
            )
        if not reading and self.recommender_run is not None:
            raise ConfigError(
                f"teacher.recommender_run is {self.recommender_run!r} and nothing reads it; add "
                "`teacher.gate_input=sequence`, `teacher.prompts=hybrid` or `teacher.head=joined`, or leave it out."
            )

    def _check_confidence(self) -> None:
        if self.ranks_by_distance and self.export.confidence != "neg_log_prob":
            raise ConfigError(
                f"teacher.export.confidence is {self.export.confidence!r}, but teacher.title.ranking=grounding gives "
                "distances and no probabilities; use neg_log_prob, or teacher.title.ranking=search."
            )
        if self.objective == "title" and self.export.confidence == "prob":
            raise ConfigError(
                "teacher.export.confidence is 'prob', but the probability of a whole title can be too small for "
                "float32; use neg_log_prob or log_prob."
            )

    @property
    def ranks_by_distance(self) -> bool:
        """Whether the catalogue is ranked by distances to a generated title instead of log-probabilities."""
        return self.objective == "title" and self.title.ranking == "grounding"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def is_hybrid(curriculum: str, step: int, max_steps: int, seed: int, epoch_start: int = 0) -> bool:
    """Whether the batch of an optimizer step has injected vectors (LLaRA, arXiv 2312.02445, and iLoRA's program).

    A pure function of its arguments, so all processes and resumed runs agree.

    Args:
        curriculum: ``off`` (always hybrid), ``linear`` (with probability ``step / max_steps``), ``linear_per_epoch``
            (with probability ``(step - epoch_start) / max_steps``, at most 1 over the number of epochs, as in iLoRA's
            program, whose data loaders count anew in each epoch) or ``two_stage`` (text only in the first half of the
            steps).
        step: Global step, from 0.
        max_steps: Steps of the whole training.
        seed: Seed of the run.
        epoch_start: First step of the epoch; read by ``linear_per_epoch``.
    """
    if curriculum in ("linear", "linear_per_epoch"):
        done = step - epoch_start if curriculum == "linear_per_epoch" else step
        return derived_seed(seed, "curriculum", step) / 2**63 < done / max_steps
    return curriculum == "off" or 2 * step >= max_steps


_ADAPTER = tuple(each.name for each in fields(AdapterSettings))
_ONLY_ILORA = (
    *("gate_input", "gate_learning_rate_ratio", "gate_weight_decay", "balance_loss"),
    *(f"adapter.{name}" for name in _ADAPTER if name not in LORA_OPTIONS),
)
# (option, its values, options that are ignored while it has one of them)
_IGNORED: tuple[tuple[str, tuple[object, ...], tuple[str, ...]], ...] = (
    ("tuning", ("lora", "none"), _ONLY_ILORA),
    ("tuning", ("none",), ("item_refresh_steps", *(f"adapter.{name}" for name in _ADAPTER))),
    ("objective", ("title",), ("head", "logit_scale", "popularity_prior", "item_refresh_steps")),
    ("objective", ("item",), tuple(f"title.{each.name}" for each in fields(TitleSettings))),
    ("prompts", ("text",), ("curriculum", "projector_learning_rate_ratio", "projector_weight_decay")),
    ("head", ("titles",), ("head_learning_rate_ratio",)),
    ("head", ("titles", "projected", "joined"), ("residual_dropout",)),
    ("title.n_candidates", (0,), ("title.redraw_candidates", "title.hit_rule")),
    ("title.ranking", ("grounding",), ("title.search_beams",)),
)


def _check_unread(settings: TeacherSettings) -> None:
    """Reject options that the chosen teacher ignores, if they differ from their defaults.

    Raises:
        ConfigError: Naming all options that one choice ignores.
    """
    for option, values, names in _IGNORED:
        choice = attrgetter(option)(settings)
        changed = {name: value for name in names if (value := attrgetter(name)(settings)) != _default(settings, name)}
        if choice in values and changed:
            given = " and ".join(f"teacher.{name} is {value!r}" for name, value in changed.items())
            defaults = " and ".join(repr(_default(settings, name)) for name in changed)
            them = "it" if len(changed) == 1 else "them"
            raise ConfigError(
                f"{given}, which nothing reads while teacher.{option} is {choice!r}; leave {them} at {defaults}, or "
                f"change teacher.{option}."
            )


def _default(settings: TeacherSettings, name: str) -> Any:
    """Default of an option, which may be one of a nested settings object."""
    *parents, last = name.split(".")
    owner = attrgetter(".".join(parents))(settings) if parents else settings
    default = next(each for each in fields(owner) if each.name == last)
    return default.default if default.default_factory is MISSING else default.default_factory()
