import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_helpers import teacher_for
from engine_helpers import (
    Killed,
    assert_same_weights,
    counting_rows,
    engine_in,
    killed_at,
    out_of_memory_above,
    random_rows,
    written,
)

from llm2rec.core.engine import Engine
from llm2rec.core.errors import ConfigError, OutOfMemoryError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.kd_losses import alignment_loss, listwise_loss, pairwise_loss, ranking_loss
from llm2rec.distill.selection_policy import SelectionPolicy, SelectionPolicyAll
from llm2rec.distill.settings import (
    DistillSettings,
    DLLM2RecCodeSettings,
    DrosSettings,
    EmbeddingSettings,
    RankingSettings,
)
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import distillation_losses, objective, train_distilled
from llm2rec.student import settings as student_settings
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.losses import cross_entropy, dros, sampled_bce
from llm2rec.student.models import MODELS, build_model
from llm2rec.student.settings import LossSettings
from llm2rec.student.trainer_baseline import train_baseline

N, L, K = 12, 4, 5
TRAIN, VALIDATION = random_rows(37, N, L), random_rows(20, N, L, seed=1)
TEACHER = teacher_for(len(TRAIN), N, K)
TRAINING = {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01}


def settings_of(*, ranking=0.5, fusion=0.3, alignment=0.0, kind="cosine", top_k=4):
    return DistillSettings(
        teacher_outputs="unused",
        ranking=RankingSettings(weight=ranking, top_k=top_k),
        embedding=EmbeddingSettings(fusion_scale=fusion, alignment_weight=alignment, alignment=kind),
    )


def code(**changes):
    """What `distill=dllm2rec_code` sets, at sizes of these tests; changes of switches by dotted name."""
    settings = DLLM2RecCodeSettings(teacher_outputs="unused")
    for name, value in {"ranking.top_k": 4, **changes}.items():
        group, _, key = name.rpartition(".")
        part = getattr(settings, group) if group else settings
        changed = replace(part, **{key: value})
        settings = replace(settings, **{group: changed}) if group else changed
    return settings


WHOLE_STEPS = {"batch_size": 8, "micro_batch_size": 8}  # what the program's broadcast needs


def plain(seed=0, tie_items=True, name="sasrec"):
    torch.manual_seed(seed)
    return build_model(name, n_items=N, width=16, max_length=L, dropout=0.2, tie_items=tie_items)


def distilled(settings, seed=0, teacher=TEACHER, name="sasrec"):
    return DistilledStudent(
        plain(seed, not settings.embedding.unties, name),
        teacher.embeddings,
        fusion_scale=settings.embedding.fusion_scale,
        align=settings.embedding.alignment_weight > 0,
        fusion_sides=settings.embedding.fusion_sides,
        alignment_sides=settings.embedding.alignment_sides,
        initialise=settings.embedding.initialise,
    )


