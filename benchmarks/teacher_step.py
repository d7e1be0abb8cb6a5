"""One optimizer step of a Llama teacher with iLoRA, beside LoRA and beside the frozen model.

    .venv/bin/python benchmarks/teacher_step.py --json benchmarks/results/teacher_step.json

The model has random weights: Llama-2-7B's shape on a GPU, in bfloat16 and in 8 bits, a small one in float32 on a CPU. A
step is what the teacher's trainer does: pool the last token, score all items, cross-entropy, backward, clip, AdamW.
Adapters have one total rank and sit on all seven linear layers. All variants share the frozen weights and take turns:

    bare             no adapter: backward to the input embeddings, no optimizer. The floor.
    lora             PEFT's LoRA
    gate_cached      iLoRA, the gate's inputs read from a cache, as the trainer does
    gate_computed    iLoRA, the gate's inputs computed in the step by the frozen base: one more forward pass
    xlora            PEFT's X-LoRA layers, with iLoRA's gate and its cached inputs (on a CPU: what they keep for the
                     backward pass grows with the experts, and with a 7B model no GPU has room for it)
    per_expert       iLoRA as its authors' program has it, likewise
    matmul           a large product of matrices, for the rate that the machine reaches at that moment

The headline's times are medians of ratios taken round by round, for the first case (bfloat16 on a GPU, float32 on a
CPU) without gradient checkpointing. Operations are counted as 2 per weight and token forward and 2 backward (a frozen
weight has no gradient), and the causal half of attention. `budget` is what the shapes ask for: see `budget_bytes`.
"""

import argparse
import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import ilora_layer
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from llm2rec.core.train.optimizer import adamw
from llm2rec.ilora import DEFAULT_TARGET_MODULES, ILoraConfig, frozen_base
from llm2rec.ilora.gate import LinearGate
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.text_vectors import pool

RANK, EXPERTS = ilora_layer.RANK, ilora_layer.HEADLINE_EXPERTS
ALPHA = ilora_layer.SCALE * RANK
LOGIT_SCALE, MAX_NORM, N_ITEMS = 20.0, 1.0, 4000
TARGETS = DEFAULT_TARGET_MODULES["llama"]
GIB = 2**30
CONTEXT_GIB = 1.0  # what a process takes on a GPU besides its tensors: CUDA's context, the allocator's waste


def llama(width: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    """Configure a Llama; its vocabulary costs memory but no time."""
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000 if width >= 4096 else 1000,
    )


SIZES = {
    "quick": llama(256, 704, 4, 4),
    "cpu": llama(512, 1408, 8, 8),
    "cuda": llama(4096, 11008, 32, 32),  # Llama-2-7B
}
BATCHES = {"quick": (4, 64), "cpu": (8, 128), "cuda": (4, 512)}  # B, T


def main() -> None:
    """Measure every case and write the JSON file."""
    parser = harness.command_line(__doc__, rounds=12)
    parser.add_argument("--batch", type=int, help="rows of a micro-batch")
    parser.add_argument("--dropout", type=float, default=0.0, help="of both adapters; no part of the budget")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    size = "quick" if options.quick else options.device
    n_rows, length = BATCHES[size]
    cases = []
    for precision in ("bfloat16", "int8") if options.device == "cuda" else ("float32",):
        torch.manual_seed(0)
        base = frozen_llama(SIZES[size], precision, torch.device(options.device))
        batch = random_batch(base, options.batch or n_rows, length)
        cases += [measure(base, batch, precision, checkpointing, options) for checkpointing in (False, True)]
        del base
        gc.collect()  # models with adapters hold themselves, and a GPU has no room for the next beside them
    harness.write_result(options, headline(cases), cases)


@dataclass
class Batch:
    """Prompts of one length, their cached gate inputs, and the items to score."""

    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    gate_inputs: Tensor  # (B, d)
    items: Tensor  # (N, d), unit length
    targets: Tensor  # (B,)


