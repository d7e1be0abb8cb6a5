"""Tiny models, and the per-expert loop that the layer must equal."""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm2rec.ilora import ILoraConfig, ILoraLinear

VOCABULARY, WIDTH, EXPERTS = 40, 16, 4
# Per model: adapted layers in its two blocks.
KINDS = {"llama": 14, "bert": 12, "gpt2": 8}
QUANTIZED = ("8bit", "4bit")
QUANTIZED_WIDTH = 64  # the CPU kernels of bitsandbytes want multiples of 32


def tiny(kind: str, seed: int = 0, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
                pad_token_id=0,
            )
        ).eval()
    if kind == "bert":
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
        return BertModel(config).eval()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, bos_token_id=1)
    ).eval()


def quantized(kind: str, device: str = "cpu") -> nn.Module:
    """A tiny Llama whose block layers hold quantised weights, as `load_in_8bit` and `load_in_4bit` leave it."""
    import bitsandbytes

    model = tiny("llama", width=QUANTIZED_WIDTH)
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            sizes = (layer.in_features, layer.out_features)
            if kind == "8bit":
                swapped = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            else:
                swapped = bitsandbytes.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            swapped.load_state_dict(layer.state_dict())
            model.model.layers.set_submodule(name, swapped.to(device))
    return model.to(device).eval()


def adapt(model: nn.Module, trained: bool = True, **options) -> PeftModel:
    """Add an adapter; `trained` gives B values, without which the adapter changes nothing."""
    adapted = get_peft_model(model, ILoraConfig(**{"r": 8, "num_experts": EXPERTS, **options}))
    if trained:
        train(adapted)
    return adapted.eval()


def train(model: PeftModel, adapter: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "ilora_" in name and f".{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data.copy_(noise)


def batch(rows: int = 3, length: int = 6, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gate_inputs(rows: int = 3, width: int = WIDTH, seed: int = 3) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, **inputs: Tensor) -> Tensor:
    result = model(**inputs)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def layers(model: nn.Module) -> list[ILoraLinear]:
    return [module for module in model.modules() if isinstance(module, ILoraLinear)]


class LoopOverExperts(nn.Module):
    """y = W x + s * sum_e g_e B_e A_e x, written as it reads; g has shape (B, E)."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, gates: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.down, self.up, self.gates, self.scale = base, down, up, gates, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        experts = self.gates.shape[1]
        rank = self.down.shape[0] // experts
        for expert in range(experts):
            own = slice(expert * rank, (expert + 1) * rank)
            gate = self.gates[:, expert].reshape(-1, *[1] * (x.ndim - 1))
            y = y + self.scale * gate * (x @ self.down[own].T @ self.up[:, own].T)
        return y
