import pytest
import torch
from torch import nn

from llm2rec.core.train.checkpoint import load_optimizer, optimizer_tensors, save_tensors
from llm2rec.core.train.optimizer import RowwiseAdamW, adamw

ROWS, WIDTH = 7, 3


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.layer = nn.Linear(WIDTH, 2)


def optimized(model, lr=0.1, decay=0.0):
    return adamw(model, lr, decay, rowwise=[model.table])


def gradient_of(rows, sparse, seed):
    """A sparse gradient with a repeated row."""
    values = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(seed))
    found = torch.sparse_coo_tensor(torch.tensor([rows]), values, (ROWS, WIDTH), check_invariants=True)
    return found if sparse else found.to_dense()


def stepped(sparse, decay=0.0, steps=((0, 2, 2), (2, 5), (0, 1, 6)), model=None, optimizer=None):
    model = model or Tables()
    optimizer = optimizer or optimized(model, decay=decay)
    for seed, rows in enumerate(steps):
        model.table.grad = gradient_of(list(rows), sparse, seed)
        optimizer.step()
    return model, optimizer


def test_step_by_hand():
    model = Tables()
    optimizer, before = optimized(model, decay=0.5), model.table.detach().clone()
    average, steps = 0.0, 0
    for scale in (1.0, 3.0):
        gradient = torch.zeros(ROWS, WIDTH)
        gradient[4] = scale * torch.tensor([1.0, -2.0, 2.0])  # mean square 3 scale^2
        model.table.grad = gradient
        optimizer.step()
        average, steps = 0.999 * average + 0.001 * 3 * scale**2, steps + 1
        before[4] = 0.95 * before[4] - 0.1 * gradient[4] / ((average / (1 - 0.999**steps)) ** 0.5 + 1e-8)
    torch.testing.assert_close(model.table.detach(), before)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sparse_and_dense_gradients_give_the_same_steps(decay):
    (sparse, one), (dense, other) = stepped(True, decay), stepped(False, decay)
    torch.testing.assert_close(sparse.table, dense.table)
    torch.testing.assert_close(one.state[sparse.table], other.state[dense.table])


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_without_gradient_keep_weights_and_state(sparse):
    model, optimizer = stepped(sparse, decay=0.3)
    assert torch.equal(model.table[3:5], Tables().table[3:5])
    state = optimizer.state[model.table]
    assert state["step"].squeeze(1).tolist() == [2, 1, 2, 0, 0, 1, 1]
    assert (state["exp_avg_sq"].squeeze(1) > 0).tolist() == [True, True, True, False, False, True, True]


def test_other_parameters_use_adamw():
    model, plain = Tables(), Tables()
    for each, optimizer in ((model, optimized(model)), (plain, adamw(plain, 0.1, 0.0))):
        for _ in range(3):
            optimizer.zero_grad()
            each.layer(each.table.detach()).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.layer.weight, plain.layer.weight)
    assert type(adamw(plain, 0.1, 0.0)) is torch.optim.AdamW
    assert type(optimized(model)) is RowwiseAdamW


def test_state_has_two_numbers_per_row():
    model, optimizer = stepped(True)
    assert sum(value.numel() for value in optimizer.state[model.table].values()) == 2 * ROWS


@pytest.mark.parametrize("sparse", [True, False])
def test_state_round_trip(tmp_path, sparse):
    model, optimizer = stepped(sparse)
    save_tensors(optimizer_tensors(model, optimizer), tmp_path / "optimizer.safetensors")
    other = Tables()
    other.load_state_dict(model.state_dict())
    restored = optimized(other)
    load_optimizer(other, restored, tmp_path / "optimizer.safetensors")
    more = ((1, 2), (0, 4))
    stepped(sparse, steps=more, model=model, optimizer=optimizer)
    stepped(sparse, steps=more, model=other, optimizer=restored)
    assert torch.equal(other.table, model.table)
