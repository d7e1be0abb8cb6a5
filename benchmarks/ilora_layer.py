"""The linear layers of a block with iLoRA, forward and backward, beside LoRA, X-LoRA and a product per expert.

    .venv/bin/python benchmarks/ilora_layer.py --threads 1 --json benchmarks/results/ilora_layer.json

All variants hold the same weights, the same total rank and the same gates, run in turn in one process, and are checked
to give the same output before they are timed. A step is the forward pass and the gradients of the input, of both
factors and of the gates (all experts of X-LoRA are trained).

    bare        the frozen layer alone
    lora        PEFT's LoRA
    ilora       this library's layer
    xlora       PEFT's X-LoRA: one LoRA per expert, gates for every token
    per_expert  iLoRA as its authors' program has it: an output per expert, multiplied by the gates, summed

Layers are those of all-MiniLM-L6-v2 on a CPU (float32), of Llama-2-7B on a GPU (bfloat16). Each kind is timed by itself
and counts as often as a block has it; the headline's times are ratios of whole blocks taken round by round, and its
memory is that of the worst layer, both for 4 experts, the paper's best. Memory is the peak of a step beyond what was
there before it, with the input there and the output not. `..._e16_vs_e2` is the peak with 16 experts divided by that
with 2. How much a product per expert costs beside the frozen layer depends on the layer's width: `samples` has each.
"""

import argparse
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import harness  # first of all: it silences the profiler, which reads its settings once
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from llm2rec.ilora import ILoraConfig

RANK, SCALE, HEADLINE_EXPERTS = 16, 2.0, 4
Forward = Callable[[Tensor, Tensor], Tensor]  # input (B, T, in) and gates (B, E) to output (B, T, out)


def main() -> None:
    """Measure every case and write the JSON file."""
    options = harness.command_line(__doc__, rounds=20).parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [measure(*case, options) for case in plan(options)]
    harness.write_result(options, headline(cases), cases)


def plan(options: argparse.Namespace) -> Iterable[tuple[tuple[int, int], int, tuple[int, int], int, float]]:
    """List the cases: size (in, out) of a layer, how many of it a block has, (B, T) of the batch, experts, dropout."""
    if options.device == "cpu":  # all-MiniLM-L6-v2: queries, keys, values and output; feed-forward up and down
        sizes, batch, experts = {(384, 384): 4, (384, 1536): 1, (1536, 384): 1}, (32, 80), [2, 4, 8, 16]
    else:  # Llama-2-7B: the same four; gate and up; down
        sizes, batch, experts = {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}, (4, 512), [2, 4, 8, 16]
    if options.quick:
        batch, experts = (8, batch[1]), [2, 4, 16]
    for size, count in sizes.items():
        yield from ((size, count, batch, number, 0.0) for number in experts)
        yield size, count, batch, HEADLINE_EXPERTS, 0.05


def measure(
    size: tuple[int, int],
    count: int,
    batch: tuple[int, int],
    experts: int,
    dropout: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time one case and count its memory."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = nn.Linear(*size, bias=False).to(device)
    trained, forwards = variants(base, experts, dropout)
    x = torch.randn(*batch, size[0], device=device, requires_grad=True)
    gates = torch.rand(batch[0], experts, device=device).softmax(dim=1).requires_grad_()
    if dropout == 0.0:
        check_equal(forwards, x, gates)
    x, gates = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, gates))
    grad = torch.randn(*batch, size[1], device=device, dtype=dtype)
    for module in (base, *trained.values()):
        module.to(dtype)
    if dropout:  # the same random numbers cost the other variants more, once per expert
        forwards = {name: forwards[name] for name in ("lora", "ilora")}

    def step(name: str) -> harness.Step:
        wanted = [x, *trained[name].parameters(), *([] if name in ("bare", "lora") else [gates])]
        return lambda: torch.autograd.grad(forwards[name](x, gates), [t for t in wanted if t.requires_grad], grad)

    steps = {name: step(name) for name in forwards}
    constants = [base.weight, *(weight for module in trained.values() for weight in module.parameters())]
    seconds = harness.seconds_by_round(steps, 5 if options.quick else options.rounds)
    case = {
        "in": size[0],
        "out": size[1],
        "in_a_block": count,
        "batch": batch,
        "experts": experts,
        "rank": RANK,
        "dropout": dropout,
        "dtype": str(dtype).removeprefix("torch."),
        "time_of_ilora_vs": {name: harness.spread(seconds["ilora"], seconds[name]) for name in steps},
        "peak_bytes": {name: harness.peak_bytes(each, device) for name, each in steps.items()},
        "saved_bytes": {
            name: harness.saved_bytes(lambda forward=forward: forward(x, gates), constants)
            for name, forward in forwards.items()
        },
        "seconds": seconds,
    }
    medians = {name: round(ratio["median"], 3) for name, ratio in case["time_of_ilora_vs"].items()}
    print(f"{size} E={experts} dropout={dropout}: time of ilora vs {medians}", flush=True)
    return case


