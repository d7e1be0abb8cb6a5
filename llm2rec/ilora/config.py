"""Configuration of an iLoRA adapter, checked before any layer is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

__all__ = ["DEFAULT_TARGET_MODULES", "PEFT_TYPE", "Bias", "GateKind", "ILoraConfig", "Scaling", "hidden_size"]


class _PeftType(str, Enum):  # noqa: UP042  PEFT reads the name off the `str` of such a class, and a StrEnum has another
    """A string for look-ups and JSON, with the ``.value`` that PEFT's messages read."""

    ILORA = "ILORA"


PEFT_TYPE = _PeftType.ILORA
"""Name of the method in ``adapter_config.json`` and in PEFT's tables."""

Scaling = Literal["total", "per_expert"]
Bias = Literal["none", "all", "ilora_only"]
GateKind = Literal[
    "linear",
    "mlp",
    "topk",
    "topk_released",
    "noisy",
    "dropout",
    "conv",
]
"""Kinds of gate network; `llm2rec.ilora.gate.GATES` has the class of each."""

_GATE_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {"gate_hidden_size": 128},
    "topk": {"gate_top_k": 2},
    "topk_released": {"gate_top_k": 1},
    "noisy": {"gate_noise": 0.1},
    "dropout": {"gate_dropout": 0.1},
}
"""Options that only some kinds of gate read, with their defaults: the released program's values, except for `topk`,
which cannot learn from a single expert."""

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# "output.dense" also matches the attention's projection; both are listed for clarity.
_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

DEFAULT_TARGET_MODULES: dict[str, list[str]] = {
    **{
        model_type: _LLAMA
        for model_type in (
            "llama", "mistral", "ministral", "gemma", "gemma2", "gemma3_text", "granite", "olmo", "olmo2", "qwen2",
            "qwen3", "smollm3", "stablelm",
        )
    },
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("bloom", "gpt_neox"), _NEOX),
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    "mpnet": ["q", "k", "v", "o", "intermediate.dense", "output.dense"],
    # transformers flattens (B, T, d) to (B*T, d) before OPT's fc1 and fc2: a row there is a token, not an instance.
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}  # fmt: skip
"""Layers adapted when ``target_modules`` is not given, by ``config.model_type``: every linear layer of the blocks.

The released program of the paper adapts all seven of Llama; the others follow the same rule.
"""


