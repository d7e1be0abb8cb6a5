import numpy as np
import pytest
import torch
from engine_helpers import assert_same_weights

from llm2rec.core.errors import ConfigError
from llm2rec.core.vectors import standardised
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll, SelectionPolicyRandom
from llm2rec.distill.student import DistilledStudent
from llm2rec.student.items import FusedItemTable, ItemTable
from llm2rec.student.models import MODELS, build_model

N, D, WIDTH = 9, 6, 5


def test_all_weighs_every_row_one():
    weights = SelectionPolicyAll().weights(7, epoch=3)
    assert weights.dtype == np.float32
    assert weights.tolist() == [1] * 7


@pytest.mark.parametrize(
    ("budget", "n_rows", "chosen"), [(0.25, 40, 10), (1.0, 7, 7), (0.001, 10, 1), (0.5, 3, 2), (1, 1, 1)]
)
def test_random_keeps_its_budget(budget, n_rows, chosen):
    weights = SelectionPolicyRandom(budget, seed=0).weights(n_rows, epoch=0)
    assert weights.shape == (n_rows,)
    assert weights.dtype == np.float32
    assert sorted(weights.tolist(), reverse=True) == [1] * chosen + [0] * (n_rows - chosen)


def test_random_is_a_choice_of_its_seed_and_the_same_in_every_epoch():
    policy = SelectionPolicyRandom(0.5, seed=1)
    first = policy.weights(100, epoch=0).tolist()
    assert policy.weights(100, epoch=5).tolist() == first
    assert SelectionPolicyRandom(0.5, seed=1).weights(100, epoch=0).tolist() == first
    assert SelectionPolicyRandom(0.5, seed=2).weights(100, epoch=0).tolist() != first
    assert first != sorted(first, reverse=True)  # not simply the first rows


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_a_budget_that_is_no_part_is_refused(budget):
    with pytest.raises(
        ConfigError, match=rf"active\.budget is {budget}, expected a part of the rows above 0 and up to 1"
    ):
        SelectionPolicyRandom(budget, seed=0)


def test_a_policy_must_say_its_weights():
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


def test_fusion_on_the_input_side_of_a_single_table_is_refused():
    with pytest.raises(ConfigError, match=r"vectors of their own; build it with `tie_items=False`"):
        DistilledStudent(plain(), vectors(), fusion_scale=0.3, align=False, fusion_sides="input")
    DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=False, fusion_sides="input")


def test_a_pass_without_dropout_leaves_mode_and_random_numbers_alone():
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


def test_without_fusion_and_alignment_the_student_is_as_it_was():
    model = DistilledStudent(plain(), vectors(), fusion_scale=0.0, align=False)
    assert_same_weights(model.student.state_dict(), plain().state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain().parameters())


def test_alignment_projects_the_items_that_are_read_in():
    model = DistilledStudent(plain(tie_items=False), vectors(), fusion_scale=0.0, align=True)
    ids = torch.tensor([4, 4, 0])
    expected = model.student.input_items.weight[ids] @ model.to_teacher.weight.T + model.to_teacher.bias
    torch.testing.assert_close(model.projected(ids), expected)
    assert model.projected(torch.tensor([2])).shape == (1, WIDTH)


def test_a_fused_student_is_served_without_its_teacher():
    model = DistilledStudent(plain(tie_items=False), vectors(), fusion_scale=0.3, align=True).eval()
    served = plain(tie_items=False).eval()
    served.load_served(model.student.weights_to_serve())
    history, lengths = torch.tensor([[1, 2, 3, N], [5, N, N, N]]), torch.tensor([3, 1])
    torch.testing.assert_close(served.score(served(history, lengths)), model.score(model(history, lengths)))
