"""What the teacher can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field
from typing import Any

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.teacher.curriculum import CURRICULA
from llm2rec.teacher.heads import HEADS
from llm2rec.teacher.llm_settings import LLMSettings, PromptSettings, ShapeSettings, TinyRandomSettings
from llm2rec.teacher.unread import check_unread

__all__ = [
    "AdapterSettings",
    "ExportSettings",
    "LLMSettings",
    "PromptSettings",
    "ShapeSettings",
    "TeacherSettings",
    "TinyRandomSettings",
    "TitleSettings",
]

PRECISIONS = ("auto", "float32", "bfloat16", "int8", "int4")
GATE_INPUTS = ("llm", "sequence")
OBJECTIVES = ("item", "title")
TUNINGS = ("ilora", "lora", "none")
PROMPTS = ("text", "hybrid")
RANKINGS = ("search", "grounding")
HIT_RULES = ("longest", "released")


@dataclass
class AdapterSettings:
    """The iLoRA adapter: fields of `llm2rec.ilora.ILoraConfig` by the same names, all of them handed to it.

    Attributes:
        r: Total rank over all experts.
        num_experts: Experts, E.
        alpha: Numerator of the scale.
        dropout: Dropout on the adapter's input. A base with dropout of its own (BERT and its kin) has it on in training
            besides, as everywhere in PEFT.
        scaling: ``total`` (alpha/R, the paper) or ``per_expert`` (alpha/(R/E), the released program).
        target_modules: Names of the layers to adapt, or a regular expression over their full names (to choose blocks
            as well); None takes the defaults for the model's type.
        exclude_modules: Names of layers to leave alone.
        rank_pattern: Total rank of layers that differ from ``r``, by name.
        alpha_pattern: The same for ``alpha``.
        gate: Kind of gate network: ``linear`` (the paper), ``mlp``, ``topk``, ``topk_released``, ``noisy``,
            ``dropout`` or ``conv``.
        gate_per_layer: Whether every adapted layer has a gate network of its own.
        gate_temperature: Divides the gate's logits.
        gate_top_k: Experts kept by the top-k gates; as with the next three, None takes the kind's own default, and a
            value is refused where the kind does not read it.
        gate_hidden_size: Inner width of ``mlp``.
        gate_noise: Standard deviation of the noise of ``noisy``.
        gate_dropout: Probability of dropping a logit of ``dropout``.
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


