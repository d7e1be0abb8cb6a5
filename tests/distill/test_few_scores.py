"""Ranking losses computed from candidates, negatives and a sum over the catalogue, without all scores in memory."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at, written
from small_students import TEACHER, TRAIN, TRAINING, VALIDATION, N, distilled, settings_of

from llm2rec.core.errors import ConfigError
from llm2rec.distill.objective import distillation_losses, objective
from llm2rec.distill.selection_policy import SelectionPolicyAll
from llm2rec.distill.settings import DrosSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student import catalogue
from llm2rec.student.settings import LossSettings
from llm2rec.student.task_loss import ScoredNegatives, TaskLoss

SAMPLED = LossSettings("sampled_softmax", 8, proposal="popularity")
FEW = {
    "candidates": {"loss": "listwise", "over": "candidates", "temperature": 2.0},
    "ranknet": {"loss": "ranknet"},
    "margin": {"loss": "margin", "negative": "ranked_last"},
    "catalogue": {"loss": "listwise", "over": "catalogue"},
    "catalogue, flat": {"loss": "listwise", "over": "catalogue", "temperature": 2.0},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use small tiles, so that a sum over the catalogue takes several."""
    monkeypatch.setitem(catalogue._TILE, "cpu", N - 1)


def settings_with(**ranking):
    return replace(settings_of(fusion=0.3), ranking=RankingSettings(weight=0.7, top_k=4, **ranking))


def trained(folder, settings, loss=SAMPLED, kind=None, seed=0, **changes):
    arguments = {**TRAINING, **changes}
    engine = engine_in(folder, **arguments) if kind is None else engine_in(folder, kind=kind, **arguments)
    policy = SelectionPolicyAll()
    return train_distilled(
        distilled(settings, seed), TRAIN, TEACHER, VALIDATION, policy, engine, settings, loss=loss
    ).state_dict()


