"""Text is generated with the gates of each prompt, however often generation repeats it."""

import pytest
import torch
from ilora_helpers import VOCABULARY, adapt, gate_inputs, layers, tiny
from torch._dynamo.utils import counters
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList

from llm2rec.ilora import GateError

ROWS, LENGTH, NEW = 3, 6, 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2"])
every_gate = pytest.mark.parametrize("gate_per_layer", [False, True], ids=["shared", "per_layer"])


def causal(kind, task_type="CAUSAL_LM", **options):
    # float64: beams that nearly tie must not swap because rows were added up in another order
    model = adapt(tiny(kind).double(), task_type=task_type, **options)
    for layer in layers(model):
        layer.double()  # sharp mixtures, so that text depends on the gates
        for up in layer.ilora_B.values():
            up.weight.data *= 3
    return model


def prompts(rows=ROWS, length=LENGTH):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gates_of(model, rows=ROWS):
    return model.base_model.gate(10 * gate_inputs(rows)).detach()


def text(model, gates, inputs, seed=0, **options):
    """New tokens, shape (rows, NEW)."""
    torch.manual_seed(seed)
    with model.base_model.hold(gates):
        ids = model.generate(**inputs, **{**GREEDY, **options})
    return ids[:, inputs["input_ids"].shape[1] :]


# ---- repeated prompts ------------------------------------------------------------------------------------------------


@every_kind
@every_gate
@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_equals_row_by_row_and_gates_repeated_by_hand(kind, gate_per_layer, beams):
    model, by_hand = (causal(kind, task, gate_per_layer=gate_per_layer) for task in ("CAUSAL_LM", None))
    inputs, gates = prompts(), gates_of(model)
    together = text(model, gates, inputs, num_beams=beams)
    rows = [
        text(
            model, gates[row : row + 1], {name: value[row : row + 1] for name, value in inputs.items()}, num_beams=beams
        )
        for row in range(ROWS)
    ]
    assert together.shape == (ROWS, NEW)
    assert torch.equal(together, torch.cat(rows))
    repeated = gates.repeat_interleave(beams, dim=0)
    assert torch.equal(together, text(by_hand, repeated, inputs, num_beams=beams))
    assert torch.equal(together, text(model, repeated, inputs, num_beams=beams))
    assert not torch.equal(together, text(model, gates.flip(0), inputs, num_beams=beams)), "gates change nothing here"


@every_kind
@every_gate
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 3},
    ],
    ids=["sampling", "beam_sampling", "beams"],
)
def test_several_returned_sequences_equal_those_of_gates_repeated_by_hand(kind, gate_per_layer, options):
    model, by_hand = (causal(kind, task, gate_per_layer=gate_per_layer) for task in ("CAUSAL_LM", None))
    inputs, gates = prompts(), gates_of(model)
    together = text(model, gates, inputs, **options)
    assert together.shape == (ROWS * options["num_return_sequences"], NEW)
    assert len(together.unique(dim=0)) > ROWS, "the sequences of a prompt are all the same: the test shows nothing"
    times = max(options.get("num_beams", 1), options["num_return_sequences"])
    assert torch.equal(together, text(by_hand, gates.repeat_interleave(times, dim=0), inputs, **options))
    assert not torch.equal(together, text(by_hand, gates.repeat(times, *[1] * (gates.ndim - 1)), inputs, **options))


@pytest.mark.parametrize("given", ["inputs", "inputs_embeds", "position"])
def test_prompts_are_counted_however_they_are_given(given):
    model = causal("llama")
    inputs, gates = prompts(), gates_of(model)
    expected = text(model, gates, inputs, num_beams=2)
    ids, mask = inputs.values()
    options = {**GREEDY, "num_beams": 2, "attention_mask": mask}
    with model.base_model.hold(gates):
        if given == "inputs":
            result = model.generate(inputs=ids, **options)[:, LENGTH:]
        elif given == "position":
            result = model.generate(ids, **options)[:, LENGTH:]
        else:  # the prompt is no part of what comes back
            result = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(result, expected)


def test_generation_from_the_begin_token_alone():
    model = causal("gpt2")
    gates = gates_of(model, 1)
    with model.base_model.hold(gates):
        result = model.generate(**GREEDY, num_beams=2, bos_token_id=1)
        expected = model.generate(torch.tensor([[1]]), **GREEDY, num_beams=2)
    assert torch.equal(result, expected)


# ---- one row after the other -----------------------------------------------------------------------------------------


@every_kind
@every_gate
@pytest.mark.parametrize("beams", [1, 2])
def test_cached_generation_equals_uncached_and_computes_the_gates_once(kind, gate_per_layer, beams):
    model = causal(kind, gate_per_layer=gate_per_layer)
    networks = [layer.ilora_gate["default"] for layer in layers(model)] if gate_per_layer else [gate_network(model)]
    calls, tokens = [], []
    hooks = [network.register_forward_hook(lambda *_: calls.append(1)) for network in networks]
    hooks += [layers(model)[0].register_forward_hook(lambda _, args, __: tokens.append(args[0].shape[1]))]
    found = {}
    for use_cache in (True, False):
        with model.base_model.use_gates(10 * gate_inputs()):
            found[use_cache] = model.generate(**prompts(), **GREEDY, num_beams=beams, use_cache=use_cache)
    for hook in hooks:
        hook.remove()
    assert found[True].shape == (ROWS, LENGTH + NEW)
    assert torch.equal(found[True], found[False])
    assert len(calls) == 2 * len(networks)  # once per generation
    assert tokens == [LENGTH, 1, 1, 1, 1, LENGTH, LENGTH + 1, LENGTH + 2, LENGTH + 3, LENGTH + 4]