@dataclass
class ExportSettings:
    """What the teacher writes down.

    Attributes:
        enabled: Whether anything is written down; a teacher that is only to be compared needs no outputs.
        top_k: Items per training row.
        block_rows: Rows per resumable block.
        batch_tokens: Tokens per forward pass, padding included.
        confidence: What the confidences are: ``neg_log_prob``, ``log_prob`` or ``prob``. A teacher that ranks by
            grounding has no probabilities: it writes distances, which the manifest says, under ``neg_log_prob``, where
            lower means surer as well, and refuses the others.
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
    """The `title` objective: the language model reads a history and some candidates, and writes the answer's title.

    Attributes:
        n_candidates: Candidates in a prompt, the answer among them; 0 asks without candidates. The paper has 20
            besides the answer, its program 19.
        redraw_candidates: Whether each epoch of training draws new candidates, as the program does; evaluation never.
        mean_log_prob: Whether candidates are compared by the mean log-probability of a token instead of the sum.
        generation_beams: Beams of free generation; 1 is greedy.
        search_beams: Beams of the search over the catalogue's titles.
        ranking: How the whole catalogue is ranked: ``search`` (the likeliest titles) or ``grounding`` (BIGRec: the
            items whose vectors lie nearest to that of the generated title).
        hit_rule: When a generated text names a candidate: ``longest`` or ``released``, see
            `llm2rec.teacher.title.matching`.
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
        name: Names the teacher in results and teacher outputs.
        objective: ``item``: next-item classification over the whole catalogue; ``title`` (the paper): writing the
            answer's title.
        tuning: What is trained of the language model: ``ilora``, one plain ``lora`` of the same rank, or ``none``.
        precision: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16``, ``int8`` or ``int4``
            (base weights quantised by bitsandbytes).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logit_scale: Factor on the cosine between user and item vectors, an inverse temperature.
        exclude_history: Whether the items of a history are out of the running for the next one.
        popularity_prior: Weight of the log of an item's training frequency, added to its logit; not trained.
        head: How the `item` objective scores: by ``titles``, titles through a trained map (``projected``), titles and
            the recommender's item vectors (``joined``), or these and the recommender's own score (``residual``); see
            `llm2rec.teacher.heads`.
        residual_dropout: Chance that a training row is scored without the recommender's own score, so that the language
            model learns to rank by itself; for ``head=residual``.
        item_refresh_steps: Optimizer steps after which titles are read anew by the language model in training; 0 keeps
            what it made of them without adapter.
        train_rows: Training rows used, chosen by the seed; None uses all.
        validation_rows: Validation rows used for early stopping, chosen by the seed; None uses all.
        recommender_run: Folder of the run of a trained student, of ``llm2rec.student`` or ``llm2rec.distill`` on the
            same dataset; for ``gate_input=sequence``, ``prompts=hybrid`` and the heads ``joined`` and ``residual``.
        gate_input: What the gate reads: ``llm``, what the language model without adapter makes of the prompt; or
            ``sequence`` (the paper), the user vector of the recommender.
        prompts: ``text``, or ``hybrid`` (the paper): each title is followed by the recommender's vector of the item,
            projected into the language model's input.
        curriculum: Which optimizer steps of hybrid training show the vectors: all (``off``), ``linear``ly more, or the
            second half (``two_stage``); see `llm2rec.teacher.curriculum`.
        gate_learning_rate_ratio: Learning rate of the gate networks as a multiple of ``training.learning_rate``. Their
            inputs have unit length: at 1 gates hardly leave the even mixture, at 100 they collapse (see
            ``benchmarks/results/teacher_gates.json``).
        projector_learning_rate_ratio: The same for the projector of hybrid prompts.
        head_learning_rate_ratio: The same for what the head trains.
        gate_weight_decay: Weight decay of the gate networks; None for that of the rest.
        projector_weight_decay: Weight decay of the projector; None for that of the rest.
        balance_loss: Weight of the load-balance loss, which evens out how much each expert is used over a step's rows;
            0 leaves it out.
        adapter: The iLoRA adapter; a plain LoRA takes its rank, alpha, dropout and layers.
        title: The `title` objective.
        training: Length, batch and rate.
        export: What is written down.
    """

    name: str = "ilora"
    objective: str = "item"
    tuning: str = "ilora"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    logit_scale: float = 20.0
    exclude_history: bool = True
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
        check_unread(self)

    @property
    def kind(self) -> dict[str, str]:
        """What kind of teacher it is, for a manifest to tell it from others of the same name."""
        names = ("objective", "tuning", "prompts", "head")
        kind = {name: str(getattr(self, name)) for name in names}
        return kind | ({"ranking": self.title.ranking} if self.objective == "title" else {})

    @property
    def label(self) -> str:
        """What is not as usual, for a table to tell it from others of the same name."""
        usual = ("item", "ilora", "text", "titles", "search")
        unusual = [value for value in self.kind.values() if value not in usual and value != self.name]
        return "".join(f" {value}" for value in unusual)

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
                "distances and no probabilities; leave it out, or set teacher.title.ranking=search."
            )
        if self.objective == "title" and self.export.confidence == "prob":
            raise ConfigError(
                "teacher.export.confidence is 'prob', but the probability of a whole title can be too small for "
                "float32; take neg_log_prob or log_prob."
            )

    @property
    def ranks_by_distance(self) -> bool:
        """Whether the catalogue is ranked by distances to a generated title, instead of by log-probabilities."""
        return self.objective == "title" and self.title.ranking == "grounding"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")
