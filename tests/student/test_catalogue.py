"""Sums over the catalogue in tiles equal those of the whole matrix, including gradients."""

import copy
import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from llm2rec.student import catalogue
from llm2rec.student.catalogue import blocked_cross_entropy, blocked_dros, catalogue_logsumexp, fits_in_a_tile
from llm2rec.student.items import FusedItemTable, ItemTable
from llm2rec.student.losses import cross_entropy, dros
from llm2rec.student.models import SASRec

B, N, D = 37, 101, 6


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 5 x 5 logits: neither the rows nor the items divide."""
    monkeypatch.setitem(catalogue._TILE, "cpu", 25)


def peak_bytes(step):
    """Peak memory of a step in bytes, beyond the memory before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def table_of(kind, dtype=torch.float64):
    torch.manual_seed(0)
    table = FusedItemTable(torch.randn(N, 4), D, 0.5) if kind == "fused" else ItemTable(N, D)
    with torch.no_grad():
        table.weight[:N] = torch.randn(N, D)
    return table.to(dtype)


def rows_of(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(B, D, dtype=dtype, requires_grad=True), torch.randint(N, (B,))


def plain_dros(users, table, targets, propensity):
    return dros(users @ table.vectors().T, targets.unsqueeze(1), propensity, 0.7).squeeze(1)


FORMS = {
    "cross_entropy": (blocked_cross_entropy, lambda u, t, y: cross_entropy_in_float64(u @ t.vectors().T, y)),
    "dros": (
        lambda u, t, y: blocked_dros(u, t, y, torch.linspace(0.1, 1, N, dtype=torch.float64), 0.7),
        lambda u, t, y: plain_dros(u, t, y, torch.linspace(0.1, 1, N, dtype=torch.float64)),
    ),
}


def cross_entropy_in_float64(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def gradients(losses, users, table):
    """With a different weight per row, and added to existing gradients, as in training."""
    table.zero_grad()
    users.grad = None
    (losses * torch.linspace(-1, 2, B, dtype=losses.dtype)).sum().backward()
    return {"users": users.grad, **{name: weight.grad for name, weight in table.named_parameters()}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_tiles_equal_the_whole_matrix(tiny_tiles, form, kind):
    (users, targets), table = rows_of(), table_of(kind)
    blocked, whole = (function(users, table, targets) for function in FORMS[form])
    torch.testing.assert_close(blocked, whole, rtol=1e-12, atol=1e-12)
    ours, theirs = (gradients(losses, users, table) for losses in (blocked, whole))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert not ours["weight"][N].any(), "padding"


def test_tiles_equal_the_plain_losses_up_to_rounding(tiny_tiles):
    (users, targets), table = rows_of(torch.float32), table_of("plain", torch.float32)
    blocked, whole = blocked_cross_entropy(users, table, targets), cross_entropy(users @ table.vectors().T, targets)
    torch.testing.assert_close(blocked, whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradients(blocked, users, table), gradients(whole, users, table), rtol=1e-4, atol=1e-6)


def test_tiles_of_full_height_or_width(monkeypatch):
    (users, targets), table = rows_of(), table_of("plain")
    whole = cross_entropy_in_float64(users @ table.vectors().T, targets)
    for size in (1, 60, 3000, 2**20):
        monkeypatch.setitem(catalogue._TILE, "cpu", size)
        torch.testing.assert_close(blocked_cross_entropy(users, table, targets), whole)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(tiny_tiles, form):
    torch.manual_seed(0)
    users, items = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 12))
    curvature, left_out = torch.rand(11, dtype=torch.float64), torch.randint(11, (7,))
    options = () if form == "cross_entropy" else (curvature, left_out)
    assert gradcheck(lambda u, e: catalogue_logsumexp(u, e, 11, *options), (users, items))


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e15])
def test_extreme_scores_stay_finite(tiny_tiles, scale):
    (users, targets), table = rows_of(torch.float32), table_of("plain", torch.float32)
    users = (users.detach() * scale).requires_grad_()
    for form in (blocked_cross_entropy, lambda *given: blocked_dros(*given, torch.full((N,), 0.9), 1.0)):
        losses = form(users, table, targets)
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(each).all() for each in gradients(losses, users, table).values())