def random_batch(base: LlamaModel, n_rows: int, length: int) -> Batch:
    """Draw a batch."""
    device, width = base.device, base.config.hidden_size
    items = nn.functional.normalize(torch.randn(N_ITEMS, width, device=device), dim=1)
    return Batch(
        ids=torch.randint(3, base.config.vocab_size, (n_rows, length), device=device),
        mask=torch.ones(n_rows, length, dtype=torch.int64, device=device),
        gate_inputs=items[:n_rows].clone(),
        items=items,
        targets=torch.randint(N_ITEMS, (n_rows,), device=device),
    )


def frozen_llama(config: LlamaConfig, precision: str, device: torch.device) -> LlamaModel:
    """Make a Llama with random weights, frozen; ``int8`` quantises its linear layers with bitsandbytes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        base = LlamaModel._from_config(config, dtype=dtype).requires_grad_(False)
    base.config.use_cache = False
    if precision == "int8":
        from bitsandbytes import nn as bnb  # no other precision needs it

        for name, linear in [each for each in base.named_modules() if isinstance(each[1], nn.Linear)]:
            layer = bnb.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta"
            )
            layer.weight = bnb.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
            base.set_submodule(name, layer.to(device))  # the move from the CPU is what quantises
        base.is_loaded_in_8bit = True  # PEFT asks
    return base


def measure(
    base: LlamaModel, batch: Batch, precision: str, checkpointing: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one case and count its memory."""
    device = base.device
    common = {"r": RANK, "target_modules": TARGETS}
    lora = adapted(base, LoraConfig(lora_alpha=ALPHA, lora_dropout=options.dropout, **common), checkpointing)
    ilora_config = ILoraConfig(num_experts=EXPERTS, alpha=ALPHA, dropout=options.dropout, **common)
    ilora = adapted(base, ilora_config, checkpointing)

    def cached() -> AbstractContextManager[object]:
        return ilora.base_model.use_gates(batch.gate_inputs)

    def computed() -> AbstractContextManager[object]:
        with frozen_base(ilora):
            vectors = represent(ilora, batch)
        return ilora.base_model.use_gates(vectors)

    steps = {
        "bare": bare_step(with_checkpointing(base, checkpointing), batch),
        "lora": training_step(lora, batch, nullcontext),
        "gate_cached": training_step(ilora, batch, cached),
        "gate_computed": training_step(ilora, batch, computed),
    }
    trained = {"lora": lora, "gate_cached": ilora, "gate_computed": ilora}
    if device.type == "cpu":
        lora_options = {"target_modules": ["linear"], "lora_dropout": options.dropout}
        others = {
            "xlora": lambda linear: ilora_layer.xlora_layer(linear, EXPERTS, lora_options),
            "per_expert": lambda linear: per_expert_layer(linear, options.dropout),
        }
        for name, make in others.items():
            trained[name], mixing = mixture_of(base, batch, checkpointing, make)
            steps[name] = training_step(trained[name], batch, mixing)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    side = 256 if options.quick else 2048 if device.type == "cpu" else 8192
    product, product_flops = harness.matmul(side, dtype, device)
    seconds = harness.seconds_by_round({**steps, "matmul": product}, 3 if options.quick else options.rounds)
    peaks = {name: harness.peak_bytes(step, device) for name, step in steps.items()}
    # Weights, adapter, Adam's two averages; gradients are freed by a step and so are part of its peak.
    held = {name: n_bytes(base) + (3 * trained_bytes(trained[name]) if name in trained else 0) for name in steps}
    flops, tokens = step_flops(base.config, batch), batch.ids.numel()
    case = {
        "precision": precision,
        "checkpointing": checkpointing,
        "width": base.config.hidden_size,
        "inner_width": base.config.intermediate_size,
        "layers": base.config.num_hidden_layers,
        "batch": list(batch.ids.shape),
        "rank": RANK,
        "experts": EXPERTS,
        "dropout": options.dropout,
        "time_vs_lora": {name: harness.spread(seconds[name], seconds["lora"]) for name in steps},
        "tokens_per_second": {name: harness.spread([tokens] * len(seconds[name]), seconds[name]) for name in steps},
        "share_of_matmul_rate": {
            name: harness.spread([second * flops / product_flops for second in seconds["matmul"]], seconds[name])
            for name in steps
        },
        "matmul_flops_per_second": harness.spread([product_flops] * len(seconds["matmul"]), seconds["matmul"]),
        "held_bytes": held,
        "peak_bytes": {name: held[name] + peaks[name] for name in steps},
        "step_bytes": peaks,
        "budget_bytes": budget_bytes(base, trained_bytes(ilora), batch, dtype, checkpointing),
        "seconds": seconds,
    }
    medians = {name: round(ratio["median"], 3) for name, ratio in case["time_vs_lora"].items()}
    print(f"{precision} checkpointing={checkpointing}: time vs lora {medians}", flush=True)
    return case