@dataclass
class ILoraConfig(PeftConfig):
    """Configuration of an iLoRA adapter (instance-wise LoRA, arXiv 2408.10159).

    Each adapted layer computes ``y = W x + s * sum_e g_e B_e A_e x``: a LoRA of total rank R cut into E experts, mixed
    by gates ``g`` that belong to the instance (the row of the batch).

    Args:
        r: Total rank R over all experts of a layer; a multiple of ``num_experts``.
        num_experts: Experts E. The paper finds 4 best of 1, 2, 4, 8.
        alpha: Numerator of the scale s.
        dropout: Probability of dropping an element of the adapter's input, in [0, 1).
        scaling: ``"total"`` for s = alpha / R (the paper) or ``"per_expert"`` for s = alpha / (R / E) (the released
            program, E times larger).
        target_modules: Names of layers to adapt (a layer matches when its name equals or ends with one), a regular
            expression over the whole name, or ``"all-linear"``. None takes the default of the model's type.
        exclude_modules: Names or regular expression of layers to leave alone.
        layers_to_transform: Index or indices of the blocks to adapt; None for all. Needs ``target_modules`` as a list.
        layers_pattern: Name of the list that holds the blocks, if the layer's name does not show it.
        modules_to_save: Further modules to train in full and to save with the adapter.
        bias: Which biases of the base are trained and saved too: ``"none"``, ``"all"``, or ``"ilora_only"``, those of
            the adapted layers. With trained biases the base is no longer frozen: disabling the adapter does not
            restore it, and `frozen_base` raises.
        rank_pattern: Total rank of layers that differ from ``r``, by name or regular expression, as in PEFT's LoRA;
            multiples of ``num_experts``.
        alpha_pattern: The same for ``alpha``.
        gate: Kind of gate network on the gate's input z.

            - ``"linear"`` (the paper): ``softmax(W z)``.
            - ``"mlp"``: two layers with a GELU between them.
            - ``"topk"``: the k largest of the linear gate, divided by their sum; the others are 0.
            - ``"topk_released"``: what the released program does for top-k, a second softmax over the k largest
              probabilities. With its k = 1 the gate is 1 and never learns.
            - ``"noisy"``: linear, with noise on the logits in training.
            - ``"dropout"``: linear, with dropout on the logits in training.
            - ``"conv"``: the released program's router, a 1-D residual network with batch normalisation. The only one
              in which a row's gate depends on the other rows of its batch (in training).
        gate_input_size: Width d of the gate's input z; None takes the hidden size of the model.
        gate_per_layer: Whether every adapted layer has a gate network of its own (kept in the layer); False shares one.
        gate_temperature: Divides the logits; above 1 evens the mixture out, below 1 sharpens it.
        gate_top_k: Experts kept, k, of the two top-k gates (2 for ``"topk"``, 1 for ``"topk_released"``).
        gate_hidden_size: Width between the layers of ``"mlp"`` (128).
        gate_noise: Standard deviation of the noise of ``"noisy"`` (.1).
        gate_dropout: Probability of dropping a logit of ``"dropout"`` (.1).

    Raises:
        ValueError: If a value is out of its range, or two values contradict each other. The message names them all.
    """

    r: int = field(default=16, metadata={"help": "Total rank over all experts of a layer."})
    num_experts: int = field(default=4, metadata={"help": "Number of experts."})
    alpha: float = field(default=32, metadata={"help": "Numerator of the scale."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    scaling: Scaling = field(default="total", metadata={"help": "'total': alpha/R; 'per_expert': alpha/(R/E)."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Layers to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Layers to leave."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved."})
    bias: Bias = field(default="none", metadata={"help": "Which biases of the base are trained too."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks of layers, by name."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Alphas of layers, by name."})
    gate: GateKind = field(default="linear", metadata={"help": "Kind of gate network."})
    gate_input_size: int | None = field(default=None, metadata={"help": "Width of the gate's input."})
    gate_per_layer: bool = field(default=False, metadata={"help": "One gate network per layer instead of one."})
    gate_temperature: float = field(default=1.0, metadata={"help": "Divides the gate's logits."})
    gate_top_k: int | None = field(default=None, metadata={"help": "Experts kept by the top-k gates."})
    gate_hidden_size: int | None = field(default=None, metadata={"help": "Inner width of the mlp gate."})
    gate_noise: float | None = field(default=None, metadata={"help": "Noise on the logits of the noisy gate."})
    gate_dropout: float | None = field(default=None, metadata={"help": "Dropout on the logits of the dropout gate."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # A set is what PEFT matches against; a list is what a JSON file gives back.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if problems := [*self._number_problems(), *self._choice_problems(), *self._gate_problems()]:
            raise ValueError("ILoraConfig cannot work: " + " ".join(problems))
        # Defaults are filled in: the saved adapter keeps its values if a later version changes them.
        for name, default in _GATE_OPTIONS.get(self.gate, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, min(default, self.num_experts) if name == "gate_top_k" else default)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, with layer names sorted: equal adapters save equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def rank_of(self, layer: str) -> int:
        """Total rank R of a layer, by its full name."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), layer), self.r)

    def scale_of(self, layer: str) -> float:
        """Factor s on the mixture of the experts of a layer, by its full name."""
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), layer), self.alpha)
        rank = self.rank_of(layer)
        return alpha / (rank if self.scaling == "total" else rank // self.num_experts)

    @property
    def gate_options(self) -> dict[str, Any]:
        """Options of the chosen kind of gate, by the names of its constructor's arguments."""
        options = _GATE_OPTIONS.get(self.gate, {})
        return {option.removeprefix("gate_"): getattr(self, option) for option in options}

    def unmatched_patterns(self, layers: Sequence[str]) -> list[str]:
        """Entries of ``rank_pattern`` and ``alpha_pattern`` that match none of these full names."""
        return [
            f"{name}[{pattern!r}]"
            for name in ("rank_pattern", "alpha_pattern")
            for pattern in getattr(self, name)
            if not any(get_pattern_key([pattern], layer) == pattern for layer in layers)
        ]

    def _number_problems(self) -> list[str]:
        problems = []
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                return [f"`{name}` must be a dictionary from names of layers to numbers, got {getattr(self, name)!r}."]
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        counts = {"num_experts": self.num_experts, "gate_input_size": self.gate_input_size}
        for name, value in {**ranks, **counts}.items():
            if not _is_count(value) and not (name == "gate_input_size" and value is None):
                problems.append(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        for name, rank in ranks.items():
            if _is_count(rank) and _is_count(self.num_experts) and rank % self.num_experts:
                nearest = self.num_experts * -(-rank // self.num_experts)
                problems.append(
                    f"`{name}` is the total rank and must be a multiple of `num_experts`, got {name}={rank} with "
                    f"{self.num_experts} experts; use {name}={nearest}."
                )
        positive = {"alpha": self.alpha, "gate_temperature": self.gate_temperature}
        positive |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, number in positive.items():
            if not _is_number(number) or not 0 < number < float("inf"):
                problems.append(f"`{name}` must be a positive finite number, got {number!r}.")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout!r}.")
        return problems

    def _gate_problems(self) -> list[str]:
        problems = []
        for option in ("gate_top_k", "gate_hidden_size", "gate_noise", "gate_dropout"):
            readers = [kind for kind, options in _GATE_OPTIONS.items() if option in options]
            if getattr(self, option) is not None and self.gate not in readers:
                problems.append(
                    f"`{option}` is only read by gate={' or '.join(map(repr, readers))}, not by {self.gate!r}; leave "
                    "it out or choose that gate."
                )
        if self.gate_hidden_size is not None and not _is_count(self.gate_hidden_size):
            problems.append(f"`gate_hidden_size` must be a whole number of at least 1, got {self.gate_hidden_size!r}.")
        if self.gate_noise is not None and not (_is_number(self.gate_noise) and 0 <= self.gate_noise < float("inf")):
            problems.append(f"`gate_noise` must be a finite number of at least 0, got {self.gate_noise!r}.")
        if self.gate_dropout is not None and not (_is_number(self.gate_dropout) and 0 <= self.gate_dropout < 1):
            problems.append(f"`gate_dropout` must be in [0, 1), got {self.gate_dropout!r}.")
        if self.gate_top_k is not None and _is_count(self.num_experts):
            if not _is_count(self.gate_top_k) or self.gate_top_k > self.num_experts:
                problems.append(
                    f"`gate_top_k` must be a whole number from 1 to `num_experts` ({self.num_experts}), got "
                    f"{self.gate_top_k!r}."
                )
            elif self.gate == "topk" and self.gate_top_k == 1 < self.num_experts:
                problems.append(
                    "`gate_top_k` is 1: one kept expert always gets the gate 1, so the gate has no gradient and stays "
                    "random; use 2 or more."
                )
        return problems

    def _choice_problems(self) -> list[str]:
        problems = []
        blocks = self.layers_to_transform
        for name, kind, fits in (
            ("gate_per_layer", "True or False", isinstance(self.gate_per_layer, bool)),
            ("modules_to_save", "a list of names", not isinstance(self.modules_to_save, str)),
            ("layers_to_transform", "a number or a list of numbers", not isinstance(blocks, str)),
        ):
            if not fits:
                problems.append(f"`{name}` must be {kind}, got {getattr(self, name)!r}.")
        for name, value, choices in (
            ("scaling", self.scaling, get_args(Scaling)),
            ("gate", self.gate, get_args(GateKind)),
            ("bias", self.bias, get_args(Bias)),
        ):
            if value not in choices:
                problems.append(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append(
                f"`layers_to_transform` works with a list of `target_modules`, got the string {self.target_modules!r}; "
                "write the block numbers into the regular expression or give a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append(
                f"`layers_pattern` ({self.layers_pattern!r}) is only read with `layers_to_transform`; set both or none."
            )
        return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def hidden_size(model: nn.Module) -> int:
    """Hidden size of a model by its configuration.

    Raises:
        ValueError: If there is none.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"`gate_input_size` is None and {type(model).__name__} has no `config.hidden_size`; set it to the width "
            "of the vectors passed to `use_gates` or `gate`."
        )
    return size