def variants(base: nn.Linear, experts: int, dropout: float) -> tuple[dict[str, nn.Module], dict[str, Forward]]:
    """Build the variants on one frozen layer.

    Returns:
        By name: the module that holds the trained weights, and the function from input and gates to output.
    """
    common = {"target_modules": ["linear"]}
    ilora_options = {**common, "dropout": dropout, "gate_input_size": base.in_features}
    lora_options = {**common, "lora_dropout": dropout}
    ilora = adapted(base, ILoraConfig(r=RANK, num_experts=experts, alpha=SCALE * RANK, **ilora_options))
    lora = adapted(base, LoraConfig(r=RANK, lora_alpha=SCALE * RANK, **lora_options))
    xlora, xlora_forward = xlora_layer(base, experts, lora_options)
    layer, lora_layer = ilora.base_model.model.linear, lora.base_model.model.linear
    down, up = layer.ilora_A["default"].weight, layer.ilora_B["default"].weight  # (R, in), (out, R)
    nn.init.normal_(up, std=0.1)
    oracle = PerExpert(base, down, up, experts, dropout)
    with torch.no_grad():
        lora_layer.lora_A["default"].weight.copy_(down)
        lora_layer.lora_B["default"].weight.copy_(up)
        for expert, (part, columns) in enumerate(zip(down.chunk(experts), up.chunk(experts, dim=1), strict=True)):
            xlora.lora_A[str(expert)].weight.copy_(part)
            xlora.lora_B[str(expert)].weight.copy_(columns)

    def ilora_forward(x: Tensor, gates: Tensor) -> Tensor:
        with ilora.base_model.hold(gates):
            return layer(x)  # a layer without checkpointing needs its gates no longer than this

    modules = {"bare": nn.Module(), "lora": lora_layer, "ilora": layer, "xlora": xlora, "per_expert": oracle}
    forwards = {
        "bare": lambda x, gates: base(x),
        "lora": lambda x, gates: lora_layer(x),
        "ilora": ilora_forward,
        "xlora": xlora_forward,
        "per_expert": oracle,
    }
    return modules, forwards


def adapted(base: nn.Linear, config: Any, **options: Any) -> nn.Module:
    """Put an adapter on a model that is nothing but the layer; the adapter has the layer's dtype."""
    return get_peft_model(nn.ModuleDict({"linear": base}), config, autocast_adapter_dtype=False, **options)