def adapted(base: LlamaModel, config: Any, checkpointing: bool) -> PeftModel:
    """Put an adapter on a copy of the model."""
    return get_peft_model(with_checkpointing(twin(base), checkpointing), config).train()


def twin(base: LlamaModel) -> LlamaModel:
    """Copy the model's containers; all that holds weights is shared with the original."""
    leaves = {id(module): module for module in base.modules() if not any(module.children())}
    return copy.deepcopy(base, leaves)


def mixture_of(
    base: LlamaModel, batch: Batch, checkpointing: bool, make: Callable[[nn.Linear], tuple[nn.Module, Any]]
) -> tuple[nn.Module, Callable[[], AbstractContextManager[object]]]:
    """Put other layers that mix experts by gates in the place of the linear ones; `ilora_layer` has them.

    Returns:
        The model, and the context in which its gates are there.
    """
    model, held = with_checkpointing(twin(base), checkpointing), list[Tensor]()
    for name, linear in [each for each in model.named_modules() if each[0].endswith(tuple(TARGETS))]:
        model.set_submodule(name, Mixing(*make(linear), held))
    model.gate = LinearGate(base.config.hidden_size, EXPERTS).to(base.device)

    @contextmanager
    def use_gates() -> Iterator[None]:
        held.append(model.gate(batch.gate_inputs))
        yield
        held.clear()

    return model, use_gates


class Mixing(nn.Module):
    """A layer that takes the gates from where they are held; ``forward`` maps input and gates to output."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor, Tensor], Tensor], held: list[Tensor]) -> None:
        super().__init__()
        self.module, self.function, self.held = module, function, held

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, in)`` to ``(B, T, out)``."""
        return self.function(x, self.held[0])


def per_expert_layer(linear: nn.Linear, dropout: float) -> tuple[nn.Module, Any]:
    """Make the layer with an output for every expert."""
    down, up = torch.randn(RANK, linear.in_features) / linear.in_features**0.5, torch.zeros(linear.out_features, RANK)
    layer = ilora_layer.PerExpert(linear, down, up, EXPERTS, dropout)
    return layer, layer


def with_checkpointing(base: LlamaModel, checkpointing: bool) -> LlamaModel:
    """Switch gradient checkpointing on or off."""
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.activation_checkpointing_disable()
    return base.train()


