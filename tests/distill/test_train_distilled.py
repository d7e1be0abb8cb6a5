import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import (
    Killed,
    assert_same_weights,
    counting_rows,
    engine_in,
    killed_at,
    with_targets,
    written,
)
from small_students import (
    TEACHER,
    TRAIN,
    TRAINING,
    VALIDATION,
    WHOLE_STEPS,
    K,
    L,
    N,
    code,
    distilled,
    plain,
    settings_of,
    train_in,
)

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.kd_losses import alignment_loss
from llm2rec.distill.objective import distillation_losses
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll
from llm2rec.distill.settings import (
    DrosSettings,
)
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student import settings as student_settings
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import cross_entropy
from llm2rec.student.models import MODELS
from llm2rec.student.settings import LossSettings
from llm2rec.student.trainer_baseline import train_baseline

BOTH_WAYS = [
    settings_of(),
    settings_of(ranking=0.0),
    settings_of(fusion=0.0),
    settings_of(ranking=0.0, fusion=0.0, alignment=0.4),
    settings_of(alignment=0.4, kind="mse"),
]


@pytest.mark.parametrize("settings", BOTH_WAYS)
def test_each_loss_is_logged_by_name_and_adds_up(tmp_path, settings):
    train_in(tmp_path, settings)
    ranking, alignment = settings.ranking.weight, settings.embedding.alignment_weight
    for entry in written(tmp_path, "validation")["history"]:
        parts = {"train/loss_student": 1.0}
        parts |= {"train/loss_ranking": ranking} if ranking else {}
        parts |= {"train/loss_alignment": alignment} if alignment else {}
        assert {name for name in entry if name.startswith("train/loss_")} == set(parts)
        total = sum(weight * entry[name] for name, weight in parts.items())
        assert entry["train/loss"] == pytest.approx(total, rel=1e-5)
        assert all(entry[name] > 0 for name in parts)


def test_training_without_distillation_equals_the_baseline_exactly(tmp_path):
    settings = settings_of(ranking=0.0, fusion=0.0)
    model = train_in(tmp_path / "distilled", settings, max_grad_norm=0.5)
    baseline = train_baseline(plain(), TRAIN, VALIDATION, engine_in(tmp_path / "plain", **TRAINING, max_grad_norm=0.5))
    assert_same_weights(model.student.state_dict(), baseline.state_dict())
    ours, theirs = (written(tmp_path / folder, "validation") for folder in ("distilled", "plain"))
    for entry in ours["history"]:
        assert entry.pop("train/loss_student") == entry["train/loss"]
    assert ours == theirs


@pytest.mark.parametrize("loss", [LossSettings("bce", 3), LossSettings(dros=student_settings.DrosSettings(weight=0.2))])
def test_distilled_student_uses_the_task_loss_of_the_baseline(tmp_path, loss):
    def trained(name, settings):
        engine = engine_in(tmp_path / name, **TRAINING)
        return train_distilled(
            distilled(settings), TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings, loss=loss
        ).student.state_dict()

    baseline = train_baseline(plain(), TRAIN, VALIDATION, engine_in(tmp_path / "plain", **TRAINING), loss=loss)
    assert_same_weights(trained("alone", settings_of(ranking=0.0, fusion=0.0)), baseline.state_dict())
    trained("ranked", settings_of(fusion=0.0))
    own, ranked = (written(tmp_path / name, "validation")["history"][0] for name in ("plain", "ranked"))
    assert {"train/loss_student", "train/loss_ranking"} <= ranked.keys()
    assert ("train/loss_dros" in ranked) == ("train/loss_dros" in own) == (loss.dros.weight > 0)
    fixed = replace(settings_of(ranking=0.0, fusion=0.0), task_loss="cross_entropy")
    plain_ce = train_baseline(plain(), TRAIN, VALIDATION, engine_in(tmp_path / "ce", **TRAINING))
    assert_same_weights(trained("fixed", fixed), plain_ce.state_dict())


@pytest.mark.parametrize(
    ("dros", "message"),
    [
        (DrosSettings(weight=0.5), r"student\.loss\.dros\.weight is 0\.2 and distill\.dros\.weight is 0\.5"),
        (
            DrosSettings(in_ranking="per_row"),
            r"'per_row'.*weight` is 0; set `distill\.dros\.weight=0\.2`",
        ),
    ],
)
def test_conflicting_dros_settings_raise(tmp_path, dros, message):
    settings = replace(settings_of(), dros=dros)
    loss = LossSettings(dros=student_settings.DrosSettings(weight=0.2))
    with pytest.raises(ConfigError, match=message):
        train_distilled(
            distilled(settings),
            TRAIN,
            TEACHER,
            VALIDATION,
            SelectionPolicyAll(),
            engine_in(tmp_path),
            settings,
            loss=loss,
        )


