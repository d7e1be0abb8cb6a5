"""torch.compile takes the adapted model whole, once, and reads the gates held now."""

import shutil

import pytest
import torch
from ilora_helpers import VOCABULARY, WIDTH, adapt, gate_inputs, tiny
from torch import nn
from torch._dynamo.utils import counters

from llm2rec.ilora import frozen_base, segments_of

ROWS, LENGTH = 3, 8
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(kind, checkpointing=False, **options):
    model = adapt(tiny(kind), task_type="CAUSAL_LM", **options)
    for module in model.modules():  # inductor draws dropout of its own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # transformers asks for gradients of the embeddings for re-entrant checkpointing, inside the graph, which
        # torch.compile refuses for any model.
        base.disable_input_require_grads()
    return model.train()


def inputs(seed=0, rows=ROWS, positions=None):
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "use_cache": False} | ({} if positions is None else {"position_ids": positions})


def step(model, forward, gate_input, batch, segments=None):
    """Logits and gradients of one training step whose gates are held around ``forward``."""
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    with model.base_model.use_gates(gate_input, segments=segments):
        logits = forward(**batch).logits
        logits.sin().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("llama", {}, id="linear layers"),
        pytest.param("gpt2", {"gate_per_layer": True}, id="Conv1D layers, a gate per layer"),
        pytest.param("llama", {"gate_per_layer": True}, id="linear layers, a gate per layer", marks=slow),
        pytest.param("gpt2", {}, id="Conv1D layers", marks=slow),
        pytest.param("llama", {"dropout": 0.2}, id="dropout", marks=slow),
        pytest.param("llama", {"checkpointing": True, "dropout": 0.2}, id="checkpointed dropout", marks=slow),
        pytest.param("gpt2", {"checkpointing": True, "gate_per_layer": True}, id="checkpointed Conv1D", marks=slow),
    ],
)
def test_one_graph_equals_eager_and_serves_other_gates(kind, options):
    model = trained(kind, **options)
    batches = [(gate_inputs(seed=seed), inputs(seed)) for seed in range(3)]
    expected = [step(model, model, *batch) for batch in batches]
    assert not torch.allclose(expected[0][0], step(model, model, batches[1][0], batches[0][1])[0], rtol=1e-2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # outside `hold`, once
    torch.testing.assert_close(step(model, compiled, *batches[0]), expected[0])
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, result in zip(batches[1:], expected[1:], strict=True):
            torch.testing.assert_close(step(model, compiled, *batch), result)


@slow
def test_packed_rows_compile_too():
    model = trained("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 0, 1, 2, 3]])
    runs = [
        (gate_inputs(5, seed=seed), inputs(seed, rows=2, positions=where), segments_of(where))
        for seed, where in enumerate((positions, positions.flip(0)))
    ]
    expected = [step(model, model, *run) for run in runs]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, compiled, *runs[0]), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(step(model, compiled, *runs[1]), expected[1])


@slow
def test_a_step_that_first_asks_the_frozen_base_compiles_two_graphs_and_no_more():
    """The gate's input may come from the same compiled model, adapters off."""
    model = trained("llama")

    def whole_step(forward, seed):
        with frozen_base(model):
            h_seq = forward(**inputs(seed), output_hidden_states=True).hidden_states[-1].mean(dim=1)
        assert h_seq.shape == (ROWS, WIDTH)
        return step(model, forward, h_seq, inputs(seed))

    expected = [whole_step(model, seed) for seed in range(3)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole_step(compiled, 0), expected[0])
    assert counters["stats"]["unique_graphs"] == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            torch.testing.assert_close(whole_step(compiled, seed), expected[seed])


@slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inductor_equals_eager(kind):
    model = trained(kind, gate_per_layer=kind == "gpt2")
    batches = [(gate_inputs(seed=seed), inputs(seed)) for seed in range(2)]
    expected = [step(model, model, *batch) for batch in batches]
    compiled = torch.compile(model, fullgraph=True)
    # float32 sums in another order
    torch.testing.assert_close(step(model, compiled, *batches[0]), expected[0], rtol=1e-3, atol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(step(model, compiled, *batches[1]), expected[1], rtol=1e-3, atol=1e-3)