def represent(llm: nn.Module, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
    """User vectors ``(B, d)``, float32, unit length; in bfloat16 on a GPU, as the trainer has it."""
    prompt = {"input_ids": batch.ids} if embeddings is None else {"inputs_embeds": embeddings}
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
        hidden = llm(**prompt, attention_mask=batch.mask).last_hidden_state
    return nn.functional.normalize(pool(hidden, batch.mask, "last"), dim=1)


def loss_of(users: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy over all items."""
    return cross_entropy(LOGIT_SCALE * users @ batch.items.T, batch.targets).mean()


def training_step(llm: PeftModel, batch: Batch, mixing: Callable[[], AbstractContextManager[object]]) -> harness.Step:
    """Make the step of a model with an adapter."""
    optimizer = adamw(llm, lr=1e-4, weight_decay=0.01)
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]

    def step() -> None:
        with mixing():  # the gates must outlive the backward pass
            loss_of(represent(llm, batch), batch).backward()
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_step(base: LlamaModel, batch: Batch) -> harness.Step:
    """Make the step of the frozen model: what all variants have in common."""

    def step() -> None:
        embeddings = base.embed_tokens(batch.ids).detach().requires_grad_()
        loss_of(represent(base, batch, embeddings), batch).backward()

    return step


def step_flops(config: LlamaConfig, batch: Batch) -> float:
    """Floating-point operations that one step needs: those of the frozen model, without recomputation or adapter."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = width * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    n_rows, length = batch.ids.shape
    attention = layers * n_rows * 2 * length**2 * width  # scores and mixture, 2 T T d each, half of them masked
    return (2 + 2) * weights * n_rows * length + (1 + 2) * attention


def budget_bytes(
    base: LlamaModel, adapter_bytes: int, batch: Batch, dtype: torch.dtype, checkpointing: bool
) -> dict[str, int]:
    """Bytes that the shapes ask for: weights, adapter, and activations kept for the backward pass.

    A block keeps, for each token: the float32 inputs of its two norms and their outputs; queries, keys, values and the
    output of attention; and the MLP's gate before and after its activation, its other half, and their product. Nothing
    is kept twice, and no temporary is counted. With checkpointing, all blocks keep their input and one keeps the rest.
    """
    config, tokens, size = base.config, batch.ids.numel(), dtype.itemsize
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = width * config.num_key_value_heads // config.num_attention_heads
    block = tokens * (2 * 4 * width + size * (2 * width + 2 * width + 2 * keys + 4 * inner))
    activations = layers * tokens * width * size + block if checkpointing else layers * block
    parts = {"weights": n_bytes(base), "adapter_gradients_adam": 4 * adapter_bytes, "activations": activations}
    return {**parts, "total": sum(parts.values())}


def n_bytes(module: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def trained_bytes(module: nn.Module) -> int:
    """Bytes of the trained parameters."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def headline(cases: Iterable[dict[str, Any]]) -> dict[str, float | bool]:
    """Pick the numbers to quote: the first case, and on a GPU the memory of each."""
    cases = list(cases)
    first = cases[0]
    result = {
        "time_vs_lora_gate_cached": first["time_vs_lora"]["gate_cached"]["median"],
        "time_vs_lora_gate_computed": first["time_vs_lora"]["gate_computed"]["median"],
        "time_vs_lora_bare": first["time_vs_lora"]["bare"]["median"],
        "memory_vs_lora": first["step_bytes"]["gate_cached"] / first["step_bytes"]["lora"],
        "tokens_per_second": first["tokens_per_second"]["gate_cached"]["median"],
        "share_of_matmul_rate": first["share_of_matmul_rate"]["gate_cached"]["median"],
        "share_of_matmul_rate_bare": first["share_of_matmul_rate"]["bare"]["median"],
    }
    for other in {"xlora", "per_expert"} & first["seconds"].keys():
        seconds = first["seconds"]
        result[f"time_vs_{other}"] = harness.spread(seconds["gate_cached"], seconds[other])["median"]
        result[f"memory_vs_{other}"] = first["step_bytes"]["gate_cached"] / first["step_bytes"][other]
    for case in cases:
        label = case["precision"] + ("_checkpointing" if case["checkpointing"] else "")
        peak = case["peak_bytes"]["gate_cached"]
        result[f"peak_gib_{label}"] = peak / GIB
        result[f"peak_vs_budget_{label}"] = peak / case["budget_bytes"]["total"]
        result[f"tokens_per_second_{label}"] = case["tokens_per_second"]["gate_cached"]["median"]
        for precision, card in (("bfloat16", 40), ("int8", 24)):
            if case["precision"] == precision:
                result[f"fits_{card}_gb_{label}"] = peak / GIB + CONTEXT_GIB <= card
    return result


if __name__ == "__main__":
    main()