def parts(settings, loss, rows):
    """A student in evaluation mode, and the inputs of its losses for some rows."""
    model = distilled(settings).eval()
    batch = TRAIN.batch(rows)
    users, own = model(*batch.inputs), TaskLoss(model.student, loss, TRAIN.targets, seed=0)
    teacher_batch = TEACHER.batch(rows, settings.ranking.top_k)
    negatives = torch.from_numpy(np.random.default_rng(0).integers(N, size=len(rows)))
    return model, users, batch, teacher_batch, torch.linspace(0, 1, len(rows)), own, negatives


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("loss", [SAMPLED, LossSettings()])
def test_sparse_scores_give_the_losses_and_gradients_of_all_scores(kind, loss):
    settings, rows = settings_with(**FEW[kind]), np.arange(7)
    model, users, batch, teacher_batch, weights, own, negatives = parts(settings, loss, rows)
    if negatives is not None:
        negatives[:2] = teacher_batch.ranking[:2, 1]  # candidates themselves

    def mine(**given):
        return own(users, batch.targets, rows, epoch=0, step=0, **given)

    few = distillation_losses(
        model, users, batch, teacher_batch, weights, settings, task_loss=mine, negatives=negatives
    )
    logits = model.score(users)
    plain = objective(
        logits, batch.targets, teacher_batch, weights, settings, task_losses=mine(logits=logits), negatives=negatives
    )
    assert few.keys() == plain.keys()
    for name in few:
        torch.testing.assert_close(few[name], plain[name])
    weights = [each for each in model.parameters() if each.requires_grad]
    ours, theirs = (torch.autograd.grad(each["loss"].sum(), weights, retain_graph=True) for each in (few, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampling_every_item_equals_the_catalogue(temperature):
    settings, rows = settings_with(loss="listwise", over="sampled", temperature=temperature), np.arange(7)
    model, users, batch, teacher_batch, weights, own, _ = parts(settings, SAMPLED, rows)
    logits = model.score(users)
    everything = ScoredNegatives(torch.arange(N), logits, torch.zeros(N))

    def mine(**given):
        return own(users, batch.targets, rows, epoch=0, step=0, negatives=everything, **given)

    few = distillation_losses(model, users, batch, teacher_batch, weights, settings, task_loss=mine, sampled=everything)
    plain = objective(
        logits, batch.targets, teacher_batch, weights, settings, task_losses=mine()
    )  # where all scores are there
    over_all = replace(settings, ranking=replace(settings.ranking, over="catalogue"))
    whole = objective(logits, batch.targets, teacher_batch, weights, over_all, task_losses=mine())
    for name in few:
        torch.testing.assert_close(few[name], whole[name])
        assert torch.equal(plain[name], whole[name])


@pytest.mark.parametrize(
    ("ranking", "loss", "n_sums"),
    [
        *((FEW[kind], SAMPLED, 0) for kind in ("candidates", "ranknet", "margin")),
        ({"loss": "listwise", "over": "sampled"}, SAMPLED, 0),
        (FEW["catalogue"], SAMPLED, 1),
        (FEW["catalogue"], LossSettings(), 1),  # the student's own loss has the same sum
        (FEW["catalogue, flat"], LossSettings(), 2),
    ],
)
def test_losses_do_not_score_the_catalogue(tmp_path, monkeypatch, ranking, loss, n_sums):
    class Scored(Exception):
        pass

    def refuse(self, users):
        raise Scored

    sums, plain = [], catalogue._Logsumexp.apply
    monkeypatch.setattr(catalogue._Logsumexp, "apply", lambda *given: (sums.append(given), plain(*given))[1])
    monkeypatch.setattr(DistilledStudent, "score", refuse)
    trained(tmp_path / "few", settings_with(**ranking), loss, micro_batch_size=TRAINING["batch_size"])
    trained_with = written(tmp_path / "few", "validation")
    assert all(entry["train/loss_ranking"] > 0 for entry in trained_with["history"])
    assert len(sums) == n_sums * trained_with["steps"]
    monkeypatch.setitem(catalogue._TILE, "cpu", 2**20)  # where all scores are one tile, they are no more memory
    with pytest.raises(Scored):
        trained(tmp_path / "all", settings_with(loss="listwise"))


@pytest.mark.parametrize("loss", [SAMPLED, LossSettings("bce", 3), LossSettings("gbce", 5)])
def test_sampled_listwise_student_trains_and_resumes(tmp_path, loss):
    settings = settings_with(loss="listwise", over="sampled")
    whole = trained(tmp_path / "whole", settings, loss, checkpoint_every_steps=3)
    with pytest.raises(Killed):
        trained(tmp_path / "broken", settings, loss, killed_at(7), checkpoint_every_steps=3)
    resumed = trained(tmp_path / "broken", settings, loss, seed=7, checkpoint_every_steps=3)
    assert_same_weights(resumed, whole)
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")
    history = written(tmp_path / "whole", "validation")["history"]
    for entry in history:
        total = entry["train/loss_student"] + 0.7 * entry["train/loss_ranking"]
        assert entry["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("task_loss", "loss", "cause"),
    [
        ("student", LossSettings(), r"student\.loss\.name is 'cross_entropy'"),
        ("sampled_bce", SAMPLED, r"distill\.task_loss is 'sampled_bce'"),
    ],
)
def test_sampled_listwise_without_negatives_raises(tmp_path, task_loss, loss, cause):
    settings = replace(settings_with(loss="listwise", over="sampled"), task_loss=task_loss)
    with pytest.raises(
        ConfigError, match=rf"over is 'sampled', which needs the negatives .* but {cause}.*over=catalogue"
    ):
        trained(tmp_path, settings, loss)


def test_sampled_listwise_with_dros_uses_all_scores():
    settings = replace(settings_with(loss="listwise", over="sampled"), dros=DrosSettings(weight=0.3))
    rows, propensity = np.arange(7), torch.linspace(0.1, 1, N)
    model, users, batch, teacher_batch, weights, own, _ = parts(settings, SAMPLED, rows)
    sampled = own.negatives(users, rows, epoch=0, step=0)

    def losses(settings):
        mine = partial(own, users, batch.targets, rows, epoch=0, step=0, negatives=sampled)
        given = {"task_loss": mine, "sampled": sampled, "propensity": propensity}
        return distillation_losses(model, users, batch, teacher_batch, weights, settings, **given)

    ours = losses(settings)
    whole = losses(replace(settings, ranking=replace(settings.ranking, over="catalogue")))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)
