"""What only a GPU can show: its dtypes, its quantised kernels, its compiler, its memory, and two devices at once."""

import pytest
import torch
from ilora_helpers import EXPERTS, QUANTIZED, VOCABULARY, LoopOverExperts, adapt, gate_inputs, layers, quantized, tiny
from torch import nn

from llm2rec.ilora import segments_of

DEVICE = "cuda"
ROWS, LENGTH, WIDTH = 4, 8, 64  # WIDTH is also that of `quantized`

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def batch(seed=0, rows=ROWS):
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids.to(DEVICE), "use_cache": False}


def gate_input(seed=0, rows=ROWS):
    return gate_inputs(rows, WIDTH, seed).to(DEVICE)


def step(model, forward, seed=0):
    """Logits and gradients of one training step; gates held around ``forward``, which is the model or wraps it."""
    model.zero_grad()
    inputs = batch(seed)
    with model.base_model.use_gates(gate_input(seed)):
        result = forward(**inputs, labels=inputs["input_ids"])
        result.loss.backward()
    return result.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def direction(gradients):
    """All gradients as one vector of length 1."""
    return nn.functional.normalize(torch.cat([each.float().flatten() for each in gradients.values()]), dim=0)


# ---- number formats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("gate_per_layer", [False, True], ids=["shared", "per_layer"])
def test_a_bfloat16_step_is_close_to_a_float32_step(gate_per_layer, autocast):
    # A small alpha: strong random adapters sharpen attention until it answers to rounding.
    options = {"gate_per_layer": gate_per_layer, "alpha": 2}
    reference = adapt(tiny("llama", width=WIDTH).to(DEVICE), **options).train()
    base = tiny("llama", width=WIDTH).to(DEVICE)
    model = adapt(base if autocast else base.bfloat16(), **options).train()
    expected, expected_gradients = step(reference, reference)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        logits, gradients = step(model, model)
    assert logits.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    # bfloat16 keeps 8 bits: one product is off by 0.4 %, two blocks of them by a few times that.
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()
    assert direction(gradients) @ direction(expected_gradients) > 0.99
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "ilora_" in name}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_layer_equals_the_loop_over_experts(kind):
    pytest.importorskip("bitsandbytes")
    model = adapt(quantized(kind, DEVICE))
    layer = layers(model)[0]
    assert not layer.base_layer.weight.dtype.is_floating_point
    down, up = layer.ilora_A["default"].weight, layer.ilora_B["default"].weight
    assert down.device.type == up.device.type == DEVICE
    gates = torch.rand(ROWS, EXPERTS, device=DEVICE, requires_grad=True)
    # 8 bits: bitsandbytes computes in float16 whatever it is given
    x = torch.randn(ROWS, LENGTH, WIDTH, device=DEVICE, dtype=torch.float16 if kind == "8bit" else torch.float32)
    x.requires_grad_()
    loop = LoopOverExperts(layer.base_layer, down.to(x.dtype), up.to(x.dtype), gates, layer.layouts["default"].scale)
    expected = loop(x)
    expected_gradients = torch.autograd.grad(expected.float().sin().sum(), (x, down, up, gates))
    with model.base_model.hold(gates):
        result = layer(x)
        gradients = torch.autograd.grad(result.float().sin().sum(), (x, down, up, gates))
    for found, wanted in zip((result, *gradients), (expected, *expected_gradients), strict=True):
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_model_learns_and_moves_adapter_and_gate_alone(kind):
    pytest.importorskip("bitsandbytes")
    model = adapt(quantized(kind, DEVICE)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        with model.base_model.use_gates(gate_input()):
            loss = model(**batch(), labels=batch()["input_ids"]).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "ilora_" in name}


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_equals_eager_and_serves_other_gates(mode):
    """``reduce-overhead`` records CUDA graphs: gates must be inputs of the graph, not addresses in it."""
    torch.compiler.reset()
    model = adapt(tiny("llama", width=WIDTH).to(DEVICE), task_type="CAUSAL_LM").train()
    expected = [step(model, model, seed) for seed in range(4)]
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    torch.testing.assert_close(step(model, compiled), expected[0], rtol=1e-3, atol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed, wanted in enumerate(expected):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(step(model, compiled, seed), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("times", [1, 2])
def test_a_static_cache_generates_what_a_growing_one_does(times):
    """With a static cache `generate` compiles its step and records a CUDA graph of it."""
    torch.compiler.reset()
    model = adapt(tiny("llama", width=WIDTH).to(DEVICE), task_type="CAUSAL_LM")
    ids = batch()["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    options |= {"do_sample": True, "top_k": 1, "num_return_sequences": times}  # "sampling" from the best token alone
    for seed in (0, 1):
        with model.base_model.use_gates(gate_input(seed)):
            expected = model.generate(ids, **options)
            assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


# ---- memory and devices ----------------------------------------------------------------------------------------------


def test_peak_memory_does_not_grow_with_the_number_of_experts():
    def peak(n_experts):
        model = adapt(tiny("llama", width=256).to(DEVICE), r=64, num_experts=n_experts).train()
        ids = torch.randint(3, VOCABULARY, (16, 32), device=DEVICE)
        gates = torch.full((16, n_experts), 1 / n_experts, device=DEVICE)
        for _ in range(2):  # the first run also takes the libraries' own memory
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with model.base_model.hold(gates):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            used = torch.cuda.max_memory_allocated() - before
            model.zero_grad()
        return used

    one, many = peak(1), peak(64)
    activation = 16 * 32 * 64 * 4  # of rank R, once, in float32: what a term per expert would add 63 times over
    assert one > 10 * activation
    assert many < one + activation


@pytest.mark.parametrize("gate_per_layer", [False, True], ids=["shared", "per_layer"])
def test_gate_inputs_from_the_cpu_give_the_same_step(gate_per_layer):
    model = adapt(tiny("llama", width=WIDTH).to(DEVICE), gate_per_layer=gate_per_layer).train()
    expected = step(model, model)
    model.zero_grad()
    with model.base_model.use_gates(gate_input().cpu()) as gates:
        assert gates.device.type == DEVICE
        result = model(**batch(), labels=batch()["input_ids"])
        result.loss.backward()
    torch.testing.assert_close(result.logits.detach(), expected[0])
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected[1])


@pytest.mark.parametrize("packed", [False, True])
def test_gates_and_segments_may_lie_on_another_device_than_the_model(packed):
    model = adapt(tiny("llama", width=WIDTH).to(DEVICE))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).repeat(ROWS, 1)
    inputs = batch() | ({"position_ids": positions.to(DEVICE)} if packed else {})
    places = [(gates, segments) for gates in ("cpu", DEVICE) for segments in ("cpu", DEVICE)]
    found = []
    for gates_at, segments_at in places:
        n_instances = 2 * ROWS if packed else ROWS
        gates = torch.softmax(gate_inputs(n_instances, EXPERTS), dim=1).to(gates_at).requires_grad_()
        segments = segments_of(positions).to(segments_at) if packed else None
        with model.base_model.hold(gates, segments=segments):
            logits = model(**inputs).logits
            logits.sin().sum().backward()
        assert gates.grad.device.type == torch.device(gates_at).type
        found.append((logits.detach(), gates.grad.cpu()))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