def xlora_layer(base: nn.Linear, experts: int, options: dict[str, Any]) -> tuple[nn.Module, Forward]:
    """Build PEFT's X-LoRA layer: it takes the forward pass of a LoRA layer with one adapter for each expert."""
    config = LoraConfig(r=RANK // experts, lora_alpha=SCALE * RANK / experts, **options)
    names = [str(expert) for expert in range(experts)]
    model = adapted(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    lora = model.base_model.model.linear
    xlora = XLoraLinearLayer(
        model=SimpleNamespace(disabled=False),
        target=lora,
        target_forward=lora.forward,
        layer_number=0,
        config=XLoraConfig(hidden_size=base.in_features, adapters={}),
    )

    def forward(x: Tensor, gates: Tensor) -> Tensor:
        scalings = gates[:, None, None, :].expand(-1, x.shape[1], 1, -1)  # (B, T, layers, E)
        return xlora.forward(x, scalings=scalings)

    return lora, forward


class PerExpert(nn.Module):
    """iLoRA with an output for every expert, ``(B, T, E, out)``: the oracle of the layer that needs none."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, experts: int, dropout: float) -> None:
        super().__init__()
        self.frozen = [base]  # in a list, so that its weight is none of this module's parameters
        self.down = nn.Parameter(down.detach().clone())  # (R, in)
        self.up = nn.Parameter(up.detach().T.reshape(experts, -1, up.shape[0]).clone())  # (E, R / E, out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        """Map ``(B, T, in)`` and gates ``(B, E)`` to ``(B, T, out)``."""
        hidden = nn.functional.linear(self.dropout(x), self.down).unflatten(-1, self.up.shape[:2])  # (B, T, E, R / E)
        outputs = torch.einsum("bter,ero->bteo", hidden, self.up)
        return self.frozen[0](x) + SCALE * (outputs * gates[:, None, :, None]).sum(dim=2)


@torch.no_grad()
def check_equal(forwards: dict[str, Forward], x: Tensor, gates: Tensor, tolerance: float = 1e-5) -> None:
    """Refuse to compare the cost of things that differ; LoRA is what iLoRA is with every gate at 1."""
    ours, plain = forwards["ilora"](x, gates), forwards["ilora"](x, torch.ones_like(gates))
    expected = {"xlora": ours, "per_expert": ours, "lora": plain}
    for name, output in expected.items():
        error = (forwards[name](x, gates) - output).abs().max() / output.abs().max()
        if not error <= tolerance:
            raise SystemExit(f"{name} differs from iLoRA by {error:.1e} of the largest output; allowed: {tolerance}.")


def headline(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Combine the layers as the text at the top says."""
    plain = [case for case in cases if not case["dropout"]]
    four = [case for case in plain if case["experts"] == HEADLINE_EXPERTS]
    dropout = [case for case in cases if case["dropout"]]

    def time(cases: list[dict[str, Any]], other: str) -> float:
        return harness.spread(block_seconds(cases, "ilora"), block_seconds(cases, other))["median"]

    def memory(cases: list[dict[str, Any]], kind: str, other: str) -> float:
        return max(case[kind]["ilora"] / case[kind][other] for case in cases)

    def growth(name: str) -> float:
        peaks = {(case["in"], case["out"], case["experts"]): case["peak_bytes"][name] for case in plain}
        return max(peaks[*size, 16] / peaks[*size, 2] for *size, experts in peaks if experts == 16)

    return {
        "time_vs_lora": time(four, "lora"),
        "memory_vs_lora": memory(four, "peak_bytes", "lora"),
        "speedup_vs_per_expert": 1 / time(four, "per_expert"),
        "time_vs_bare": time(four, "bare"),
        "time_vs_xlora": time(four, "xlora"),
        "saved_vs_lora": memory(four, "saved_bytes", "lora"),
        "memory_vs_xlora": memory(four, "peak_bytes", "xlora"),
        "memory_vs_per_expert": memory(four, "peak_bytes", "per_expert"),
        "memory_e16_vs_e2": growth("ilora"),
        "xlora_memory_e16_vs_e2": growth("xlora"),
        "per_expert_memory_e16_vs_e2": growth("per_expert"),
        "dropout_time_vs_lora": time(dropout, "lora"),
        "dropout_memory_vs_lora": memory(dropout, "peak_bytes", "lora"),
        "dropout_saved_vs_lora": memory(dropout, "saved_bytes", "lora"),
    }


def block_seconds(cases: list[dict[str, Any]], name: str) -> list[float]:
    """Seconds of all layers of a block, round by round."""
    return [
        sum(case["in_a_block"] * seconds for case, seconds in zip(cases, of_round, strict=True))
        for of_round in zip(*(case["seconds"][name] for case in cases), strict=True)
    ]


if __name__ == "__main__":
    main()
