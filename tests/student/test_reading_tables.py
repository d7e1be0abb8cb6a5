"""Item tables fused with a teacher's vectors: units of the scale, frozen columns, items without own part."""

import copy

import pytest
import torch

from llm2rec.core.train.optimizer import RowwiseAdamW, adamw
from llm2rec.student.catalogue import catalogue_logsumexp
from llm2rec.student.items import INITIAL_STD, FrozenItemTable, FusedItemTable

N, D, C = 40, 12, 5
TABLES = {
    "fused": lambda vectors, scale=0.7: FusedItemTable(vectors, D, scale),
    "fused, in units of ids": lambda vectors, scale=0.7: FusedItemTable(vectors, D, scale, "ids"),
    "frozen": lambda vectors, scale=0.7: FrozenItemTable(vectors, D, scale),
}
SOME = torch.arange(N) % 3 == 0


def vectors(width=C, length=1.0):
    drawn = torch.randn(N, width, generator=torch.Generator().manual_seed(width))
    return length * torch.nn.functional.normalize(drawn, dim=1)


def built(kind, **options):
    torch.manual_seed(0)
    return TABLES[kind](vectors(), **options)


@pytest.mark.parametrize("kind", TABLES)
def test_lookups_are_rows_of_the_whole_and_padding_is_zero(kind):
    table = built(kind)
    ids = torch.tensor([[0, 7, N], [7, 7, 1]])
    assert table.vectors().shape == (N, D)
    torch.testing.assert_close(table(ids), table.with_padding()[ids])
    assert table.with_padding()[N].abs().sum() == 0
    assert not any("teacher" in name or "has_own" in name for name in table.state_dict())


@pytest.mark.parametrize("kind", TABLES)
def test_items_without_own_part_are_their_teachers_vectors_alone(kind):
    table = built(kind)
    whole, alone = table.vectors(), table.teacher_vectors[:N]
    alone = vectors() @ table.vector_map().T
    table.without_own(SOME)
    for is_training in (True, False):
        table.train(is_training)
        torch.testing.assert_close(table.vectors()[SOME], alone[SOME])
        assert torch.equal(table.vectors()[~SOME], whole[~SOME])
        torch.testing.assert_close(table(torch.arange(N)), table.vectors())
    assert table(torch.tensor([N])).abs().sum() == 0


@pytest.mark.parametrize("kind", TABLES)
def test_dropped_items_are_dropped_in_training_only(kind):
    table, others = built(kind), torch.arange(N) % 3 == 1
    whole, alone = table.vectors(), vectors() @ table.vector_map().T
    table.without_own(SOME)
    table.drop_own(others)
    gone = SOME | others
    torch.testing.assert_close(table.vectors(), torch.where(gone[:, None], alone, whole))
    torch.testing.assert_close(table(torch.arange(N)), table.vectors())
    table(torch.arange(N)).sum().backward()
    learned = table.weight.grad[:N].abs().sum(dim=1) > 0
    assert torch.equal(learned, ~gone)
    table.eval()
    torch.testing.assert_close(table.vectors(), torch.where(SOME[:, None], alone, whole))
    table.train().drop_own(None)
    torch.testing.assert_close(table.vectors(), torch.where(SOME[:, None], alone, whole))


def test_items_without_own_part_do_not_train_the_projection():
    table, ids = built("fused"), torch.arange(N)
    table.without_own(SOME)
    upstream = torch.randn(N, D)
    by_hand = 0.7 * upstream[~SOME].T @ vectors()[~SOME]  # gradient of the others alone
    for found in (table.vectors(), table(ids)):
        table.zero_grad()
        found.backward(upstream)
        torch.testing.assert_close(table.projection.weight.grad, by_hand)


@pytest.mark.parametrize("kind", TABLES)
def test_scores_over_the_catalogue_give_the_gradients_of_the_plain_form(kind):
    table, users = built(kind), torch.randn(6, D)
    table.drop_own(SOME)
    ours = torch.autograd.grad(catalogue_logsumexp(users, table.with_padding(), N).sum(), list(table.parameters()))
    plain = torch.autograd.grad((users @ table.vectors().T).logsumexp(dim=1).sum(), list(table.parameters()))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert ours[0][:N][SOME].abs().sum() == 0


@pytest.mark.parametrize("width", [8, 64, 512])
@pytest.mark.parametrize("length", [1.0, 30.0])
def test_a_scale_in_units_of_ids_means_the_same_for_every_width(width, length):
    torch.manual_seed(0)
    table = FusedItemTable(vectors(width, length), 256, 3.0, "ids")
    projected = table.vectors() - table.weight[:N]
    assert projected.std().item() == pytest.approx(3 * INITIAL_STD, rel=0.15)
    frozen = FrozenItemTable(vectors(width, length), 1024, 3.0)
    assert frozen.vectors()[:, :width].std().item() == pytest.approx(3 * INITIAL_STD, rel=0.15)
    assert FrozenItemTable(torch.zeros(N, width), 1024, 3.0).vectors()[:, :width].abs().sum() == 0


def test_a_scale_in_units_of_the_map_depends_on_the_width():
    torch.manual_seed(0)
    narrow, wide = (FusedItemTable(vectors(width), 256, 3.0) for width in (8, 512))
    spreads = [(table.vectors() - table.weight[:N]).std().item() for table in (narrow, wide)]
    assert spreads == pytest.approx([3 / (3 * width) ** 0.5 for width in (8, 512)], rel=0.15)


@pytest.mark.parametrize("rowwise", [True, False])
def test_frozen_columns_stay_and_others_learn(rowwise):
    table = built("frozen")
    table.sparse_gradients = rowwise
    before = table.vectors().detach().clone()
    optimizer = adamw(table, 0.1, 0.1, rowwise=[table.weight] if rowwise else [])
    assert isinstance(optimizer, RowwiseAdamW) == rowwise
    for step in range(3):
        table.drop_own(torch.arange(N) == step)
        optimizer.zero_grad()
        table(torch.tensor([[1, 2, N, 0]])).pow(3).sum().backward()
        optimizer.step()
    after = table.vectors()
    assert torch.equal(after[:, :C], before[:, :C])
    assert not torch.equal(after[1, C:], before[1, C:])
    assert table.with_padding()[N].abs().sum() == 0


@pytest.mark.parametrize("kind", TABLES)
def test_a_copy_is_the_same_table(kind):
    table = built(kind)
    table.without_own(SOME)
    assert torch.equal(copy.deepcopy(table).vectors(), table.vectors())