def losses_of(settings, weights=None, teacher=TEACHER, model=None):
    model = model or distilled(settings, teacher=teacher)
    model.eval()
    rows = np.arange(6)
    batch = TRAIN.batch(rows)
    counted = torch.ones(6) if weights is None else torch.tensor(weights)
    users = model(batch.history, batch.lengths)
    told = teacher.batch(rows, settings.ranking.top_k, targets=batch.targets.numpy())
    return distillation_losses(model, users, batch, told, counted, settings), model, batch


def test_zero_weights_leave_the_task_loss_exactly():
    losses, model, batch = losses_of(settings_of(ranking=0.0, alignment=0.0))
    own = cross_entropy(model.score(model(batch.history, batch.lengths)), batch.targets)
    assert torch.equal(losses["loss"], own)
    assert losses.keys() == {"loss", "loss_student"}


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_losses_of_a_row_by_hand(kind):
    settings = settings_of(ranking=0.5, alignment=0.25, kind=kind, top_k=3)
    with torch.no_grad():
        losses, model, batch = losses_of(settings)
        logits = model.score(model(batch.history, batch.lengths))
        for row in range(6):
            best = logits[row].topk(3).indices.tolist()
            stored, target = TEACHER.ranking[row].tolist(), int(batch.targets[row])
            distance = TEACHER.distance[row, stored.index(target) if target in stored else -1]
            told = sum(
                (
                    0.3 * math.exp(-rank) / sum(math.exp(-r) for r in range(3))
                    + 0.5 * math.exp(-distance)
                    + 0.1 * (item in best)
                )
                * -math.log(1 / (1 + math.exp(-logits[row, item].item())))
                for rank, item in enumerate(stored[:3])
            )
            target = batch.targets[row : row + 1]
            aligned = alignment_loss(model.projected(target)["input"], TEACHER.embeddings[target], kind).item()
            own = -logits[row].log_softmax(0)[target].item()
            assert losses["loss_ranking"][row].item() == pytest.approx(told, rel=1e-5)
            assert losses["loss_alignment"][row].item() == pytest.approx(aligned, rel=1e-5)
            assert losses["loss_student"][row].item() == pytest.approx(own, rel=1e-5)
            assert losses["loss"][row].item() == pytest.approx(own + 0.5 * told + 0.25 * aligned, rel=1e-5)


def test_only_top_k_candidates_are_used():
    settings = settings_of(top_k=2)
    settings = replace(settings, ranking=replace(settings.ranking, confidence="per_candidate"))
    changed = TEACHER.ranking.copy()
    changed[:, 2:] = changed[:, 2:][:, ::-1]
    other = TeacherOutputs(TEACHER.embeddings, changed, TEACHER.distance, {})
    model = distilled(settings)
    first, second = (losses_of(settings, teacher=t, model=model)[0]["loss"] for t in (TEACHER, other))
    assert torch.equal(first, second)
    other.ranking[:, :2] = other.ranking[:, :2][:, ::-1].copy()
    assert not torch.equal(losses_of(settings, teacher=other, model=model)[0]["loss"], first)


