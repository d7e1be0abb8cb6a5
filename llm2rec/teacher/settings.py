"""What the teacher can be told; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field
from typing import Any

from llm2rec.core.errors import ConfigError
from llm2rec.core.training import TrainingSettings

__all__ = [
    "AdapterSettings",
    "ExportSettings",
    "LLMSettings",
    "PromptSettings",
    "TeacherSettings",
    "TinyRandomSettings",
]

POOLINGS = ("last", "mean", "cls")
PRECISIONS = ("auto", "float32", "bfloat16", "int8", "int4")
GATE_INPUTS = ("llm", "sequence")
WORDINGS = ("plain", "domain")


@dataclass
class PromptSettings:
    """How a history becomes text: ``prefix``, the titles, ``suffix``.

    Attributes:
        prefix: Text before the titles; ``{domain}`` stands for the dataset's word for an item.
        separator: Text after each title.
        suffix: Text after the titles.
        max_items: Most recent items shown at most; None shows the whole history.
        max_tokens: Token budget; the oldest items are left out first, and no title is ever shown in part unless it is
            alone. A prompt of the title task leaves room for the longest answer besides, and never leaves out or cuts
            a candidate.
        wording: ``plain``: prefix and suffix. ``domain``: several wordings for the dataset's kind of item in their
            place, one chosen for each example by the seed and its history.
        max_title_tokens: Tokens of a title at most, without separator, wherever it is shown; a longer title is cut,
            behind a word where possible. None shows titles whole.
    """

    prefix: str = ""
    separator: str = ";"
    suffix: str = ""
    max_items: int | None = None
    max_tokens: int = 256
    wording: str = "plain"
    max_title_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise ConfigError(f"llm.prompt.wording is {self.wording!r}, expected one of {', '.join(WORDINGS)}.")
        if self.max_title_tokens is not None and self.max_title_tokens < 8:
            raise ConfigError(
                f"llm.prompt.max_title_tokens is {self.max_title_tokens}, expected at least 8 (a word and a number "
                "that tells equal titles apart), or null to show titles whole."
            )
        if self.max_tokens < 8 or (self.max_items is not None and self.max_items < 1):
            raise ConfigError(
                f"prompt: expected max_tokens >= 8 and max_items >= 1, got {self.max_tokens} and {self.max_items}."
            )


@dataclass
class LLMSettings:
    """A language model from a folder in Hugging Face's layout, or from the Hub.

    Attributes:
        name: Names the model in results and teacher outputs.
        path: Folder, or id on the Hub.
        pooling: Which hidden states represent a text: the ``last`` token's, the ``mean``, or the first's (``cls``).
        prompt: How a history becomes text.
        trust_remote_code: Whether code that comes with the model may run.
    """

    name: str = "???"
    path: str = "???"
    pooling: str = "last"
    prompt: PromptSettings = field(default_factory=PromptSettings)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"llm.pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}.")


@dataclass
class TinyRandomSettings(LLMSettings):
    """A small Llama with random weights and a tokenizer trained on the titles: offline, for trying the chain.

    Attributes:
        path: Where it is made; filled in by the stage.
        width: Hidden size.
        n_layers: Decoder layers.
        n_heads: Attention heads.
        vocabulary: Tokens at most.
        seed: Seed of the weights.
    """

    path: str = ""
    width: int = 64
    n_layers: int = 2
    n_heads: int = 4
    vocabulary: int = 2048
    seed: int = 0


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
        confidence: What the confidences are: ``neg_log_prob``, ``log_prob`` or ``prob``.
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
class TeacherSettings:
    """How the teacher is built and trained.

    Attributes:
        name: Names the teacher in results and teacher outputs.
        objective: ``item``: next-item classification over the whole catalogue.
        precision: ``auto`` (bfloat16 on a GPU, float32 on a CPU), ``float32``, ``bfloat16``, ``int8`` or ``int4``
            (base weights quantised by bitsandbytes).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        logit_scale: Factor on the cosine between user and item vectors, an inverse temperature.
        exclude_history: Whether the items of a history are out of the running for the next one.
        popularity_prior: Weight of the log of an item's training frequency, added to its logit; not trained.
        train_rows: Training rows used, chosen by the seed; None uses all.
        validation_rows: Validation rows used for early stopping, chosen by the seed; None uses all.
        gate_input: What the gate reads: ``llm``, what the language model without adapter makes of the prompt; or
            ``sequence`` (the paper), the user vector of a trained student.
        gate_run: Folder of that student's run, of ``llm2rec.student`` or ``llm2rec.distill`` on the same dataset.
        gate_learning_rate_ratio: Learning rate of the gate networks as a multiple of ``training.learning_rate``. Their
            inputs have unit length: at 1 gates hardly leave the even mixture, at 100 they collapse (see
            ``benchmarks/results/teacher_gates.json``).
        balance_loss: Weight of the load-balance loss, which evens out how much each expert is used over a step's rows;
            0 leaves it out.
        adapter: The iLoRA adapter.
        training: Length, batch and rate.
        export: What is written down.
    """

    name: str = "ilora"
    objective: str = "item"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    logit_scale: float = 20.0
    exclude_history: bool = True
    popularity_prior: float = 0.0
    train_rows: int | None = None
    validation_rows: int | None = None
    gate_input: str = "llm"
    gate_run: str | None = None
    gate_learning_rate_ratio: float = 10.0
    balance_loss: float = 0.0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    def __post_init__(self) -> None:
        if self.objective != "item":
            raise ConfigError(f"teacher.objective is {self.objective!r}; only 'item' is there so far.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"teacher.precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}.")
        for name in ("train_rows", "validation_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"teacher.{name} is {value}, expected at least 1, or null for all rows.")
        if self.gate_input not in GATE_INPUTS:
            raise ConfigError(f"teacher.gate_input is {self.gate_input!r}, expected one of {', '.join(GATE_INPUTS)}.")
        if self.gate_input == "sequence" and not self.gate_run:
            raise ConfigError(
                f"teacher.gate_input is 'sequence' and teacher.gate_run is {self.gate_run!r}, expected the run of the "
                "student whose user vectors the gate reads; add `teacher.gate_run=result/result_...`."
            )
        if self.gate_input != "sequence" and self.gate_run is not None:
            raise ConfigError(
                f"teacher.gate_run is {self.gate_run!r} and teacher.gate_input is {self.gate_input!r}, which reads no "
                "run; add `teacher.gate_input=sequence`, or leave `teacher.gate_run` out."
            )
        if not 0 < self.gate_learning_rate_ratio < float("inf"):
            raise ConfigError(
                f"teacher.gate_learning_rate_ratio is {self.gate_learning_rate_ratio}, expected a positive finite "
                "number; 1 trains the gate at the rate of the rest."
            )
        if not 0 <= self.balance_loss < float("inf"):
            raise ConfigError(
                f"teacher.balance_loss is {self.balance_loss}, expected 0 (off) or a positive finite weight."
            )
