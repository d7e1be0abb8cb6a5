"""What a language model can read: checks that would otherwise fail in mid-run."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.llm import readable
from llm2rec.teacher.settings import PromptSettings

__all__ = ["check_hidden_states", "check_positions", "check_vocabulary"]


def check_positions(base: PreTrainedModel, prompt: PromptSettings) -> None:
    """Raise if texts may be longer than the model's position table, whose look-up would fail in mid-run."""
    config = base.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT
    if n_positions is None or n_positions < 1:  # XLNet: -1 for any length
        return
    # RoBERTa and its relatives number positions from the padding token on, and the table holds the numbers before too.
    tables = (each for name, each in base.named_modules() if name.endswith("position_embeddings"))
    unused = max((each.padding_idx + 1 for each in tables if getattr(each, "padding_idx", None) is not None), default=0)
    if prompt.max_tokens > n_positions - unused:
        raise ConfigError(
            f"`llm.prompt.max_tokens` is {prompt.max_tokens} but the model has {n_positions - unused} positions; use "
            f"at most {n_positions - unused}."
        )


def check_vocabulary(base: PreTrainedModel, largest: int, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Raise if the ``largest`` token has no row in the embedding, whose look-up would crash in mid-run."""
    n_rows = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if n_rows is not None and largest >= n_rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"the tokenizer of {source!r} gives token {largest} ({token!r}), but the model's embedding has {n_rows} "
            "rows; they do not belong together. Fetch both from one source, or give the model the missing rows: "
            "`model.resize_token_embeddings(len(tokenizer))`, then `model.save_pretrained`."
        )


@torch.no_grad()
def check_hidden_states(base: PreTrainedModel, source: str, reader: str) -> None:
    """Raise unless the model turns tokens, and nothing else, into a hidden state each; ``reader`` needs them."""
    problem = f"{reader} needs a model that gives a hidden state for each token, and {source!r} does not"
    remedy = "Use a decoder or an encoder, not a model that is both, such as `llm=llama2_7b` or `llm=minilm`."
    embeddings = base.get_input_embeddings()
    device = cast(Tensor, embeddings.weight).device
    n_tokens = getattr(embeddings, "num_embeddings", 5)  # a tiny vocabulary may have fewer than the ids below
    ids = (torch.arange(1, 5, device=device) % n_tokens)[None]
    with readable(ConfigError, problem, remedy):
        states = base(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    if states.shape[:2] != ids.shape:
        raise ConfigError(f"{problem} (of {ids.shape[1]} tokens it gives {tuple(states.shape)}). {remedy}")
