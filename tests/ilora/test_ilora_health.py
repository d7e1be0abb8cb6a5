"""What is said about the use of the experts."""

import math

import pytest
import torch
from ilora_helpers import EXPERTS, adapt, batch, gate_inputs, outputs, tiny

from llm2rec.ilora import GateCollapseWarning, GateError, balance_loss, gate_health


def uniform(rows: int = 64) -> torch.Tensor:
    return torch.full((rows, 4), 0.25)


def hard(rows: int = 64, spread: bool = True) -> torch.Tensor:
    experts = torch.arange(rows) % 4 if spread else torch.zeros(rows, dtype=torch.long)
    return torch.nn.functional.one_hot(experts, 4).float()


@pytest.mark.parametrize(
    ("gates", "entropy", "information", "balance"),
    [
        (uniform(), math.log(4), 0.0, 0.0),
        (hard(), 0.0, math.log(4), 0.0),  # each instance has its own expert, all are used
        (hard(spread=False), 0.0, 0.0, 3.0),  # collapsed: E - 1
        (torch.tensor([[0.5, 0.5, 0, 0]] * 64), math.log(2), 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("per_layer", [False, True])
def test_figures_by_hand(gates, entropy, information, balance, per_layer):
    gates = gates[:, None].expand(-1, 3, -1) if per_layer else gates
    health = gate_health(gates)
    assert health.n_rows == 64
    assert health.entropy == pytest.approx(entropy, abs=1e-6)
    assert health.information == pytest.approx(information, abs=1e-6)
    assert balance_loss(gates).item() == pytest.approx(balance, abs=1e-6)
    assert health.scalars()["gate_entropy"] == health.entropy
    assert sum(health.scalars()[f"gate_use_{expert}"] for expert in range(4)) == pytest.approx(1)


def test_collapse_is_warned_of_and_nothing_else(recwarn):
    for gates in (uniform(), hard(), hard(8, spread=False), torch.ones(64, 1)):
        gate_health(gates).warn_if_collapsed()  # even, specialised, too few rows, one expert
    assert not recwarn
    with pytest.warns(GateCollapseWarning, match=r"100% of the gate mass of 64 instances.*`balance_loss"):
        gate_health(hard(spread=False)).warn_if_collapsed()
    one_layer = torch.stack([uniform(), hard(spread=False)], dim=1)  # hidden in the mean over layers
    with pytest.warns(GateCollapseWarning):
        gate_health(one_layer).warn_if_collapsed()


def test_balance_loss_drives_use_apart_from_choice():
    """From a collapsed start it evens the use of experts out; each instance may go on choosing sharply."""
    torch.manual_seed(0)
    z = torch.randn(64, 8)
    weight = (torch.randn(4, 8) * 2).requires_grad_()
    bias = torch.tensor([9.0, 0, 0, 0], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.1)
    losses = []
    for _ in range(200):
        loss = balance_loss(torch.softmax(z @ weight.T + bias, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.01
    gates = torch.softmax(z @ weight.T + bias, dim=1)
    assert gate_health(gates).entropy < 1.0


def test_balance_loss_has_the_right_gradient():
    gates = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(balance_loss, gates)
    assert balance_loss(gates.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 2, 3, 4)])
def test_nothing_to_measure_is_refused(shape):
    for measure in (gate_health, balance_loss):
        with pytest.raises(GateError, match=r"must have shape \(B, E\) or \(B, G, E\)"):
            measure(torch.ones(shape))


def test_gates_of_the_last_batch_can_be_read_after_it():
    model = adapt(tiny("llama"))
    tuner = model.base_model
    with pytest.raises(GateError, match="no gates were held for adapter 'default' yet"):
        _ = tuner.last_gates
    with tuner.use_gates(gate_inputs()) as gates:
        outputs(model, **batch())
        assert torch.equal(tuner.last_gates, gates)
    assert tuner.last_gates.shape == (3, EXPERTS)
    assert not tuner.last_gates.requires_grad
    assert gate_health(tuner.last_gates).n_rows == 3
    with tuner.hold(gates[:2]):
        assert len(tuner.last_gates) == 2
