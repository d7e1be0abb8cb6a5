"""Which language model, and how a history becomes text for it; Hydra schemas and plain values at once."""

from dataclasses import dataclass, field

from llm2rec.core.errors import ConfigError

__all__ = ["LLMSettings", "PromptSettings", "ShapeSettings", "TinyRandomSettings"]

POOLINGS = ("last", "mean", "cls")
WORDINGS = ("plain", "domain")
_SMALLEST_VOCABULARY = 259


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
class ShapeSettings:
    """A model's sizes, by the names of transformers' configurations; None takes the default of the model's type.

    Attributes:
        model_type: Architecture, such as ``llama``.
        hidden_size: Width of hidden states.
        intermediate_size: Inner width of a layer's feed-forward part.
        num_hidden_layers: Layers.
        num_attention_heads: Attention heads.
        num_key_value_heads: Heads of keys and values, where queries share them.
        head_dim: Width of a head, where it is not ``hidden_size / num_attention_heads``.
        vocab_size: Tokens known.
        max_position_embeddings: Longest text.
        tie_word_embeddings: Whether the language-model head is the table of embeddings.
    """

    model_type: str = "???"
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False


@dataclass
class LLMSettings:
    """A language model from a folder in Hugging Face's layout, or from the Hub.

    Attributes:
        name: Names the model in results and teacher outputs.
        path: Folder, or id on the Hub.
        pooling: Which hidden states represent a text: the ``last`` token's, the ``mean``, or the first's (``cls``).
        prompt: How a history becomes text.
        trust_remote_code: Whether code that comes with the model may run.
        shape: The model's sizes, for `llm2rec.plan` alone, which uses them where the model itself is not at hand.
    """

    name: str = "???"
    path: str = "???"
    pooling: str = "last"
    prompt: PromptSettings = field(default_factory=PromptSettings)
    trust_remote_code: bool = False
    shape: ShapeSettings | None = None

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.n_layers, self.n_heads) < 1 or self.width % (2 * self.n_heads):
            raise ConfigError(
                f"llm: expected n_layers >= 1 and n_heads >= 1, twice of which divides width, got {self.n_layers}, "
                f"{self.n_heads} and {self.width}."
            )
        if self.vocabulary < _SMALLEST_VOCABULARY or self.seed < 0:
            raise ConfigError(
                f"llm: expected vocabulary >= {_SMALLEST_VOCABULARY} (all bytes and three marks) and seed >= 0, got "
                f"{self.vocabulary} and {self.seed}."
            )
