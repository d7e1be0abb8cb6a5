"""The objective of the released program, and the ranking losses that can take the paper's place."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_helpers import listwise, pairwise
from engine_helpers import (
    Killed,
    assert_same_weights,
    engine_in,
    killed_at,
    out_of_memory_above,
    written,
)
from small_students import (
    TEACHER,
    TRAIN,
    TRAINING,
    VALIDATION,
    WHOLE_STEPS,
    N,
    code,
    distilled,
    settings_of,
    train_in,
)

from llm2rec.core.errors import ConfigError, OutOfMemoryError
from llm2rec.distill.kd_losses import ranking_loss
from llm2rec.distill.objective import distillation_losses, objective
from llm2rec.distill.selection_policy import SelectionPolicyAll
from llm2rec.distill.settings import DistillSettings, DrosSettings, RankingSettings
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.losses import dros, sampled_bce


def rows_by_hand(n_rows=6, seed=0, dtype=torch.float64):
    """Logits and the other inputs of the losses."""
    torch.manual_seed(seed)
    logits = torch.randn(n_rows, N, dtype=dtype, requires_grad=True)
    targets, negatives = torch.arange(n_rows) % N, (torch.arange(n_rows) + 5) % N
    teacher_batch = TEACHER.batch(np.arange(n_rows), 4, targets=targets.numpy())
    return logits, targets, teacher_batch, negatives, torch.linspace(0.6, 0.9, N, dtype=dtype)


def program_by_hand(logits, targets, teacher_batch, negatives, propensity, settings):
    """The released objective as loops over rows and candidates, its broadcast as a double loop over rows."""
    n_rows, top_k, alpha = len(logits), settings.ranking.top_k, settings.dros.weight

    def log_sigmoid(x):
        return torch.log(1 / (1 + torch.exp(-x)))

    def robust(row, item):
        total = sum(torch.exp(propensity[j] * logits[row, j] ** 2) for j in range(N) if j != item)
        return torch.log(total + torch.exp(propensity[item] * (logits[row, item] - 1) ** 2))

    bce = -sum(
        log_sigmoid(logits[b, targets[b]]) + torch.log(1 - 1 / (1 + torch.exp(-logits[b, negatives[b]])))
        for b in range(n_rows)
    ) / (2 * n_rows)
    own_robust = sum(robust(b, targets[b]) for b in range(n_rows)) / n_rows
    weights = []
    for b in range(n_rows):
        best = logits[b].topk(top_k).indices.tolist()
        items, distances = teacher_batch.ranking[b].tolist(), teacher_batch.distance[b].tolist()
        ranks, sure = [math.exp(-k) for k in range(1, top_k + 1)], [math.exp(-d) + 1e-8 for d in distances]
        mixed = [
            0.3 * ranks[k] / sum(ranks) + 0.5 * sure[k] / sum(sure) + 0.1 * ((items[k] in best) + 1e-8)
            for k in range(top_k)
        ]
        weights.append([value / sum(mixed) for value in mixed])
    ranking = 0.0
    for k in range(top_k):
        for b in range(n_rows):
            told_and_not = log_sigmoid(logits[b, teacher_batch.ranking[b, k]]) + log_sigmoid(
                1 - logits[b, negatives[b]]
            )
            ranking = ranking - weights[b][k] * told_and_not / n_rows
            for other in range(n_rows):
                ranking = ranking + alpha * weights[b][k] * robust(other, teacher_batch.ranking[other, k]) / n_rows**2
    return {
        "loss_student": bce,
        "loss_dros": own_robust,
        "loss_ranking": ranking,
        "loss": bce + alpha * own_robust + settings.ranking.weight * ranking,
    }


def objective_of(settings, given, distilled=None, **more):
    logits, targets, teacher_batch, negatives, propensity = given
    distilled = torch.ones(len(logits)) if distilled is None else torch.tensor(distilled)
    return objective(
        logits, targets, teacher_batch, distilled, settings, negatives=negatives, propensity=propensity, **more
    )


def test_released_objective_equals_loops_including_gradients():
    given = rows_by_hand()
    ours, loops = objective_of(code(), given), program_by_hand(*given, code())
    assert ours.keys() == loops.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].mean(), loops[name], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ours["loss"].mean(), given[0], retain_graph=True)
    (expected,) = torch.autograd.grad(loops["loss"], given[0])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        code(),
        code(**{"dros.in_ranking": "per_row", "ranking.negative": "one_minus_probability"}),
        code(task_loss="cross_entropy"),
        DistillSettings(),
        DistillSettings(dros=DrosSettings(weight=0.5, in_ranking="per_row")),
    ],
)
def test_objective_gradcheck(settings):
    logits, *rest = rows_by_hand(3)
    assert torch.autograd.gradcheck(lambda x: objective_of(settings, (x, *rest))["loss"], (logits,))


BEYOND = {
    "listwise": code(**{"dros.in_ranking": "none", "ranking.negative": "none", "ranking.loss": "listwise"}),
    "ranknet": code(**{"dros.in_ranking": "none", "ranking.negative": "none", "ranking.loss": "ranknet"}),
    "margin": code(**{"dros.in_ranking": "none", "ranking.negative": "none", "ranking.loss": "margin"}),
}


@pytest.mark.parametrize("loss", BEYOND)
def test_other_ranking_losses_replace_only_the_ranking_term(loss):
    given, settings = rows_by_hand(), BEYOND[loss]
    logits, _, teacher_batch, negatives, _ = given
    ranked = replace(
        settings, ranking=replace(settings.ranking, negative="ranked_last" if loss != "listwise" else "none")
    )
    expected = {
        "listwise": lambda: listwise(logits, teacher_batch.ranking, teacher_batch.distance),
        "ranknet": lambda: pairwise(logits, teacher_batch.ranking, "ranknet", negatives=negatives),
        "margin": lambda: pairwise(logits, teacher_batch.ranking, "margin", negatives=negatives),
    }[loss]()
    distilled = [1.0, 0.0, 1.0, 0.0, 0.5, 0.0]
    losses = objective_of(ranked, given, distilled)
    torch.testing.assert_close(losses["loss_ranking"], torch.tensor(distilled) * expected)
    others = objective_of(code(**{"ranking.weight": 0.0}), given, distilled)
    torch.testing.assert_close(losses["loss"], others["loss"] + 0.7 * losses["loss_ranking"])


@pytest.mark.parametrize(
    ("loss", "switch", "value"),
    [
        ("listwise", "temperature", 2.0),
        ("listwise", "over", "candidates"),
        ("ranknet", "negative", "ranked_last"),
        ("margin", "negative", "ranked_last"),
        ("margin", "margin", 0.5),
    ],
)
def test_each_option_of_the_other_ranking_losses_changes_the_loss(loss, switch, value):
    given, settings = rows_by_hand(), BEYOND[loss]
    changed = replace(settings, ranking=replace(settings.ranking, **{switch: value}))
    whole, other = (objective_of(each, given)["loss"] for each in (settings, changed))
    assert not torch.allclose(whole.mean(), other.mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", BEYOND)
def test_other_ranking_losses_train_and_resume(tmp_path, loss):
    settings = replace(BEYOND[loss], task_loss="cross_entropy")
    whole = train_in(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(7))
    assert_same_weights(train_in(tmp_path / "broken", settings, seed=7).state_dict(), whole.state_dict())


SWITCHES = {
    "task_loss": "cross_entropy",
    "dros.weight": 0.25,
    "dros.beta": 2.0,
    "dros.in_ranking": "per_row",
    "ranking.weight": 0.1,
    "ranking.beta": 2.0,
    "ranking.gamma_position": 0.1,
    "ranking.gamma_confidence": 0.1,
    "ranking.gamma_consistency": 0.5,
    "ranking.confidence": "per_row",
    "ranking.normalise_consistency": True,
    "ranking.weight_floor": 0.1,
    "ranking.renormalise": False,
    "ranking.negative": "one_minus_probability",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_option_changes_the_objective(switch):
    given = rows_by_hand()
    whole, changed = (
        objective_of(settings, given)["loss"] for settings in (code(), code(**{switch: SWITCHES[switch]}))
    )
    assert not torch.allclose(whole.mean(), changed.mean(), rtol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("dros.in_ranking", "none"), ("ranking.negative", "none")])
def test_ranking_terms_can_be_disabled(name, part):
    given = rows_by_hand()
    whole, without = objective_of(code(), given), objective_of(code(**{name: part}), given)
    assert (whole["loss_ranking"] > without["loss_ranking"]).all()
    assert torch.equal(whole["loss_student"], without["loss_student"])


def test_objective_without_dros_and_ranking_equals_the_task_loss():
    given = rows_by_hand(dtype=torch.float32)
    losses = objective_of(code(**{"dros.weight": 0.0, "ranking.weight": 0.0}), given)
    assert losses.keys() == {"loss", "loss_student"}
    assert torch.equal(losses["loss"], sampled_bce(given[0], given[1], given[3]))
    robust = objective_of(code(**{"ranking.weight": 0.0}), given)
    assert torch.equal(robust["loss_dros"], dros(given[0], given[1][:, None], given[4], 1.0)[:, 0])


def test_objective_of_extreme_logits_is_finite():
    given = rows_by_hand(dtype=torch.float32)
    logits = (given[0].detach() * 1e4).requires_grad_()
    losses = objective_of(code(), (logits, *given[1:]))
    losses["loss"].mean().backward()
    assert all(torch.isfinite(values).all() for values in losses.values())
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("settings", [code(), code(**{"dros.in_ranking": "per_row"})])
def test_rows_with_weight_zero_do_not_affect_the_released_objective(settings):
    given, distilled = rows_by_hand(), [1.0, 0.0, 1.0, 0.0, 0.5, 0.0]
    logits, targets, teacher_batch, negatives, propensity = given
    losses = objective_of(settings, given, distilled)
    other = replace(teacher_batch, ranking=teacher_batch.ranking.clone(), distance=teacher_batch.distance.clone())
    for row in (1, 3, 5):
        other.ranking[row], other.distance[row] = teacher_batch.ranking[row].flip(0), 7 * teacher_batch.distance[row]
    changed = objective_of(settings, (logits, targets, other, negatives, propensity), distilled)
    assert torch.equal(losses["loss"], changed["loss"])
    own = torch.tensor(distilled) == 0
    assert torch.equal(losses["loss_ranking"][own], torch.zeros(3, dtype=torch.float64))


def test_student_top_k_can_come_from_a_pass_without_dropout():
    given = rows_by_hand()
    compared = given[0].detach().flip(1)
    losses = objective_of(code(), given, consistency_logits=compared)
    assert torch.equal(losses["loss_student"], objective_of(code(), given)["loss_student"])
    assert not torch.allclose(losses["loss_ranking"], objective_of(code(), given)["loss_ranking"])

    model = distilled(settings_of(fusion=0.0)).train()
    batch = TRAIN.batch(np.arange(20))
    teacher_batch = TEACHER.batch(np.arange(20), 4, targets=batch.targets.numpy())
    found = {}
    for dropout in (True, False):
        settings = replace(settings_of(), ranking=replace(settings_of().ranking, consistency_dropout=dropout))
        torch.manual_seed(3)
        users = model(batch.history, batch.lengths)
        found[dropout] = distillation_losses(model, users, batch, teacher_batch, torch.ones(20), settings)
    assert torch.equal(found[True]["loss_student"], found[False]["loss_student"])  # the training pass is the same
    assert not torch.equal(found[True]["loss_ranking"], found[False]["loss_ranking"])


def test_released_losses_are_logged_by_name_and_add_up(tmp_path):
    train_in(tmp_path, code(), **WHOLE_STEPS)
    for entry in written(tmp_path, "validation")["history"]:
        parts = {"train/loss_student": 1.0, "train/loss_dros": 0.5, "train/loss_ranking": 0.7}
        assert {name for name in entry if name.startswith("train/loss_")} == set(parts)
        assert entry["train/loss"] == pytest.approx(sum(w * entry[name] for name, w in parts.items()), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [code(), code(**{"ranking.confidence": "per_row", "ranking.consistency_dropout": False})]
)
@pytest.mark.parametrize(("killed_before", "every"), [(2, 0), (8, 3)])
def test_killed_and_resumed_released_objective_equals_uninterrupted_run(tmp_path, settings, killed_before, every):
    """A resumed run draws the same negatives."""
    changes = {"checkpoint_every_steps": every, **WHOLE_STEPS}
    whole = train_in(tmp_path / "whole", settings, **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(killed_before), **changes)
    resumed = train_in(tmp_path / "broken", settings, seed=7 if every else 0, **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())


def test_micro_batches_do_not_change_per_row_losses(tmp_path):
    settings = code(**{"dros.in_ranking": "per_row"})

    def losses_with(size):
        model = distilled(settings)
        model.student.dropout.p = model.student.last_block.dropout = model.student.last_block.feed_forward[-1].p = 0.0
        engine = engine_in(tmp_path / str(size), **{**TRAINING, "micro_batch_size": size})
        train_distilled(model, TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings)
        return [entry["train/loss"] for entry in written(tmp_path / str(size), "validation")["history"]]

    assert losses_with(3) == pytest.approx(losses_with(8), rel=1e-5)


def test_out_of_memory_retry_equals_smaller_micro_batches(tmp_path):
    settings = settings_of(alignment=0.4)
    expected = train_in(tmp_path / "small", settings, batch_size=8, micro_batch_size=2)
    engine = engine_in(tmp_path / "lowered", **{**TRAINING, **WHOLE_STEPS})
    model = distilled(settings)
    seen = out_of_memory_above(model, 2)
    train_distilled(model, TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings)
    assert seen[:3] == [8, 4, 2]
    assert_same_weights(model.state_dict(), expected.state_dict())


def test_broadcast_is_not_split_when_out_of_memory(tmp_path):
    model, settings = distilled(code()), code()
    out_of_memory_above(model, 4)
    with pytest.raises(OutOfMemoryError, match=r"distill\.dros\.in_ranking=broadcast needs one micro-batch per step"):
        train_distilled(
            model,
            TRAIN,
            TEACHER,
            VALIDATION,
            SelectionPolicyAll(),
            engine_in(tmp_path, **{**TRAINING, **WHOLE_STEPS}),
            settings,
        )


def test_broadcast_with_several_micro_batches_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"'broadcast'.*1 processes use 3 micro-batches.*in_ranking=per_row"):
        train_in(tmp_path, code(), batch_size=8, micro_batch_size=3)
    train_in(tmp_path / "none", code(**{"dros.weight": 0.0}), batch_size=8, micro_batch_size=3, epochs=1)


def test_needs_negatives():
    ranked = replace(settings_of(), ranking=RankingSettings(negative="one_minus_score"))
    assert [s.needs_negatives for s in (settings_of(), code(), ranked)] == [False, True, True]
    assert not replace(ranked, ranking=replace(ranked.ranking, weight=0.0)).needs_negatives
    assert not replace(settings_of(), dros=DrosSettings(weight=1.0)).robust_ranking


def test_ranking_loss_raises_only_the_candidates():
    logits = torch.zeros(1, N, requires_grad=True)
    ranking_loss(logits[:, [2, 7]], torch.tensor([[0.5, 0.5]])).sum().backward()
    assert (logits.grad < 0).nonzero()[:, 1].tolist() == [2, 7]
