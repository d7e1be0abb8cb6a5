"""Task losses of students: formulas, draws of negatives, and training with each loss."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from engine_helpers import Killed, assert_same_weights, counting_rows, engine_in, killed_at, random_rows, written
from safetensors.torch import load_file, save_file
from torch.autograd import gradcheck

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.engine import Engine
from llm2rec.student import catalogue
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import calibrated_bce, calibration_power, cross_entropy, sampled_softmax
from llm2rec.student.models import SASRec, build_model
from llm2rec.student.negatives import Negatives, Proposal
from llm2rec.student.optimizer import student_optimizer
from llm2rec.student.settings import DrosSettings, LossSettings
from llm2rec.student.task_loss import TaskLoss
from llm2rec.student.trainer_baseline import train_baseline

N, L = 12, 4
TRAIN, VALIDATION = random_rows(37, N, L), random_rows(20, N, L, seed=1)
SETTINGS = {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01}
LOSSES = {
    "cross_entropy": LossSettings(),
    "cross_entropy_dros": LossSettings(dros=DrosSettings(weight=0.5)),
    "uniform_by_step": LossSettings("sampled_softmax", 8),
    "popular_by_row": LossSettings("sampled_softmax", 8, "row", "popularity"),
    "bce": LossSettings("bce", 4),
    "gbce": LossSettings("gbce", 8),
    "gbce_by_step_dros": LossSettings("gbce", 8, "step", calibration=0.5, dros=DrosSettings(weight=0.1)),
}
NO_HITS = torch.zeros(1, 2, dtype=torch.bool)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_sampled_softmax_by_hand():
    # Proposals of 1/2 and 1/4, two draws: each negative stands for 1 and for 2 of its kind.
    log_expected = torch.tensor([2 * 0.5, 2 * 0.25]).log()
    scores = torch.tensor([[math.log(3.0), math.log(5.0)]])
    loss = sampled_softmax(torch.tensor([math.log(2.0)]), scores, log_expected, NO_HITS)
    assert loss.item() == pytest.approx(-math.log(2 / (2 + 3 / 1 + 5 / 0.5)))
    hit = sampled_softmax(torch.tensor([math.log(2.0)]), scores, log_expected, torch.tensor([[True, False]]))
    assert hit.item() == pytest.approx(-math.log(2 / (2 + 5 / 0.5)))


@pytest.mark.parametrize("popular", [False, True])
def test_corrected_sum_is_unbiased_over_all_samples(popular):
    """Over all samples of 2 items from 4, the expectation of the estimated sum is the exact sum."""
    targets = torch.tensor([0, 0, 0, 1, 1, 3])  # q = 4/10, 3/10, 1/10, 2/10
    proposal, scores = Proposal(4, targets if popular else None), torch.tensor([0.3, -1.0, 2.0, 0.5])
    probability = proposal.log_probability(torch.arange(4)).exp()
    assert probability.tolist() == pytest.approx([0.4, 0.3, 0.1, 0.2] if popular else [0.25] * 4)
    for target in range(4):
        mean = 0.0
        for sample in itertools.product(range(4), repeat=2):
            drawn = torch.tensor([sample])
            log_expected = proposal.log_probability(drawn) + math.log(2)
            loss = sampled_softmax(scores[target : target + 1], scores[drawn], log_expected, drawn == target)
            mean += probability[drawn].prod() * (loss + scores[target]).exp().item()
        assert mean.item() == pytest.approx(scores.exp().sum().item(), rel=1e-5)


def test_sampled_loss_converges_to_cross_entropy():
    torch.manual_seed(0)
    scores, targets, n = torch.randn(3, 200), torch.tensor([0, 7, 199]), 20000
    whole = cross_entropy(scores, targets)
    for popularity in (None, torch.randint(200, (500,)) ** 2 // 200):
        proposal = Proposal(200, popularity)
        drawn = Negatives(proposal, 199, False, 0).draw(np.arange(n), 0, 0).flatten()[:n]
        log_expected = proposal.log_probability(drawn) + math.log(n)
        found = sampled_softmax(
            scores[range(3), targets], scores[:, drawn], log_expected, drawn == targets.unsqueeze(1)
        )
        torch.testing.assert_close(found, whole, rtol=0.02, atol=0)


def test_binary_cross_entropy_by_hand():
    positive, negative = torch.tensor([math.log(3.0)]), torch.tensor([[0.0, math.log(4.0)]])
    # Sigmoids are 3/4, 1/2 and 4/5.
    plain = calibrated_bce(positive, negative, NO_HITS)
    assert plain.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 5)) / 3)
    raised = calibrated_bce(positive, negative, NO_HITS, power=0.25)
    assert raised.item() == pytest.approx(-(0.25 * math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 5)) / 3)
    hit = calibrated_bce(positive, negative, torch.tensor([[False, True]]))
    assert hit.item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)


def test_gbce_calibration_by_hand():
    # 25 of 100 other items: a rate of 1/4; t (1/4 - 1) + 1.
    assert [calibration_power(25, 101, t) for t in (0.0, 0.5, 1.0)] == [1.0, 0.625, 0.25]
    assert calibration_power(100, 101, 0.75) == 1.0, "all negatives: nothing to calibrate"


def test_gradcheck():
    torch.manual_seed(0)
    given = (
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
    )
    hits = torch.rand(3, 5) < 0.2
    assert hits.any()
    assert gradcheck(lambda p, n: sampled_softmax(p, n, torch.linspace(-1, 1, 5, dtype=torch.float64), hits), given)
    assert gradcheck(lambda p, n: calibrated_bce(p, n, hits, 0.3), given)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_scores_stay_finite(scale):
    positive = torch.tensor([scale, -scale], requires_grad=True)
    negative = torch.tensor([[-scale, scale], [scale, -scale]], requires_grad=True)
    for losses in (
        sampled_softmax(positive, negative, torch.zeros(2), NO_HITS.expand(2, 2)),
        calibrated_bce(positive, negative, NO_HITS.expand(2, 2), 0.5),
    ):
        assert torch.isfinite(losses).all()
        for gradient in torch.autograd.grad(losses.sum(), (positive, negative)):
            assert torch.isfinite(gradient).all()


# ---- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_of_a_row_depend_only_on_seed_epoch_and_row():
    rows, order = np.arange(50), np.random.default_rng(0).permutation(50)
    whole = Negatives(Proposal(1000), 9, False, seed=3).draw(rows, 2, step=100)
    parts = Negatives(Proposal(1000), 9, False, seed=3)
    parts.draw(rows, 0, 0)
    drawn = torch.cat([parts.draw(order[:20], 2, 7), parts.draw(order[20:], 2, 8)])
    assert torch.equal(drawn, whole[order])
    others = parts.draw(rows, 1, 100), Negatives(Proposal(1000), 9, False, seed=4).draw(rows, 2, 100)
    assert all((other == whole).float().mean() < 0.02 for other in others)
    assert len(whole.unique(dim=0)) == 50, "rows have negatives of their own"


def test_shared_negatives_depend_only_on_seed_and_step():
    shared = Negatives(Proposal(1000), 9, True, seed=3)
    first = shared.draw(np.arange(5), 0, 4)
    assert first.shape == (9,)
    assert torch.equal(first, shared.draw(np.arange(30, 50), 1, 4))
    assert not torch.equal(first, shared.draw(np.arange(5), 0, 5))
    assert not torch.equal(first, Negatives(Proposal(1000), 9, True, seed=4).draw(np.arange(5), 0, 4))


@pytest.mark.parametrize("popular", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_negatives_follow_the_proposal(popular, shared):
    targets = torch.arange(10).repeat_interleave(torch.arange(10))
    proposal, n_rows = Proposal(10, targets if popular else None), 4000
    negatives = Negatives(proposal, 5, shared, seed=0)
    drawn = [negatives.draw(np.arange(1 if shared else n_rows), 0, step) for step in range(n_rows if shared else 1)]
    counts = torch.cat([each.flatten() for each in drawn]).bincount(minlength=10)
    expected = 5 * n_rows * proposal.log_probability(torch.arange(10)).exp()
    assert counts.sum() == 5 * n_rows
    assert ((counts - expected) ** 2 / expected).sum() < 28  # chi-square, 9 degrees of freedom: one in a thousand


# ---- the object ------------------------------------------------------------------------------------------------------


def own(settings, model=None, seed=0):
    torch.manual_seed(0)
    model = model or SASRec(N, 8, L)
    torch.nn.init.normal_(model.output_items.weight.data[:N])
    return TaskLoss(model, settings, TRAIN.targets, seed), model


def given(n_rows=37):
    torch.manual_seed(2)
    return torch.randn(n_rows, 8), TRAIN.targets[:n_rows].long(), np.arange(n_rows)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_a_row_ignores_the_other_rows(name):
    loss, _ = own(LOSSES[name])
    users, targets, rows = given()
    whole = loss(users, targets, rows, epoch=1, step=9)
    for part in (np.arange(5), np.array([20, 3])):
        found = loss(users[part], targets[part], rows[part], epoch=1, step=9)
        torch.testing.assert_close(found, {key: values[part] for key, values in whole.items()})


@pytest.mark.parametrize("name", LOSSES)
def test_tiles_and_given_logits_give_the_same_losses(name, monkeypatch):
    loss, model = own(LOSSES[name])
    users, targets, rows = given()
    whole = loss(users, targets, rows, epoch=1, step=9)
    torch.testing.assert_close(loss(users, targets, rows, epoch=1, step=9, logits=model.score(users)), whole)
    monkeypatch.setitem(catalogue._TILE, "cpu", 12)
    with monkeypatch.context() as without:
        without.setattr(model, "score", None)  # no matrix of users by items
        blocked = loss(users, targets, rows, epoch=1, step=9)
    torch.testing.assert_close(blocked, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.n_negatives])
def test_sampled_losses_equal_their_formulas(name):
    settings = LOSSES[name].completed()
    loss, model = own(LOSSES[name])
    users, targets, rows = given()
    found = loss(users, targets, rows, epoch=1, step=9)
    popular = TRAIN.targets if settings.proposal == "popularity" else None
    negatives = Negatives(Proposal(N, popular), 8 if "bce" != name else 4, settings.sharing == "step", 0)
    drawn = negatives.draw(rows, 1, 9).expand(37, -1)
    counts = torch.bincount(TRAIN.targets, minlength=N) + 1.0 if popular is not None else torch.ones(N)
    for row in range(37):
        scores = [(users[row] @ model.output_items.weight[item]).item() for item in range(N)]
        kept = [item for item in drawn[row].tolist() if item != targets[row]]
        positive = scores[targets[row]]
        if settings.name == "sampled_softmax":
            q = counts / counts.sum()
            others = sum(math.exp(scores[item]) / (8 * q[item].item()) for item in kept)
            expected = math.log(math.exp(positive) + others) - positive
        else:
            alpha = settings.n_negatives / (N - 1)
            beta = alpha * ((settings.calibration or 0) * (1 - 1 / alpha) + 1 / alpha)
            raised = -beta * math.log1p(math.exp(-positive))
            expected = -(raised - sum(math.log1p(math.exp(scores[item])) for item in kept)) / (1 + len(kept))
        assert found.get("loss_student", found["loss"])[row].item() == pytest.approx(expected, rel=1e-4)


def test_dros_is_added_with_its_weight_and_reported_by_name():
    settings = LOSSES["gbce_by_step_dros"]
    whole, _ = own(settings)
    alone, _ = own(replace(settings, dros=DrosSettings()))
    found, without = (loss(*given(), epoch=0, step=0) for loss in (whole, alone))
    assert without.keys() == {"loss"}
    assert torch.equal(found["loss_student"], without["loss"])
    assert torch.equal(found["loss"], without["loss"] + 0.1 * found["loss_dros"])


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hinge"}, r"student\.loss\.name is 'hinge', expected 'cross_entropy', 'sampled_softmax', 'bce' or"),
        (
            {"n_negatives": 5},
            r"n_negatives is 5, which cross_entropy does not read.*sampled_softmax or bce or gbce",
        ),
        (
            {"name": "bce", "proposal": "uniform"},
            r"proposal is 'uniform', which bce does not read.*name=sampled_softmax\.",
        ),
        ({"name": "bce", "calibration": 0.5}, r"calibration is 0\.5, which bce does not read.*name=gbce\."),
        ({"sharing": "step"}, r"sharing is 'step', which cross_entropy does not read"),
        ({"name": "bce", "n_negatives": 0}, r"n_negatives is 0, expected at least 1"),
        ({"name": "gbce", "calibration": 1.5}, r"calibration is 1\.5, expected 0 to 1"),
        ({"name": "gbce", "sharing": "batch"}, r"sharing is 'batch', expected 'row' or 'step'"),
        ({"name": "sampled_softmax", "proposal": "zipf"}, r"proposal is 'zipf', expected 'uniform' or 'popularity'"),
    ],
)
def test_invalid_loss_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        LossSettings(**settings)


def test_null_options_take_the_defaults_of_the_loss():
    assert LossSettings().completed() == LossSettings()
    assert LossSettings("bce").completed() == LossSettings("bce", 1, "row")
    assert LossSettings("gbce", sharing="step").completed() == LossSettings("gbce", 256, "step", calibration=0.75)
    assert LossSettings("sampled_softmax").completed() == LossSettings("sampled_softmax", 256, "step", "uniform")


def test_more_negatives_than_items_raise(tmp_path):
    with pytest.raises(ConfigError, match=r"n_negatives is 256, expected fewer than the catalogue's 12 items"):
        train_in(tmp_path, "sampled_softmax", losses={"sampled_softmax": LossSettings("sampled_softmax")})
    own(LossSettings("gbce", N - 1))


# ---- training --------------------------------------------------------------------------------------------------------


def student(seed=0, dropout=0.2, name="sasrec"):
    torch.manual_seed(seed)
    return build_model(name, n_items=N, width=16, max_length=L, dropout=dropout)


def train_in(
    folder, name, *, kind=Engine, item_optimizer="adamw", dropout=0.2, seed=0, losses=LOSSES, model="sasrec", **changes
):
    engine = engine_in(folder, kind=kind, **{**SETTINGS, **changes})
    return train_baseline(
        student(seed, dropout, model), TRAIN, VALIDATION, engine, loss=losses[name], item_optimizer=item_optimizer
    )


@pytest.mark.parametrize(
    ("name", "item_optimizer"), [*((name, "adamw") for name in LOSSES), ("uniform_by_step", "rowwise")]
)
def test_a_simple_pattern_is_learnt_with_each_loss(tmp_path, name, item_optimizer):
    settings = {"epochs": 60, "batch_size": 64, "micro_batch_size": 64, "learning_rate": 0.02, "patience": 60}
    engine = engine_in(tmp_path, **settings)
    train, validation = counting_rows(256, N, L), counting_rows(40, N, L, seed=1)
    model = train_baseline(
        student(), train, validation, engine, loss=LOSSES[name], item_optimizer=item_optimizer, select_on="hr@1"
    )
    assert (
        ranking_metrics(rank_targets(model, counting_rows(60, N, L, seed=2), engine))["hr@1"] > 0.6
    )  # guessing: 1 in 12
    history = written(tmp_path, "validation")["history"]
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]  # DROS cannot fall below log N


@pytest.mark.parametrize("item_optimizer", ["adamw", "rowwise"])
@pytest.mark.parametrize("name", LOSSES)
def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path, name, item_optimizer):
    changes = {"item_optimizer": item_optimizer, "checkpoint_every_steps": 3}
    whole = train_in(tmp_path / "whole", name, **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", name, kind=killed_at(8), **changes)
    resumed = train_in(tmp_path / "broken", name, seed=7, **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_do_not_change_training(tmp_path, name):
    weights = [
        train_in(tmp_path / str(size), name, micro_batch_size=size, dropout=0.0, model="gru4rec", epochs=1).state_dict()
        for size in (8, 3, 1)
    ]
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0], rtol=1e-3, atol=1e-4)


def test_rowwise_optimizer_leaves_untouched_rows_unchanged(tmp_path):
    model = student()
    engine = engine_in(tmp_path, **SETTINGS)
    optimizer = student_optimizer(model, engine, "rowwise")
    before, users = model.input_items.weight.detach().clone(), torch.randn(1, 16)
    loss = TaskLoss(model, LossSettings("bce"), TRAIN.targets, 0)
    loss(users, torch.tensor([3]), np.array([0]), epoch=0, step=0)["loss"].sum().backward()
    assert model.input_items.weight.grad.is_sparse
    optimizer.step()
    moved = (model.input_items.weight != before).any(dim=1).nonzero().squeeze(1).tolist()
    (negative,) = Negatives(Proposal(N), 1, False, 0).draw(np.array([0]), 0, 0).flatten().tolist()
    assert moved == sorted({3, negative})


def test_clipping_makes_gradients_dense(tmp_path):
    model = student()
    student_optimizer(model, engine_in(tmp_path, **SETTINGS, max_grad_norm=0.5), "rowwise")
    assert not model.input_items.sparse_gradients
    train_in(tmp_path / "clipped", "bce", item_optimizer="rowwise", max_grad_norm=0.5)


def test_rowwise_optimizer_with_deepspeed_raises(tmp_path, monkeypatch):
    engine = engine_in(tmp_path, **SETTINGS)
    monkeypatch.setattr(Engine, "uses_deepspeed", True)
    with pytest.raises(ConfigError, match=r"item_optimizer is 'rowwise', which DeepSpeed does not support.*'adamw'"):
        student_optimizer(student(), engine, "rowwise")


def train_all_of_two(folder):
    for name, item_optimizer in TWO:
        model = train_in(folder / name / item_optimizer, name, item_optimizer=item_optimizer, dropout=0.0)
        save_file(dict(model.named_parameters()), folder / f"{name}_{item_optimizer}.safetensors")


TWO = [(name, "adamw") for name in LOSSES] + [("bce", "rowwise"), ("uniform_by_step", "rowwise")]


@pytest.mark.slow
def test_two_processes_equal_one_process(tmp_path):
    debug_launcher(train_all_of_two, args=(tmp_path,), num_processes=2)
    for name, item_optimizer in TWO:
        one = train_in(tmp_path / "one" / name / item_optimizer, name, item_optimizer=item_optimizer, dropout=0.0)
        two = load_file(tmp_path / f"{name}_{item_optimizer}.safetensors")
        close = [torch.isclose(two[key], weight, rtol=1e-3, atol=1e-4) for key, weight in one.named_parameters()]
        # Not all: where the true gradient is 0, such as of a key's bias, Adam makes steps of rounding errors.
        assert torch.cat([each.flatten() for each in close]).float().mean() > 0.99, name