def gate_network(model):
    return model.base_model.ilora_gate["default"]


@pytest.mark.parametrize(("gate_per_layer", "times"), [(False, 2), (True, 1)])
def test_a_static_cache_and_a_compiled_step_generate_the_same(gate_per_layer, times):
    """With a static cache `generate` compiles its step on a GPU, except for beams; here it is requested."""
    model = causal("llama", gate_per_layer=gate_per_layer)
    inputs, gates = prompts(), gates_of(model)
    options = {"do_sample": True, "num_return_sequences": times}
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config, **options}
    torch.compiler.reset()
    counters.clear()
    assert torch.equal(text(model, gates, inputs, **static), text(model, gates, inputs, **options))
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        other = text(model, gates.flip(0), inputs, **static)
    assert torch.equal(other, text(model, gates.flip(0), inputs, **options))


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits_of_real_tokens(kind, side):
    model = causal(kind)
    gates, lengths = gates_of(model), [LENGTH, 4, 2]
    padded = padded_prompts(lengths, side)
    mask = padded["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with model.base_model.hold(gates):
        together = model(**padded, position_ids=positions).logits
    for row, length in enumerate(lengths):
        with model.base_model.hold(gates[row : row + 1]):
            alone = model(prompts()["input_ids"][row : row + 1, :length]).logits
        # transformers takes norms and softmax in float32 whatever the dtype
        torch.testing.assert_close(together[row][mask[row].bool()], alone[0], rtol=1e-5, atol=1e-5)


@every_kind
@every_gate
@pytest.mark.parametrize("beams", [1, 2])
def test_left_padded_prompts_generate_what_they_generate_alone(kind, gate_per_layer, beams):
    model = causal(kind, gate_per_layer=gate_per_layer)
    gates, lengths = gates_of(model), [LENGTH, 4, 2]
    together = text(model, gates, padded_prompts(lengths, "left"), num_beams=beams)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, :length] for name, value in prompts().items()}
        assert torch.equal(together[row], text(model, gates[row : row + 1], alone, num_beams=beams)[0])


def padded_prompts(lengths, side):
    ids, mask = prompts().values()
    padded, real = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        place = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        padded[row, place], real[row, place] = ids[row, :length], 1
    return {"input_ids": padded, "attention_mask": real}


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_gates", [1, 2, 4])
@pytest.mark.parametrize("beams", [1, 2])
def test_gates_of_another_number_of_prompts_are_refused(n_gates, beams):
    model = causal("llama")
    message = (
        rf"gates cover {n_gates} rows but the layer received {ROWS * beams}; hold one row of gates per prompt \(3\)"
    )
    with pytest.raises(GateError, match=message):
        text(model, gates_of(model, n_gates), prompts(), num_beams=beams)


def test_repeated_rows_are_refused_outside_generation():
    model = causal("llama")
    inputs, gates = prompts(), gates_of(model)
    text(model, gates, inputs, num_beams=2)
    with model.base_model.hold(gates), pytest.raises(GateError, match=r"repeat_interleave\(2, dim=0\)"):
        model(inputs["input_ids"].repeat_interleave(2, dim=0))


def test_a_model_without_task_type_needs_the_gates_repeated_and_says_so():
    model = causal("llama", task_type=None)
    with pytest.raises(GateError, match=r"repeat_interleave\(2, dim=0\).*task_type='CAUSAL_LM' does automatically"):
        text(model, gates_of(model), prompts(), num_beams=2)


class Stopped(Exception):
    pass


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            raise Stopped
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_the_slot_is_clean_after_generation_was_interrupted():
    model = causal("llama")
    inputs, gates = prompts(), gates_of(model)
    expected = text(model, gates, inputs, num_beams=2)
    with pytest.raises(Stopped):
        text(model, gates.flip(0), inputs, num_beams=2, stopping_criteria=StoppingCriteriaList([StopAt(LENGTH + 2)]))
    assert not model.base_model.slot.held
    with pytest.raises(GateError, match="without gates"):
        model(**inputs)
    with model.base_model.hold(gates), pytest.raises(GateError, match="repeat_interleave"):
        model(inputs["input_ids"].repeat_interleave(2, dim=0))
    # Were gates repeated before the interruption still there, these would be taken for them.
    assert torch.equal(text(model, gates, inputs, num_beams=2), expected)


def test_gates_held_outside_survive_a_refused_hold_inside():
    model = causal("llama")
    inputs, gates = prompts(), gates_of(model)
    expected = text(model, gates, inputs, num_beams=2)
    with model.base_model.hold(gates):
        with pytest.raises(GateError, match="already held"):
            text(model, gates.flip(0), inputs)
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=2)[:, LENGTH:], expected)