def test_excluding_the_only_item_of_a_tile_gives_no_nan(monkeypatch):
    monkeypatch.setitem(catalogue._TILE, "cpu", 1)
    (users, targets), table = rows_of(), table_of("plain")
    blocked, whole = (function(users, table, targets) for function in FORMS["dros"])
    torch.testing.assert_close(blocked, whole)
    torch.testing.assert_close(gradients(blocked, users, table), gradients(whole, users, table))


def test_bf16_users_are_scored_in_the_tables_precision_under_autocast(tiny_tiles):
    (users, targets), table = rows_of(torch.float32), table_of("plain", torch.float32)
    narrow = users.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = blocked_cross_entropy(narrow, table, targets)
        losses.sum().backward()
    whole = cross_entropy(narrow.detach().float() @ table.vectors().T, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-5)
    assert narrow.grad.dtype == torch.bfloat16


def test_tied_table_accumulates_one_dense_gradient_from_both_sides(tiny_tiles):
    torch.manual_seed(0)
    model = SASRec(N, 8, 5, n_blocks=1, dropout=0.0)
    history, lengths, targets = torch.randint(N, (4, 5)), torch.full((4,), 5), torch.randint(N, (4,))
    found = []
    for blocked in (True, False):
        model.zero_grad()
        users = model(history, lengths)
        losses = (
            blocked_cross_entropy(users, model.output_items, targets)
            if blocked
            else cross_entropy(model.score(users), targets)
        )
        losses.sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0]["input_items.weight"][history].abs().sum() > 0


def test_gradients_are_equal_for_backward_and_autograd_grad(tiny_tiles):
    """Accumulated into ``grad``, returned, or for the users only."""
    (users, targets), table = rows_of(), table_of("plain")
    expected = gradients(FORMS["cross_entropy"][1](users, table, targets), users, table)["weight"].clone()
    weights = torch.linspace(-1, 2, B, dtype=torch.float64)

    def loss():
        return (blocked_cross_entropy(users, table, targets) * weights).sum()

    (returned,) = torch.autograd.grad(loss(), table.weight)
    torch.testing.assert_close(returned.to_dense(), expected)
    torch.testing.assert_close(table.weight.grad, expected)
    loss().backward()
    torch.testing.assert_close(table.weight.grad, 2 * expected)
    loss().backward(inputs=[users])
    torch.testing.assert_close(table.weight.grad, 2 * expected)
    table.sparse_gradients, table.weight.grad = True, None
    table(targets[:1]).sum().backward()
    loss().backward()
    expected[targets[0]] += 1
    torch.testing.assert_close(table.weight.grad, expected)


def test_step_allocates_one_gradient_of_a_tied_table():
    table, targets = ItemTable(20000, 64), torch.arange(50)
    size = table.weight.numel() * 4

    def step():
        for _ in range(2):  # micro-batches
            users = table(torch.arange(500).view(50, 10)).mean(dim=1)
            blocked_cross_entropy(users, table, targets).sum().backward()
        assert not table.weight.grad.is_sparse
        table.weight.grad = None

    assert 1 < peak_bytes(step) / size < 1.9


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_lookup_gradients_are_sparse_only_if_enabled(copied, wanted):
    table = table_of("plain")
    table = copy.deepcopy(table) if copied else table
    table.sparse_gradients = wanted
    ids = torch.tensor([[3, 3, N], [5, 3, N]])
    for _ in range(2):  # as micro-batches do
        table(ids).sum().backward()
    assert table.weight.grad.is_sparse == wanted
    expected = torch.zeros(N + 1, D, dtype=torch.float64)
    expected[3], expected[5] = 6, 2
    assert torch.equal(table.weight.grad.to_dense(), expected)


def test_fits_in_a_tile():
    assert fits_in_a_tile(256, 1682, torch.device("cpu"))
    assert not fits_in_a_tile(6400, 10**4, torch.device("cpu"))
    assert fits_in_a_tile(6400, 1000, torch.device("cuda"))
