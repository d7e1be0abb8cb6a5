"""The gate networks by themselves."""

import pytest
import torch
from ilora_helpers import gate_inputs

from llm2rec.ilora import Gate, GateError, ILoraConfig
from llm2rec.ilora.gate import GATES, build_gate

KINDS = tuple(GATES)
every_gate = pytest.mark.parametrize("kind", KINDS)


def gate_of(kind: str, width: int = 16, experts: int = 4, **options) -> Gate:
    torch.manual_seed(0)
    config = ILoraConfig(r=experts, num_experts=experts, gate=kind, gate_input_size=width, **options)
    return build_gate(config)


@every_gate
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("width", "experts"), [(16, 4), (7, 3), (1, 1)])
def test_gates_are_a_mixture(kind, training, width, experts):
    gates = gate_of(kind, width, experts).train(training)(gate_inputs(5, width))
    assert gates.shape == (5, experts)
    assert gates.dtype == torch.float32
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(5))


@every_gate
@pytest.mark.parametrize("training", [False, True])
def test_a_row_does_not_depend_on_the_others_but_in_the_released_router_in_training(kind, training):
    gate, inputs = gate_of(kind).train(training), gate_inputs(6)
    torch.manual_seed(1)
    together = gate(inputs)
    torch.manual_seed(1)  # the same noise
    others = gate(torch.cat([inputs[:1], 3 * inputs[1:].flip(0)]))
    same = torch.allclose(together[0], others[0], atol=1e-6)
    assert same != (kind == "conv" and training)


@every_gate
@pytest.mark.parametrize("width", [16, 1024])
def test_a_fresh_gate_is_near_uniform_over_its_experts_but_tells_instances_apart(kind, width):
    gates = gate_of(kind, width).eval()(gate_inputs(64, width))
    kept = gates > 0
    n_kept = {"topk": 2, "topk_released": 1}.get(kind, 4)
    assert (kept.sum(dim=1) == n_kept).all()
    assert (gates[kept] - 1 / n_kept).abs().max() < 0.2
    assert kept.any(dim=0).all()  # every expert is somebody's
    # The released router takes the mean over positions, which leaves little of a long random vector.
    assert gates.std(dim=0).max() > (1e-5 if kind == "conv" else 1e-3)


@every_gate
def test_the_gate_can_learn(kind):
    gate = gate_of(kind)
    gate(gate_inputs())[:, 0].sum().backward()
    trained = [parameter for name, parameter in gate.named_parameters() if "weight" in name]
    # The released top-k with its one expert cannot: its gate is the constant 1.
    assert any(parameter.grad.abs().max() > 0 for parameter in trained) == (kind != "topk_released")


@every_gate
def test_noise_and_dropout_act_in_training_only(kind):
    gate, inputs = gate_of(kind), gate_inputs(8)
    assert torch.equal(gate.eval()(inputs), gate(inputs))
    again = torch.equal(gate.train()(inputs), gate(inputs))
    assert again == (kind not in ("noisy", "dropout"))


@pytest.mark.parametrize(
    ("kind", "option", "values"),
    [
        *((kind, "gate_temperature", (1.0, 0.5)) for kind in KINDS if kind != "topk_released"),
        ("topk_released", "gate_top_k", (1, 2)),
        ("topk", "gate_top_k", (2, 3)),
        ("mlp", "gate_hidden_size", (16, 128)),
        ("noisy", "gate_noise", (0.1, 1.0)),
        ("dropout", "gate_dropout", (0.1, 0.9)),
    ],
)
def test_every_option_changes_something(kind, option, values):
    results = []
    for value in values:
        gate = gate_of(kind, **{option: value}).train()
        torch.manual_seed(1)
        results.append(gate(gate_inputs(16)))
    assert not torch.equal(*results)


def test_top_k_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).log_softmax(dim=1)
    probs = logits.exp()[0]
    expected = torch.stack([probs[0], torch.tensor(0.0), probs[2], torch.tensor(0.0)]) / (probs[0] + probs[2])
    torch.testing.assert_close(gate_of("topk", gate_top_k=2).mix(logits)[0], expected)
    released = gate_of("topk_released", gate_top_k=2).mix(logits)[0]
    odds = (probs[0] - probs[2]).exp()  # a softmax over probabilities
    torch.testing.assert_close(released, torch.stack([odds, odds * 0, odds / odds, odds * 0]) / (1 + odds))


def test_temperature_divides_the_logits():
    cold, inputs = gate_of("linear", gate_temperature=0.25), gate_inputs()
    torch.testing.assert_close(cold(inputs), torch.softmax(4 * inputs @ cold.weight.T, dim=1))


@every_gate
def test_gate_is_float32_whatever_surrounds_it(kind):
    gate, inputs = gate_of(kind).eval(), gate_inputs(5)
    expected = gate(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(inputs), expected)
    rounded = gate.to(torch.bfloat16)(inputs)  # as DeepSpeed does to the whole model
    assert rounded.dtype == torch.float32
    if kind not in ("topk", "topk_released"):  # where rounding may choose another expert
        torch.testing.assert_close(rounded, expected, atol=0.02, rtol=0)
    assert gate.double()(inputs).dtype == torch.float64


@every_gate
@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 8), (8,)])
def test_gate_refuses_other_shapes(kind, shape):
    with pytest.raises(GateError, match="one vector of width 8 per row"):
        gate_of(kind, 8)(torch.zeros(shape))
