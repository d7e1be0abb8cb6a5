"""Language model configuration (Hydra structured configs): the model, and how a history becomes text."""

from dataclasses import dataclass, field
from typing import ClassVar

from llm2rec.core.errors import ConfigError, Ignored

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
        max_items: Maximum number of most recent items shown; None for the whole history.
        max_tokens: Token budget. The oldest items are left out first, and a title is only cut if it does not fit
            alone. A prompt of the title objective also leaves room for the longest answer, and always shows all
            candidates in full.
        wording: ``plain``: prefix and suffix. ``domain``: several wordings for the dataset's kind of item instead, one
            chosen for each example by the seed and its history.
        max_title_tokens: Maximum tokens of a title, without separator; a longer title is cut, after a word if
            possible. None for no limit.
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
                f"llm.prompt.max_title_tokens is {self.max_title_tokens}, expected at least 8 (a word and the number "
                "of a repeated title), or null for no limit."
            )
        if self.max_tokens < 8 or (self.max_items is not None and self.max_items < 1):
            raise ConfigError(
                f"llm.prompt: expected max_tokens >= 8 and max_items >= 1, got {self.max_tokens} and {self.max_items}."
            )


@dataclass
class ShapeSettings:
    """Sizes of a model, named as in transformers' configurations; None for the default of the model's type.

    Attributes:
        model_type: Architecture, such as ``llama``.
        hidden_size: Width of hidden states.
        intermediate_size: Inner width of a layer's feed-forward part.
        num_hidden_layers: Layers.
        num_attention_heads: Attention heads.
        num_key_value_heads: Heads of keys and values, for grouped-query attention.
        head_dim: Width of a head, if it is not ``hidden_size / num_attention_heads``.
        vocab_size: Size of the vocabulary.
        max_position_embeddings: Maximum number of tokens of a text.
        tie_word_embeddings: Whether the language-model head shares the embedding table.
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
        name: Name of the model in results and teacher outputs.
        path: Folder, or id on the Hub.
        pooling: Hidden state that represents a text: the ``last`` token's, the ``mean``, or the first's (``cls``).
        prompt: How a history becomes text.
        trust_remote_code: Whether code that comes with the model may run.
        shape: The model's sizes, read only by `llm2rec.plan` if the model itself is not available.
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
    """A small Llama with random weights and a tokenizer trained on the titles: offline, for trying the pipeline.

    Attributes:
        path: Not an option; the stage creates the model.
        width: Hidden size.
        n_layers: Decoder layers.
        n_heads: Attention heads.
        vocabulary: Maximum size of the vocabulary.
        seed: Seed of the weights.
    """

    path: str = ""
    width: int = 64
    n_layers: int = 2
    n_heads: int = 4
    vocabulary: int = 2048
    seed: int = 0

    IGNORED: ClassVar[tuple[Ignored, ...]] = (Ignored(("path", "shape", "trust_remote_code")),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.n_layers, self.n_heads) < 1 or self.width % (2 * self.n_heads):
            raise ConfigError(
                f"llm: expected n_layers >= 1, n_heads >= 1 and a width divisible by 2 * n_heads, got {self.n_layers}, "
                f"{self.n_heads} and {self.width}."
            )
        if self.vocabulary < _SMALLEST_VOCABULARY or self.seed < 0:
            raise ConfigError(
                f"llm: expected vocabulary >= {_SMALLEST_VOCABULARY} (all bytes and three special tokens) and "
                f"seed >= 0, got {self.vocabulary} and {self.seed}."
            )
