import numpy as np
import pytest
import torch
from engine_helpers import assert_same_weights

from llm2rec.core.errors import ConfigError
from llm2rec.core.vectors import principal_components, standardised
from llm2rec.distill.kd_losses import alignment_loss, contrastive_alignment
from llm2rec.distill.selection_evidence import Evidence
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll, SelectionPolicyRandom
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.items import FusedItemTable, ItemTable
from llm2rec.student.models import MODELS, build_model

N, D, WIDTH = 9, 6, 5


def moment(n_rows, epoch=0):
    """Evidence for a policy that reads neither teacher nor student."""
    return Evidence(n_rows, epoch, np.arange(n_rows), None, None)


def test_all_gives_every_row_weight_one():
    weights = SelectionPolicyAll().weights(moment(7, epoch=3))
    assert weights.dtype == np.float32
    assert weights.tolist() == [1] * 7


@pytest.mark.parametrize(
    ("budget", "n_rows", "chosen"), [(0.25, 40, 10), (1.0, 7, 7), (0.001, 10, 1), (0.5, 3, 2), (1, 1, 1)]
)
def test_random_keeps_its_budget(budget, n_rows, chosen):
    weights = SelectionPolicyRandom(budget, seed=0).weights(moment(n_rows))
    assert weights.shape == (n_rows,)
    assert weights.dtype == np.float32
    assert sorted(weights.tolist(), reverse=True) == [1] * chosen + [0] * (n_rows - chosen)


def test_random_depends_on_the_seed_and_not_on_the_epoch():
    policy = SelectionPolicyRandom(0.5, seed=1)
    first = policy.weights(moment(100)).tolist()
    assert policy.weights(moment(100, epoch=5)).tolist() == first
    assert SelectionPolicyRandom(0.5, seed=1).weights(moment(100)).tolist() == first
    assert SelectionPolicyRandom(0.5, seed=2).weights(moment(100)).tolist() != first
    assert first != sorted(first, reverse=True)  # not simply the first rows


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_budget_out_of_range_raises(budget):
    with pytest.raises(
        ConfigError, match=rf"active\.budget is {budget}, expected a fraction of the rows above 0 and up to 1"
    ):
        SelectionPolicyRandom(budget, seed=0)


def test_policy_without_weights_method_cannot_be_instantiated():
    class Silent(SelectionPolicy):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Silent()


def plain(tie_items=True, name="sasrec"):
    torch.manual_seed(0)
    return build_model(name, n_items=N, width=D, max_length=4, tie_items=tie_items)


def vectors():
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1))


def test_standardised_vectors_are_centred_and_of_unit_length():
    given = 3 * vectors() + 10
    ours = standardised(given)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(N))
    centred = given - given.mean(dim=0)
    torch.testing.assert_close(ours, centred / centred.norm(dim=1, keepdim=True))
    torch.testing.assert_close(standardised(100 * given - 7), ours, rtol=1e-3, atol=1e-4)  # units do not matter
    assert standardised(torch.ones(3, 2)).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("tie_items", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_fusion_adds_the_projected_teacher_to_every_item(name, tie_items):
    model = DistilledStudent(plain(tie_items, name), vectors(), fusion_scale=0.3, align=False)
    student = model.student
    assert (student.input_items is student.output_items) == tie_items
    for table in (student.input_items, student.output_items):
        assert type(table) is FusedItemTable
        expected = table.weight[:N] + 0.3 * vectors() @ table.projection.weight.T
        torch.testing.assert_close(table.vectors(), expected)
        assert table(torch.tensor([[N]])).abs().sum() == 0  # padding stays zero
    users = torch.randn(2, D)
    torch.testing.assert_close(model.score(users), users @ student.output_items.vectors().T)
    padded, alone = torch.tensor([[1, 2, N, N]]), torch.tensor([[1, 2]])
    model.eval()
    torch.testing.assert_close(model(padded, torch.tensor([2])), model(alone, torch.tensor([2])))


@pytest.mark.parametrize("name", MODELS)
def test_fusion_on_the_input_side_scores_with_plain_vectors(name):
    model = DistilledStudent(plain(False, name), vectors(), fusion_scale=0.3, align=False, fusion_sides="input")
    assert type(model.student.input_items) is FusedItemTable
    assert type(model.student.output_items) is ItemTable
    users = torch.randn(2, D)
    torch.testing.assert_close(model.score(users), users @ model.student.output_items.weight[:N].T)
    served = plain(False, name).eval()
    served.load_served(model.student.weights_to_serve())
    history, lengths = torch.tensor([[1, 2, 3, N], [5, N, N, N]]), torch.tensor([3, 1])
    model.eval()
    torch.testing.assert_close(served.score(served(history, lengths)), model.score(model(history, lengths)))


def test_input_fusion_of_tied_tables_raises():
    with pytest.raises(ConfigError, match=r"separate input and output item tables.*`tie_items=False`"):
        DistilledStudent(plain(), vectors(), fusion_scale=0.3, align=False, fusion_sides="input")
    DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=False, fusion_sides="input")


def test_pass_without_dropout_keeps_mode_and_random_state():
    model = DistilledStudent(plain(), vectors(), fusion_scale=0.3, align=False)
    history, lengths = torch.tensor([[1, 2, 3, N], [5, N, N, N]]), torch.tensor([3, 1])
    before = torch.get_rng_state()
    logits = model.logits_without_dropout(history, lengths)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.student.training
    assert not logits.requires_grad
    model.eval()
    assert torch.equal(logits, model.score(model(history, lengths)))
    model.logits_without_dropout(history, lengths)
    assert not model.student.training


