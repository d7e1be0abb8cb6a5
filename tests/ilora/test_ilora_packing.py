"""Several sequences in one row, each with gates of its own, compute what they compute in rows of their own."""

import pytest
import torch
from ilora_helpers import EXPERTS, VOCABULARY, WIDTH, adapt, gate_inputs, layers, tiny
from torch import nn

from llm2rec.ilora import GateError, segments_of

LENGTHS = [[3, 5], [2, 2, 4]]  # of the sequences in each of two rows
N_SEGMENTS, N_TOKENS = 5, 8
every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2"])
every_gate = pytest.mark.parametrize("gate_per_layer", [False, True], ids=["shared", "per_layer"])
# transformers takes norms and softmax in float32 whatever the dtype
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def packed(lengths=LENGTHS):
    """No attention mask and no cache: then transformers separates sequences by their positions."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), sum(lengths[0])), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return {"input_ids": ids, "position_ids": positions, "use_cache": False}


def sequences(inputs):
    """Each packed sequence as a batch of one, in order."""
    segments = segments_of(inputs["position_ids"])
    return [inputs["input_ids"][segments == number].unsqueeze(0) for number in range(int(segments.max()) + 1)]


def double(kind, **options):
    model = adapt(tiny(kind).double(), **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def logits_and_gradients(model, runs):
    """Logits and summed gradients over runs of (gate inputs, segments, model inputs)."""
    model.zero_grad()
    found = []
    for gate_input, segments, inputs in runs:
        with model.base_model.use_gates(gate_input, segments=segments):
            logits = model(**inputs).logits
            logits.sin().sum().backward()
        found.append(logits.detach().flatten(0, 1))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return torch.cat(found), gradients


def test_each_position_zero_begins_a_segment():
    expected = [[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 3, 3, 4, 4, 4, 4]]
    segments = segments_of(packed()["position_ids"])
    assert segments.dtype == torch.int64
    assert segments.tolist() == expected


@every_kind
@every_gate
@pytest.mark.parametrize("gate", ["linear", "mlp"])
def test_packed_rows_equal_separate_rows(kind, gate_per_layer, gate):
    model = double(kind, gate_per_layer=gate_per_layer, gate=gate)
    inputs, gate_input = packed(), gate_inputs(N_SEGMENTS)
    segments = segments_of(inputs["position_ids"])
    logits, gradients = logits_and_gradients(model, [(gate_input, segments, inputs)])
    alone = [
        (gate_input[number : number + 1], None, {"input_ids": ids}) for number, ids in enumerate(sequences(inputs))
    ]
    expected, expected_gradients = logits_and_gradients(model, alone)
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(gradients, expected_gradients, **CLOSE)
    assert all(gradient.norm() > 1000 * CLOSE["atol"] for gradient in gradients.values()), "nothing was compared"
    swapped, _ = logits_and_gradients(model, [(gate_input.flip(0), segments, inputs)])
    assert not torch.allclose(swapped, expected, rtol=1e-2, atol=1e-2)


@every_gate
def test_a_row_per_instance_is_the_same_with_and_without_segments(gate_per_layer):
    model = double("llama", gate_per_layer=gate_per_layer)
    ids = packed()["input_ids"]
    segments = torch.arange(2).unsqueeze(1).expand(ids.shape)
    runs = [[(gate_inputs(2), each, {"input_ids": ids})] for each in (segments, None)]
    first, second = (logits_and_gradients(model, run) for run in runs)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@every_kind
@every_gate
def test_checkpointed_gradients_of_packed_rows_are_the_same(kind, gate_per_layer):
    model = double(kind, gate_per_layer=gate_per_layer).train()
    inputs = packed()
    run = [(gate_inputs(N_SEGMENTS), segments_of(inputs["position_ids"]), inputs)]
    plain = logits_and_gradients(model, run)
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    layers(model)[0].register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(logits_and_gradients(model, run), plain, rtol=0, atol=0)
    assert len(runs) == 2, "the block did not run again in backward: the test shows nothing"


# ---- tokens of no instance -------------------------------------------------------------------------------------------


@every_gate
def test_tokens_of_no_segment_get_the_base_layer_and_give_no_gradient(gate_per_layer):
    model = double("llama", gate_per_layer=gate_per_layer)
    layer = layers(model)[0]
    segments = torch.tensor([[0, 0, -1, 1], [-1, -1, 2, 2]])
    unassigned = segments == -1
    x = torch.randn(2, 4, layer.in_features, dtype=torch.float64)
    with model.base_model.use_gates(gate_inputs(3), segments=segments):
        result = layer(x)
        assert torch.equal(result[unassigned], layer.base_layer(x)[unassigned])
        assert not torch.isclose(result[~unassigned], layer.base_layer(x)[~unassigned]).all(dim=-1).any()
        result[unassigned].sum().backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if gate_per_layer else 2)
    assert all(p.grad is None or not p.grad.any() for p in trained)


@every_kind
def test_a_packed_sequence_of_no_segment_is_that_of_the_base_model(kind):
    model = double(kind)
    inputs = packed()
    segments = segments_of(inputs["position_ids"])
    second = segments == 1
    segments[second] = -1
    segments[segments > 1] -= 1
    with model.base_model.use_gates(gate_inputs(N_SEGMENTS - 1), segments=segments):
        logits = model(**inputs).logits
    with model.disable_adapter():
        expected = model(**inputs).logits
    torch.testing.assert_close(logits[second], expected[second], **CLOSE)
    assert not torch.isclose(logits[~second], expected[~second], rtol=1e-3).all(dim=-1).any()


# ---- refusals --------------------------------------------------------------------------------------------------------

SEGMENTS = segments_of(packed()["position_ids"])


@pytest.mark.parametrize(
    ("segments", "n_gates", "message"),
    [
        (SEGMENTS, N_SEGMENTS - 1, r"got 0, 1, 2, 3, 4 for gates of 4 instances"),
        (SEGMENTS, N_SEGMENTS + 1, r"got 0, 1, 2, 3, 4 for gates of 6 instances"),
        (SEGMENTS.where(SEGMENTS != 1, 0), N_SEGMENTS, r"got 0, 2, 3, 4 for gates of 5 instances"),
        (SEGMENTS - 2, N_SEGMENTS - 2, r"got -2, -1, 0, 1, 2 for gates of 3 instances"),
        (torch.full_like(SEGMENTS, -1), 1, r"got -1 for gates of 1 instances"),
        (SEGMENTS.int(), N_SEGMENTS, r"must be int64 of shape \(B, T\).*got torch.int32 of shape \(2, 8\)"),
        (SEGMENTS.double(), N_SEGMENTS, r"must be int64 of shape \(B, T\).*got torch.float64"),
        (SEGMENTS[0], 2, r"must be int64 of shape \(B, T\).*of shape \(8,\)"),
    ],
    ids=["fewer gates", "more gates", "an instance without tokens", "below -1", "all -1", "int32", "float", "one row"],
)
def test_segments_that_do_not_fit_the_gates_are_refused(segments, n_gates, message):
    model = adapt(tiny("llama"))
    with pytest.raises(GateError, match=message), model.base_model.use_gates(gate_inputs(n_gates), segments=segments):
        pass
    assert not model.base_model.slot.held


@pytest.mark.parametrize("shape", [(2, N_TOKENS - 1), (1, N_TOKENS), (2 * N_TOKENS,)])
def test_an_input_of_another_shape_than_the_segments_is_refused(shape):
    model = adapt(tiny("llama"))
    message = rf"`segments` covers \(2, 8\) rows and tokens but the layer received \({', '.join(map(str, shape))},?\)"
    with (
        model.base_model.hold(torch.full((N_SEGMENTS, EXPERTS), 0.25), segments=SEGMENTS),
        pytest.raises(GateError, match=message),
    ):
        layers(model)[0](torch.randn(*shape, WIDTH))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0, 1, 2], [3, 4, 0]], r"start with 0 in every row, got shape \(2, 3\) and first positions \[0, 3\]"),
        ([0, 1, 0], r"must have shape \(B, T\).*got shape \(3,\)"),
    ],
)
def test_position_ids_that_begin_inside_a_sequence_are_refused(positions, message):
    with pytest.raises(GateError, match=message):
        segments_of(torch.tensor(positions))
