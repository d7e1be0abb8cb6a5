"""Tiny random language models of many architectures, built from their configurations."""

from pathlib import Path
from typing import Any

import torch
from teacher_helpers import bpe_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_POSITIONS = 512
_USUAL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": _POSITIONS,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": _POSITIONS, "initializer_range": 0.3}
_FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
_OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16}
_MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_local_experts": 2}

_DEBERTA = _USUAL | {
    "max_position_embeddings": _POSITIONS + 2,
    "pad_token_id": 1,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
}

# Per case: type of model and what its configuration adds to, or has instead of, the usual sizes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders with plain attention
    **{
        kind: (kind, _USUAL)
        for kind in (
            "llama", "mistral", "gemma", "gemma2", "gemma3_text", "granite", "olmo", "olmo2", "qwen2", "qwen3",
            "smollm3", "stablelm", "phi", "phi3", "gpt_neox", "cohere", "cohere2", "starcoder2", "glm", "glm4",
            "helium", "nemotron", "persimmon", "ministral", "arcee", "exaone4", "modernbert-decoder", "diffllama",
        )
    },
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "codegen": ("codegen", _GPT2 | {"rotary_dim": 4, "n_head": 4}),
    "openai-gpt": ("openai-gpt", _GPT2),
    "opt": ("opt", _OPT | {"max_position_embeddings": _POSITIONS, "init_std": 0.3}),
    "xglm": (
        "xglm",
        {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": _POSITIONS},
    ),
    # mixtures of experts
    "mixtral": ("mixtral", _USUAL | _EXPERTS),
    "qwen3_moe": ("qwen3_moe", _USUAL | _EXPERTS),
    "gpt_oss": ("gpt_oss", _USUAL | _EXPERTS | {"sliding_window": 512}),
    "deepseek_v3": (
        "deepseek_v3",
        _USUAL
        | {
            "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "first_k_dense_replace": 1, "head_dim": 4,
        },
    ),
    # attention that masks or counts by row index
    "gpt_neo, short window": (
        "gpt_neo",
        {
            "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
            "window_size": 16, "max_position_embeddings": 4096, "initializer_range": 0.3,
        },
    ),
    "falcon": ("falcon", _FALCON | {"alibi": False, "new_decoder_architecture": False}),
    "falcon, alibi": ("falcon", _FALCON | {"alibi": True}),
    "bloom": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}),
    "mpt": ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": _POSITIONS}),
    "llama4_text": (
        "llama4_text",
        _USUAL | _EXPERTS | {"intermediate_size_mlp": 32, "interleave_moe_layer_step": 2, "attention_chunk_size": 512},
    ),
    # states instead of a cache of keys and values
    "mamba": ("mamba", _MAMBA),
    "mamba2": ("mamba2", _MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2}),
    "falcon_h1": (
        "falcon_h1",
        _USUAL | {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4},
    ),
    "lfm2": ("lfm2", _USUAL | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "recurrent_gemma": ("recurrent_gemma", _USUAL | {"lru_width": 16, "num_hidden_layers": 3}),
    "qwen3_next": (
        "qwen3_next",
        _USUAL
        | _EXPERTS
        | {
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
        },
    ),
    "rwkv": ("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 512}),
    # more than text
    "gemma3": ("gemma3", {"text_config": _USUAL, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    # encoders, and an encoder with a decoder
    **{
        kind: (kind, _USUAL | {"max_position_embeddings": _POSITIONS + 2, "pad_token_id": 1})
        for kind in ("bert", "roberta", "xlm-roberta", "camembert", "electra", "modernbert", "mpnet", "deberta-v2")
    },
    "deberta, relative": ("deberta", _DEBERTA),
    "deberta-v2, relative": ("deberta-v2", _DEBERTA),
    "deberta-v2, shared keys": ("deberta-v2", _DEBERTA | {"share_att_key": True}),  # as DeBERTa-v3
    "distilbert": (
        "distilbert", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": _POSITIONS},
    ),
    "albert": ("albert", _USUAL | {"embedding_size": 16}),
    "xlnet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}),
    "t5": ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
}  # fmt: skip


def tokenizer_of(titles: list[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE with tokens for beginning, end and padding."""
    tokenizer = bpe_tokenizer([f"{title};" for title in titles])
    tokenizer.eos_token = "<s>"
    return tokenizer


def make_architecture(case: str, folder: Path, titles: list[str]) -> Path:
    """The model of a case with random weights and a tokenizer, in Hugging Face's layout."""
    kind, sizes = ARCHITECTURES[case]
    tokenizer = tokenizer_of(titles)
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    if "text_config" in sizes:
        sizes = sizes | {"text_config": sizes["text_config"] | vocabulary, "image_token_index": len(tokenizer) - 1}
    else:
        sizes = vocabulary | sizes
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model_class = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    model = model_class.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