def test_teacher_vectors_are_neither_trained_nor_stored():
    model = DistilledStudent(plain(), vectors(), fusion_scale=0.3, align=True)
    assert not any("teacher_vectors" in name for name, _ in model.named_parameters())
    assert not any("teacher_vectors" in name for name in model.state_dict())


def test_student_without_fusion_and_alignment_is_unchanged():
    model = DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=False)
    assert_same_weights(model.student.state_dict(), plain().state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain().parameters())


def test_alignment_projects_input_item_vectors():
    model = DistilledStudent(plain(tie_items=False), vectors(), fusion_scale=0.0, align=True)
    ids = torch.tensor([4, 4, 0])
    to = model.to_teacher["input"]
    expected = model.student.input_items.weight[ids] @ to.weight.T + to.bias
    assert model.projected(ids).keys() == {"input"}
    torch.testing.assert_close(model.projected(ids)["input"], expected)
    assert model.projected(torch.tensor([2]))["input"].shape == (1, WIDTH)


def test_fused_student_is_served_without_teacher_vectors():
    model = DistilledStudent(plain(tie_items=False), vectors(), fusion_scale=0.3, align=True).eval()
    served = plain(tie_items=False).eval()
    served.load_served(model.student.weights_to_serve())
    history, lengths = torch.tensor([[1, 2, 3, N], [5, N, N, N]]), torch.tensor([3, 1])
    torch.testing.assert_close(served.score(served(history, lengths)), model.score(model(history, lengths)))


@pytest.mark.parametrize(("sides", "expected"), [("output", ["output"]), ("both", ["input", "output"])])
@pytest.mark.parametrize("kind", ["mse", "cosine", "contrastive"])
def test_alignment_trains_the_selected_sides(kind, sides, expected):
    model = DistilledStudent(plain(tie_items=False), vectors(), fusion_scale=0.0, align=True, alignment_sides=sides)
    ids = torch.tensor([4, 4, 0])
    tables = {"input": model.student.input_items, "output": model.student.output_items}
    assert list(model.projected(ids)) == expected
    by_hand = []
    for side in expected:
        to = model.to_teacher[side]
        projected = tables[side].weight[ids] @ to.weight.T + to.bias
        by_hand.append(
            contrastive_alignment(projected, vectors(), ids, 0.2)
            if kind == "contrastive"
            else alignment_loss(projected, vectors()[ids], kind)
        )
    loss = model.alignment(ids, kind, 0.2)
    torch.testing.assert_close(loss, sum(by_hand) / len(expected))
    loss.sum().backward()
    moved = [side for side, table in tables.items() if table.weight.grad is not None]
    assert moved == expected


def test_output_fusion_reads_plain_vectors():
    model = DistilledStudent(plain(False), vectors(), fusion_scale=0.3, align=False, fusion_sides="output")
    student = model.student
    assert (type(student.input_items), type(student.output_items)) == (ItemTable, FusedItemTable)
    users = torch.randn(2, D)
    fused = student.output_items.weight[:N] + 0.3 * vectors() @ student.output_items.projection.weight.T
    torch.testing.assert_close(model.score(users), users @ fused.T)


def test_one_sided_fusion_of_tied_tables_raises():
    with pytest.raises(ConfigError, match=r"`fusion_sides` is 'output', which needs .*`tie_items=False`"):
        DistilledStudent(plain(), vectors(), fusion_scale=0.3, align=False, fusion_sides="output")
    with pytest.raises(ConfigError, match=r"alignment_sides is 'both'.*student\.model\.tie_items=false"):
        DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=True, alignment_sides="both")
    DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=False, alignment_sides="both")


@pytest.mark.parametrize(("n_items", "width"), [(30, 5), (6, 40)])  # more items than numbers each, and fewer
def test_principal_components_equal_svd(n_items, width):
    given = torch.randn(n_items, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = given - given.mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    ours = principal_components(given, 4)
    assert (ours.shape, ours.dtype) == ((n_items, 4), torch.float32)
    torch.testing.assert_close(ours.abs(), (left * singular)[:, :4].abs().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(principal_components(given, 4, whiten=True).square().mean(dim=0), torch.ones(4))
    assert (ours.gather(0, ours.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(principal_components(-given, 4).abs(), ours.abs(), rtol=1e-4, atol=1e-5)


def test_principal_components_by_hand():
    given = torch.tensor([[3.0, 1.0], [1.0, 1.0], [-1.0, 1.0], [-3.0, 1.0]])  # the second number says nothing
    assert principal_components(given, 2).tolist() in ([[3], [1], [-1], [-3]], [[-3], [-1], [1], [3]])
    assert principal_components(torch.ones(4, 3), 2).shape == (4, 0)


@pytest.mark.parametrize("tie_items", [True, False])
@pytest.mark.parametrize("fusion", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["pca", "whitened"])
def test_item_vectors_are_initialised_from_the_teacher(kind, fusion, tie_items):
    model = DistilledStudent(plain(tie_items), vectors(), fusion_scale=fusion, align=False, initialise=kind)
    student, start = model.student, principal_components(vectors(), D, whiten=kind == "whitened")
    width = start.shape[1]
    assert width == WIDTH  # the teacher's are narrower than the student's here
    for table in (student.input_items, student.output_items):
        ours = table.weight[:N, :width]
        torch.testing.assert_close(ours, start * (0.02 / start.std()))
        assert ours.std().item() == pytest.approx(0.02)
        assert table.weight[N].abs().sum() == 0
        assert 0 < table.weight[:N, width:].std() < 0.05  # random, as without


def test_wide_teacher_is_reduced_to_the_student_width():
    wide = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    table = ItemTable(50, D)
    table.start_from(principal_components(wide, D))
    torch.testing.assert_close(table.vectors().std(), torch.tensor(0.02))
    spread = table.vectors().std(dim=0)
    assert (spread[:-1] >= spread[1:]).all()
