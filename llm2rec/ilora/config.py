"""Configuration of iLoRA: what a user chooses, checked before any layer is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig

__all__ = ["DEFAULT_TARGET_MODULES", "PEFT_TYPE", "GateKind", "ILoraConfig", "Scaling"]

PEFT_TYPE = "ILORA"
"""Name of the method in ``adapter_config.json`` and in PEFT's tables."""

GateKind = Literal["linear"]
Scaling = Literal["total", "per_expert"]

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# "output.dense" also ends the name of the attention's projection; both are spelt out to read as what they are.
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
    # transformers flattens (B, T, d) to (B*T, d) in front of OPT's fc1 and fc2: a row there is a token, no instance.
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
        layers_pattern: Name of the list that holds the blocks, where it cannot be told from the layer's name.
        modules_to_save: Further modules to train in full and to save with the adapter.
        bias: Only ``"none"``: the biases of the base stay frozen.
        gate: Kind of gate network. ``"linear"``: ``softmax(W z)``.
        gate_input_size: Width d of the gate's input ``z``; None takes the hidden size of the model.

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
    bias: Literal["none"] = field(default="none", metadata={"help": "Biases of the base stay frozen."})
    gate: GateKind = field(default="linear", metadata={"help": "Kind of gate network."})
    gate_input_size: int | None = field(default=None, metadata={"help": "Width of the gate's input."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        # A set is what PEFT matches against; a list is what a JSON file gives back.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if problems := [*self._number_problems(), *self._choice_problems()]:
            raise ValueError("ILoraConfig cannot work: " + " ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON takes them, names of layers sorted, so that the same adapter saves the same file."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    @property
    def rank_per_expert(self) -> int:
        """Rank r' = R / E of one expert."""
        return self.r // self.num_experts

    @property
    def scale(self) -> float:
        """Factor s on the mixture of the experts."""
        return self.alpha / (self.r if self.scaling == "total" else self.rank_per_expert)

    def _number_problems(self) -> list[str]:
        problems = []
        counts = {"r": self.r, "num_experts": self.num_experts}
        if self.gate_input_size is not None:
            counts["gate_input_size"] = self.gate_input_size
        for name, value in counts.items():
            if not _is_count(value):
                problems.append(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if _is_count(self.r) and _is_count(self.num_experts) and self.r % self.num_experts:
            nearest = self.num_experts * -(-self.r // self.num_experts)
            problems.append(
                f"`r` is the total rank and must be a multiple of `num_experts`, got r={self.r} with "
                f"{self.num_experts} experts; use r={nearest}."
            )
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < float("inf"):
            problems.append(f"`alpha` must be a positive finite number, got {self.alpha!r}.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            problems.append(f"`dropout` must be in [0, 1), got {self.dropout!r}.")
        return problems

    def _choice_problems(self) -> list[str]:
        problems = []
        for name, value, choices in (
            ("scaling", self.scaling, get_args(Scaling)),
            ("gate", self.gate, get_args(GateKind)),
            ("bias", self.bias, ("none",)),
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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