def test_rows_with_weight_zero_are_not_distilled():
    settings = settings_of(alignment=0.4)
    weights = [1.0, 0.0, 1.0, 0.0, 0.5, 0.0]
    whole, model, _ = losses_of(settings)
    chosen, _, _ = losses_of(settings, weights, model=model)
    for name in ("loss_ranking", "loss_alignment"):
        torch.testing.assert_close(chosen[name], torch.tensor(weights) * whole[name])
    own = torch.tensor(weights) == 0
    assert torch.equal(chosen["loss"][own], chosen["loss_student"][own])

    def gradients(teacher):
        losses, _, _ = losses_of(settings, weights, teacher=teacher, model=model)
        return torch.autograd.grad(losses["loss"].sum(), list(model.parameters()), allow_unused=True)

    ranking, distance = TEACHER.ranking.copy(), TEACHER.distance.copy()
    for row in (1, 3, 5):  # whatever the teacher says of them
        ranking[row], distance[row] = ranking[row, ::-1].copy(), distance[row, ::-1].copy() * 50
    other = TeacherOutputs(TEACHER.embeddings, ranking, distance, {})
    for ours, theirs in zip(gradients(TEACHER), gradients(other), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


class Nobody(SelectionPolicy):
    def weights(self, evidence):
        return np.zeros(evidence.n_rows, np.float32)


def test_policy_that_selects_no_rows_trains_the_baseline(tmp_path):
    model = train_in(tmp_path / "nobody", settings_of(fusion=0.0), policy=Nobody())
    same = train_in(tmp_path / "plain", settings_of(ranking=0.0, fusion=0.0))
    other = train_in(tmp_path / "all", settings_of(fusion=0.0))
    assert_same_weights(model.state_dict(), same.state_dict())
    assert not torch.equal(other.student.input_items.weight, same.student.input_items.weight)
    assert {entry["train/loss_ranking"] for entry in written(tmp_path / "nobody", "validation")["history"]} == {0}


class Odd(SelectionPolicy):
    def weights(self, evidence):
        return (np.arange(evidence.n_rows) % 2).astype(np.float32)


def test_row_weights_follow_row_numbers(tmp_path):
    """Teacher outputs of rows that are not selected do not change the training; those of selected rows do."""

    def trained(name, changed):
        ranking = TEACHER.ranking.copy()
        ranking[changed] = ranking[changed][:, ::-1]
        teacher = TeacherOutputs(TEACHER.embeddings, ranking, TEACHER.distance, {})
        return train_in(tmp_path / name, settings_of(), policy=Odd(), teacher=teacher).state_dict()

    odd = np.arange(len(TRAIN)) % 2 == 1
    nothing = trained("nothing", np.zeros(len(TRAIN), bool))
    assert_same_weights(trained("left_out", ~odd), nothing)
    chosen = trained("chosen", odd)
    assert any(not torch.equal(chosen[name], nothing[name]) for name in nothing)


class ByEpoch(SelectionPolicy):
    """Selects other rows in every epoch and records the epochs."""

    def __init__(self):
        self.asked = []

    def weights(self, evidence):
        self.asked.append((evidence.n_rows, evidence.epoch))
        return (np.arange(evidence.n_rows) % 3 == evidence.epoch % 3).astype(np.float32)


def test_policy_is_called_once_per_epoch(tmp_path):
    policy = ByEpoch()
    train_in(tmp_path, settings_of(), policy=policy, epochs=3)
    assert policy.asked == [(37, 0), (37, 1), (37, 2)]


@pytest.mark.parametrize("settings", [settings_of(), settings_of(ranking=0.3, fusion=0.2, alignment=0.4, kind="mse")])
@pytest.mark.parametrize(("killed_before", "every"), [(2, 0), (8, 3), (5, 1)])
def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path, settings, killed_before, every):
    changes = {"checkpoint_every_steps": every, "max_grad_norm": 0.5}
    whole = train_in(tmp_path / "whole", settings, policy=ByEpoch(), **changes)
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        train_in(broken, settings, kind=killed_at(killed_before), policy=ByEpoch(), **changes)
    resumed = train_in(broken, settings, seed=7 if every else 0, policy=ByEpoch(), **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert written(broken, "validation") == written(tmp_path / "whole", "validation")


@pytest.mark.parametrize("settings", [settings_of(alignment=0.4), code()])
@pytest.mark.parametrize("name", MODELS)
def test_every_student_can_be_distilled_and_resumed(tmp_path, name, settings):
    changes = {"name": name, **WHOLE_STEPS, "checkpoint_every_steps": 3}
    whole = train_in(tmp_path / "whole", settings, **changes)
    before, after = distilled(settings, name=name).state_dict(), whole.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(7), **changes)
    resumed = train_in(tmp_path / "broken", settings, seed=7, **changes)
    assert_same_weights(resumed.state_dict(), after)
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


@pytest.mark.parametrize("initialise", ["pca", "whitened"])
@pytest.mark.parametrize("alignment_sides", ["output", "both"])
def test_every_form_of_embedding_distillation_trains_and_resumes(tmp_path, initialise, alignment_sides):
    changes = {"fusion_sides": "output", "alignment_sides": alignment_sides, "initialise": initialise}
    base = settings_of(alignment=0.4, kind="contrastive")
    settings = replace(base, embedding=replace(base.embedding, **changes))
    whole = train_in(tmp_path / "whole", settings)
    assert all(entry["train/loss_alignment"] > 0 for entry in written(tmp_path / "whole", "validation")["history"])
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(7))
    assert_same_weights(train_in(tmp_path / "broken", settings, seed=7).state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", ["sasrec", "caser"])  # GRU4Rec learns too slowly for so few steps
def test_teacher_helps_if_targets_are_random(tmp_path, name):
    """Targets are random, and the teacher knows the next item."""
    train, test = counting_rows(150, N, L), counting_rows(60, N, L, seed=3)
    right = train.targets
    train = with_targets(train, np.random.default_rng(0).integers(N, size=150))
    ranking = np.stack([np.roll(np.arange(N), -int(item))[:K] for item in right]).astype(np.int32)
    distance = np.tile(np.arange(K, dtype=np.float32) * 3, (150, 1))
    teacher = TeacherOutputs(TEACHER.embeddings, ranking, distance, {})
    found = {}
    for weight in (0.0, 5.0):
        settings = settings_of(ranking=weight, fusion=0.0, top_k=1)
        engine = engine_in(tmp_path / str(weight), epochs=15, batch_size=50, micro_batch_size=50, learning_rate=0.02)
        model = distilled(settings, teacher=teacher, name=name)
        train_distilled(model, train, teacher, test, SelectionPolicyAll(), engine, settings)
        found[weight] = ranking_metrics(rank_targets(model.student, test, engine))["ndcg@10"]
    assert found[5.0] > found[0.0] + 0.15