def train_in(folder, settings, *, kind=Engine, seed=0, policy=None, teacher=TEACHER, name="sasrec", **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    model = distilled(settings, seed, teacher, name)
    return train_distilled(model, TRAIN, teacher, VALIDATION, policy or SelectionPolicyAll(), engine, settings)


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


def test_without_any_distillation_it_is_the_baseline_bit_for_bit(tmp_path):
    settings = settings_of(ranking=0.0, fusion=0.0)
    model = train_in(tmp_path / "distilled", settings, max_grad_norm=0.5)
    baseline = train_baseline(plain(), TRAIN, VALIDATION, engine_in(tmp_path / "plain", **TRAINING, max_grad_norm=0.5))
    assert_same_weights(model.student.state_dict(), baseline.state_dict())
    ours, theirs = (written(tmp_path / folder, "validation") for folder in ("distilled", "plain"))
    for entry in ours["history"]:
        assert entry.pop("train/loss_student") == entry["train/loss"]
    assert ours == theirs


@pytest.mark.parametrize("loss", [LossSettings("bce", 3), LossSettings(dros=student_settings.DrosSettings(weight=0.2))])
def test_a_distilled_student_has_its_baselines_own_task(tmp_path, loss):
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
    fixed = replace(settings_of(ranking=0.0, fusion=0.0), own_loss="cross_entropy")
    plain_ce = train_baseline(plain(), TRAIN, VALIDATION, engine_in(tmp_path / "ce", **TRAINING))
    assert_same_weights(trained("fixed", fixed), plain_ce.state_dict())


def test_dros_twice_is_refused(tmp_path):
    settings = replace(settings_of(), dros=DrosSettings(weight=0.5))
    loss = LossSettings(dros=student_settings.DrosSettings(weight=0.2))
    with pytest.raises(ConfigError, match=r"student\.loss\.dros\.weight is 0\.2 and distill\.dros\.weight is 0\.5"):
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
    told = teacher.batch(rows, settings.ranking.top_k)
    return distillation_losses(model, users, batch, told, counted, settings), model, batch


def test_weights_zero_leave_the_students_own_loss_exactly():
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
            ranking, distance = TEACHER.ranking[row, :3].tolist(), TEACHER.distance[row, :3].tolist()
            shares = [
                0.3 * math.exp(-rank) / sum(math.exp(-r) for r in range(3))
                + 0.5 * math.exp(-distance[rank]) / sum(math.exp(-d) for d in distance)
                + 0.1 * (item in best)
                for rank, item in enumerate(ranking)
            ]
            told = sum(
                share / sum(shares) * -math.log(1 / (1 + math.exp(-logits[row, item].item())))
                for share, item in zip(shares, ranking, strict=True)
            )
            target = batch.targets[row : row + 1]
            aligned = alignment_loss(model.projected(target)["input"], TEACHER.embeddings[target], kind).item()
            own = -logits[row].log_softmax(0)[target].item()
            assert losses["loss_ranking"][row].item() == pytest.approx(told, rel=1e-5)
            assert losses["loss_alignment"][row].item() == pytest.approx(aligned, rel=1e-5)
            assert losses["loss_student"][row].item() == pytest.approx(own, rel=1e-5)
            assert losses["loss"][row].item() == pytest.approx(own + 0.5 * told + 0.25 * aligned, rel=1e-5)


def test_only_top_k_candidates_count():
    settings = settings_of(top_k=2)
    changed = TEACHER.ranking.copy()
    changed[:, 2:] = changed[:, 2:][:, ::-1]
    other = TeacherOutputs(TEACHER.embeddings, changed, TEACHER.distance, {})
    model = distilled(settings)
    first, second = (losses_of(settings, teacher=t, model=model)[0]["loss"] for t in (TEACHER, other))
    assert torch.equal(first, second)
    other.ranking[:, :2] = other.ranking[:, :2][:, ::-1].copy()
    assert not torch.equal(losses_of(settings, teacher=other, model=model)[0]["loss"], first)


def test_rows_of_weight_zero_tell_nothing():
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


def test_a_policy_that_chooses_nobody_trains_the_plain_student(tmp_path):
    model = train_in(tmp_path / "nobody", settings_of(fusion=0.0), policy=Nobody())
    same = train_in(tmp_path / "plain", settings_of(ranking=0.0, fusion=0.0))
    other = train_in(tmp_path / "all", settings_of(fusion=0.0))
    assert_same_weights(model.state_dict(), same.state_dict())
    assert not torch.equal(other.student.input_items.weight, same.student.input_items.weight)
    assert {entry["train/loss_ranking"] for entry in written(tmp_path / "nobody", "validation")["history"]} == {0}


class Odd(SelectionPolicy):
    def weights(self, evidence):
        return (np.arange(evidence.n_rows) % 2).astype(np.float32)


def test_rows_are_chosen_by_the_policy_and_not_by_their_place_in_a_batch(tmp_path):
    """What the teacher says of rows that are not chosen changes nothing in a whole training, the rest does."""

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
    """Other rows in every epoch; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def weights(self, evidence):
        self.asked.append((evidence.n_rows, evidence.epoch))
        return (np.arange(evidence.n_rows) % 3 == evidence.epoch % 3).astype(np.float32)


def test_a_policy_is_asked_once_an_epoch(tmp_path):
    policy = ByEpoch()
    train_in(tmp_path, settings_of(), policy=policy, epochs=3)
    assert policy.asked == [(37, 0), (37, 1), (37, 2)]


@pytest.mark.parametrize("settings", [settings_of(), settings_of(ranking=0.3, fusion=0.2, alignment=0.4, kind="mse")])
@pytest.mark.parametrize(("killed_before", "every"), [(2, 0), (8, 3), (5, 1)])
def test_a_killed_run_ends_like_the_unbroken_one(tmp_path, settings, killed_before, every):
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
def test_every_form_of_embedding_distillation_is_trained_and_resumed(tmp_path, initialise, alignment_sides):
    changes = {"fusion_sides": "output", "alignment_sides": alignment_sides, "initialise": initialise}
    base = settings_of(alignment=0.4, kind="contrastive")
    settings = replace(base, embedding=replace(base.embedding, **changes))
    whole = train_in(tmp_path / "whole", settings)
    assert all(entry["train/loss_alignment"] > 0 for entry in written(tmp_path / "whole", "validation")["history"])
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(7))
    assert_same_weights(train_in(tmp_path / "broken", settings, seed=7).state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", ["sasrec", "caser"])  # GRU4Rec learns too slowly for so few steps
def test_a_good_teacher_helps_where_targets_are_noise(tmp_path, name):
    """Targets say nothing, the teacher knows what comes next."""
    train, test = counting_rows(150, N, L), counting_rows(60, N, L, seed=3)
    right = train.targets.clone()
    train.targets[:] = torch.from_numpy(np.random.default_rng(0).integers(N, size=150).astype(np.int32))
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


# ---- the released program --------------------------------------------------------------------------------------------


def rows_by_hand(n_rows=6, seed=0, dtype=torch.float64):
    """Logits and all that a loss of theirs may ask for."""
    torch.manual_seed(seed)
    logits = torch.randn(n_rows, N, dtype=dtype, requires_grad=True)
    targets, negatives = torch.arange(n_rows) % N, (torch.arange(n_rows) + 5) % N
    told = TEACHER.batch(np.arange(n_rows), 4, targets=targets.numpy())
    return logits, targets, told, negatives, torch.linspace(0.6, 0.9, N, dtype=dtype)


def program_by_hand(logits, targets, told, negatives, propensity, settings):
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
        items, distances = told.ranking[b].tolist(), told.distance[b].tolist()
        ranks, sure = [math.exp(-k) for k in range(1, top_k + 1)], [math.exp(-d) + 1e-8 for d in distances]
        mixed = [
            0.3 * ranks[k] / sum(ranks) + 0.5 * sure[k] / sum(sure) + 0.1 * ((items[k] in best) + 1e-8)
            for k in range(top_k)
        ]
        weights.append([value / sum(mixed) for value in mixed])
    ranking = 0.0
    for k in range(top_k):
        for b in range(n_rows):
            told_and_not = log_sigmoid(logits[b, told.ranking[b, k]]) + log_sigmoid(1 - logits[b, negatives[b]])
            ranking = ranking - weights[b][k] * told_and_not / n_rows
            for other in range(n_rows):
                ranking = ranking + alpha * weights[b][k] * robust(other, told.ranking[other, k]) / n_rows**2
    return {
        "loss_student": bce,
        "loss_dros": own_robust,
        "loss_ranking": ranking,
        "loss": bce + alpha * own_robust + settings.ranking.weight * ranking,
    }


def objective_of(settings, given, distilled=None, **more):
    logits, targets, told, negatives, propensity = given
    distilled = torch.ones(len(logits)) if distilled is None else torch.tensor(distilled)
    return objective(logits, targets, told, distilled, settings, negatives=negatives, propensity=propensity, **more)


def test_the_programs_objective_agrees_with_loops_gradients_included():
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
    [code(), code(**{"dros.in_ranking": "per_row", "ranking.negative": "one_minus_probability"})],
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
def test_other_ranking_losses_take_the_papers_place_and_leave_the_rest(loss):
    given, settings = rows_by_hand(), BEYOND[loss]
    logits, _, told, negatives, _ = given
    ranked = replace(
        settings, ranking=replace(settings.ranking, negative="ranked_last" if loss != "listwise" else "none")
    )
    expected = {
        "listwise": lambda: listwise_loss(logits, told.ranking, told.distance),
        "ranknet": lambda: pairwise_loss(logits, told.ranking, "ranknet", negatives=negatives),
        "margin": lambda: pairwise_loss(logits, told.ranking, "margin", negatives=negatives),
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
def test_each_switch_of_the_other_ranking_losses_changes_them(loss, switch, value):
    given, settings = rows_by_hand(), BEYOND[loss]
    changed = replace(settings, ranking=replace(settings.ranking, **{switch: value}))
    whole, other = (objective_of(each, given)["loss"] for each in (settings, changed))
    assert not torch.allclose(whole.mean(), other.mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", BEYOND)
def test_other_ranking_losses_are_trained_and_resumed(tmp_path, loss):
    settings = replace(BEYOND[loss], own_loss="cross_entropy")
    whole = train_in(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(7))
    assert_same_weights(train_in(tmp_path / "broken", settings, seed=7).state_dict(), whole.state_dict())


SWITCHES = {
    "own_loss": "cross_entropy",
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
def test_each_switch_changes_the_objective(switch):
    given = rows_by_hand()
    whole, changed = (
        objective_of(settings, given)["loss"] for settings in (code(), code(**{switch: SWITCHES[switch]}))
    )
    assert not torch.allclose(whole.mean(), changed.mean(), rtol=1e-5)


@pytest.mark.parametrize(("name", "part"), [("dros.in_ranking", "none"), ("ranking.negative", "none")])
def test_terms_of_the_ranking_loss_can_be_left_out(name, part):
    given = rows_by_hand()
    whole, without = objective_of(code(), given), objective_of(code(**{name: part}), given)
    assert (whole["loss_ranking"] > without["loss_ranking"]).all()
    assert torch.equal(whole["loss_student"], without["loss_student"])


def test_without_dros_and_ranking_the_own_loss_is_left_exactly():
    given = rows_by_hand(dtype=torch.float32)
    losses = objective_of(code(**{"dros.weight": 0.0, "ranking.weight": 0.0}), given)
    assert losses.keys() == {"loss", "loss_student"}
    assert torch.equal(losses["loss"], sampled_bce(given[0], given[1], given[3]))
    robust = objective_of(code(**{"ranking.weight": 0.0}), given)
    assert torch.equal(robust["loss_dros"], dros(given[0], given[1][:, None], given[4], 1.0)[:, 0])


def test_extreme_logits_leave_the_objective_finite():
    given = rows_by_hand(dtype=torch.float32)
    logits = (given[0].detach() * 1e4).requires_grad_()
    losses = objective_of(code(), (logits, *given[1:]))
    losses["loss"].mean().backward()
    assert all(torch.isfinite(values).all() for values in losses.values())
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("settings", [code(), code(**{"dros.in_ranking": "per_row"})])
def test_rows_that_are_not_distilled_tell_the_program_nothing(settings):
    given, distilled = rows_by_hand(), [1.0, 0.0, 1.0, 0.0, 0.5, 0.0]
    logits, targets, told, negatives, propensity = given
    losses = objective_of(settings, given, distilled)
    other = replace(told, ranking=told.ranking.clone(), distance=told.distance.clone())
    for row in (1, 3, 5):
        other.ranking[row], other.distance[row] = told.ranking[row].flip(0), 7 * told.distance[row]
    changed = objective_of(settings, (logits, targets, other, negatives, propensity), distilled)
    assert torch.equal(losses["loss"], changed["loss"])
    own = torch.tensor(distilled) == 0
    assert torch.equal(losses["loss_ranking"][own], torch.zeros(3, dtype=torch.float64))


def test_the_students_list_may_come_from_a_pass_without_dropout():
    given = rows_by_hand()
    compared = given[0].detach().flip(1)
    losses = objective_of(code(), given, compared=compared)
    assert torch.equal(losses["loss_student"], objective_of(code(), given)["loss_student"])
    assert not torch.allclose(losses["loss_ranking"], objective_of(code(), given)["loss_ranking"])

    model = distilled(settings_of(fusion=0.0)).train()
    batch, told = TRAIN.batch(np.arange(20)), TEACHER.batch(np.arange(20), 4)
    found = {}
    for dropout in (True, False):
        settings = replace(settings_of(), ranking=replace(settings_of().ranking, consistency_dropout=dropout))
        torch.manual_seed(3)
        users = model(batch.history, batch.lengths)
        found[dropout] = distillation_losses(model, users, batch, told, torch.ones(20), settings)
    assert torch.equal(found[True]["loss_student"], found[False]["loss_student"])  # the training pass is the same
    assert not torch.equal(found[True]["loss_ranking"], found[False]["loss_ranking"])


def test_the_programs_losses_are_logged_by_name_and_add_up(tmp_path):
    train_in(tmp_path, code(), **WHOLE_STEPS)
    for entry in written(tmp_path, "validation")["history"]:
        parts = {"train/loss_student": 1.0, "train/loss_dros": 0.5, "train/loss_ranking": 0.7}
        assert {name for name in entry if name.startswith("train/loss_")} == set(parts)
        assert entry["train/loss"] == pytest.approx(sum(w * entry[name] for name, w in parts.items()), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [code(), code(**{"ranking.confidence": "per_row", "ranking.consistency_dropout": False})]
)
@pytest.mark.parametrize(("killed_before", "every"), [(2, 0), (8, 3)])
def test_a_killed_run_of_the_program_ends_like_the_unbroken_one(tmp_path, settings, killed_before, every):
    """Negatives are drawn again as they were."""
    changes = {"checkpoint_every_steps": every, **WHOLE_STEPS}
    whole = train_in(tmp_path / "whole", settings, **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", settings, kind=killed_at(killed_before), **changes)
    resumed = train_in(tmp_path / "broken", settings, seed=7 if every else 0, **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())


def test_micro_batches_change_nothing_where_no_loss_is_about_a_whole_step(tmp_path):
    settings = code(**{"dros.in_ranking": "per_row"})

    def losses_with(size):
        model = distilled(settings)
        model.student.dropout.p = model.student.last_block.dropout = model.student.last_block.feed_forward[-1].p = 0.0
        engine = engine_in(tmp_path / str(size), **{**TRAINING, "micro_batch_size": size})
        train_distilled(model, TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings)
        return [entry["train/loss"] for entry in written(tmp_path / str(size), "validation")["history"]]

    assert losses_with(3) == pytest.approx(losses_with(8), rel=1e-5)


def test_a_gpu_that_is_too_small_distils_the_same_student_as_smaller_micro_batches(tmp_path):
    settings = settings_of(alignment=0.4)
    expected = train_in(tmp_path / "small", settings, batch_size=8, micro_batch_size=2)
    engine = engine_in(tmp_path / "lowered", **{**TRAINING, **WHOLE_STEPS})
    model = distilled(settings)
    seen = out_of_memory_above(model, 2)
    train_distilled(model, TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings)
    assert seen[:3] == [8, 4, 2]
    assert_same_weights(model.state_dict(), expected.state_dict())


def test_a_broadcast_is_not_divided_by_a_gpu_that_is_too_small(tmp_path):
    model, settings = distilled(code()), code()
    out_of_memory_above(model, 4)
    with pytest.raises(OutOfMemoryError, match=r"distill\.dros\.in_ranking=broadcast needs each step in one piece"):
        train_distilled(
            model,
            TRAIN,
            TEACHER,
            VALIDATION,
            SelectionPolicyAll(),
            engine_in(tmp_path, **{**TRAINING, **WHOLE_STEPS}),
            settings,
        )


def test_a_broadcast_over_parts_of_a_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'broadcast'.*1 processes take 3 micro-batches.*in_ranking=per_row"):
        train_in(tmp_path, code(), batch_size=8, micro_batch_size=3)
    train_in(tmp_path / "none", code(**{"dros.weight": 0.0}), batch_size=8, micro_batch_size=3, epochs=1)


def test_only_settings_that_need_them_ask_for_negatives():
    ranked = replace(settings_of(), ranking=RankingSettings(negative="one_minus_score"))
    assert [s.needs_negatives for s in (settings_of(), code(), ranked)] == [False, True, True]
    assert not replace(ranked, ranking=replace(ranked.ranking, weight=0.0)).needs_negatives
    assert not replace(settings_of(), dros=DrosSettings(weight=1.0)).robust_ranking


def test_the_ranking_loss_raises_the_candidates_only():
    logits = torch.zeros(1, N, requires_grad=True)
    ranking_loss(logits, torch.tensor([[2, 7]]), torch.tensor([[0.5, 0.5]])).sum().backward()
    assert (logits.grad < 0).nonzero()[:, 1].tolist() == [2, 7]
