"""What the tuner checks, and several adapters on one model."""

import copy

import pytest
import torch
from ilora_helpers import EXPERTS, WIDTH, adapt, batch, gate_inputs, outputs, tiny, train

from llm2rec.ilora import GateError, ILoraConfig


def test_gate_and_hold_check_what_they_get():
    tuner = adapt(tiny("llama")).base_model
    assert tuner.gate(gate_inputs()).shape == (3, EXPERTS)
    torch.testing.assert_close(tuner.gate(gate_inputs()).sum(dim=1), torch.ones(3))
    with pytest.raises(GateError, match=f"one vector of width {WIDTH} per row"):
        tuner.gate(gate_inputs(3, WIDTH + 1))
    for gates in (torch.ones(3, EXPERTS + 1), torch.ones(3), torch.ones(3, EXPERTS, dtype=torch.long)):
        with pytest.raises(GateError, match=r"must be floats of shape \(B, 4\)"), tuner.hold(gates):
            pass
    with pytest.raises(GateError, match="gates given for adapter 'other'"), tuner.hold({"other": torch.ones(3, 4)}):
        pass
    with tuner.use_gates(gate_inputs()) as gates:
        assert torch.equal(gates, tuner.gate(gate_inputs()))
        with pytest.raises(GateError, match="already held"), tuner.use_gates(gate_inputs()):
            pass


def two_adapters():
    model = adapt(tiny("llama"))
    model.add_adapter("second", ILoraConfig(r=6, num_experts=3, gate_input_size=5, target_modules=["q_proj"]))
    train(model, "second", seed=9)
    return model.eval()


def test_two_adapters_have_their_own_experts_and_gates():
    model, single = two_adapters(), adapt(tiny("llama"))
    second = adapt(tiny("llama"), False, r=6, num_experts=3, gate_input_size=5, target_modules=["q_proj"])
    train(second, seed=9)
    with single.base_model.use_gates(gate_inputs()), model.base_model.use_gates(gate_inputs()):
        assert torch.equal(outputs(model, **batch()), outputs(single, **batch()))
    model.set_adapter("second")
    with second.base_model.use_gates(gate_inputs(3, 5)), model.base_model.use_gates(gate_inputs(3, 5)) as gates:
        assert gates.shape == (3, 3)
        assert torch.equal(outputs(model, **batch()), outputs(second, **batch()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "ilora_" in name and ".second." in name}
    model.delete_adapter("second")
    model.set_adapter("default")
    assert not any(".second" in name for name in model.state_dict())
    with single.base_model.use_gates(gate_inputs()), model.base_model.use_gates(gate_inputs()):
        assert torch.equal(outputs(model, **batch()), outputs(single, **batch()))


def test_adding_an_adapter_leaves_the_trained_one_trained():
    model = two_adapters()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "ilora_" in name and ".default." in name}
    model.set_requires_grad("second")
    assert model.base_model.ilora_gate["second"].weight.requires_grad
    model.set_requires_grad(["default", "second"], False)
    assert not any(p.requires_grad for p in model.parameters())


def test_gates_must_be_those_of_the_active_adapters():
    model = two_adapters()
    gates = model.base_model.gate(gate_inputs())
    with model.base_model.hold(gates):
        model.set_adapter("second")
        with pytest.raises(GateError, match=r"adapter 'second' is active but the gates held are for \['default'\]"):
            outputs(model, **batch())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(GateError, match="2 adapters are active"), model.base_model.hold(gates):
        pass
    both = {"default": gates, "second": model.base_model.gate(gate_inputs(3, 5), "second")}
    with model.base_model.hold(both):
        assert torch.isfinite(outputs(model, **batch())).all()


def test_a_copied_model_has_its_own_slot():
    model = adapt(tiny("llama"))
    twin = copy.deepcopy(model)
    with model.base_model.use_gates(gate_inputs()):
        assert not twin.base_model.slot.held
        with twin.base_model.use_gates(gate_inputs()):
            assert torch.equal(outputs(model, **batch()), outputs(twin, **batch()))


def test_trainable_parameters_are_counted_like_loras(capsys):
    model = adapt(tiny("llama"), target_modules=["q_proj"])
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * (8 * WIDTH + WIDTH * 8) + EXPERTS * WIDTH
    model.print_trainable_parameters()
    assert f"trainable params: {trainable}" in capsys.readouterr().out
