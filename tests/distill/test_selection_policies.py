"""Selection policies: rows selected, resuming, and custom policies."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_helpers import listwise, teacher_for
from engine_helpers import Killed, assert_same_weights, counting_rows, engine_in, killed_at, random_rows
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from llm2rec.config import register
from llm2rec.core.errors import ConfigError, TeacherOutputsError
from llm2rec.core.train.engine import Engine
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.selection import Selection, policy_named
from llm2rec.distill.selection_evidence import Evidence, StudentNow
from llm2rec.distill.selection_policy import (
    SelectionPolicy,
    SelectionPolicyAll,
    SelectionPolicyConfidence,
    SelectionPolicyDisagreement,
    SelectionPolicyMeta,
    SelectionPolicyRandom,
    SelectionPolicyUncertainty,
)
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.models import build_model

N, L, K, M = 12, 4, 5, 37
TRAIN, VALIDATION = random_rows(M, N, L), random_rows(20, N, L, seed=1)
TEACHER = teacher_for(M, N, K)
LABELLED = np.arange(0, M, 2)
PARTIAL = TeacherOutputs(TEACHER.embeddings, TEACHER.ranking[::2], TEACHER.distance[::2], {}, LABELLED)


def student():
    torch.manual_seed(0)
    return build_model("sasrec", n_items=N, width=16, max_length=L, dropout=0.2)


def losses_of_rows(logits, rows, targets, teacher_batch):
    return listwise(logits, teacher_batch.ranking, teacher_batch.distance)


def now(tmp_path, teacher=TEACHER, model=None, losses=losses_of_rows, **options):
    engine = engine_in(tmp_path, epochs=1, batch_size=8, micro_batch_size=8)
    return StudentNow(model or student(), TRAIN, VALIDATION, teacher, engine, losses, **options)


def evidence(teacher=TEACHER, epoch=0, student=None, n_rows=M):
    return Evidence(n_rows, epoch, teacher.rows_labelled(n_rows), teacher, student)


def logits_of(model):
    model.eval()
    batch = TRAIN.batch(np.arange(M))
    with torch.no_grad():
        users = model(batch.history, batch.lengths)
        return users, model.score(users)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_budget_changes_linearly_and_then_stays_constant():
    policy = SelectionPolicyRandom(0.1, 0, final_budget=0.5, over_epochs=4)
    assert [policy.n_chosen(100, epoch) for epoch in range(7)] == [10, 20, 30, 40, 50, 50, 50]
    falling = SelectionPolicyRandom(0.5, 0, final_budget=0.1, over_epochs=2)
    assert [falling.n_chosen(100, epoch) for epoch in range(4)] == [50, 30, 10, 10]
    assert [SelectionPolicyRandom(0.2, 0).n_chosen(100, epoch) for epoch in (0, 50)] == [20, 20]
    for n_rows in (25, 97_165):  # a tenth of them ends in a half, which is rounded alike in every epoch
        constant = SelectionPolicyRandom(0.1, 0)
        assert {constant.n_chosen(n_rows, epoch) for epoch in range(12)} == {constant.most_chosen(n_rows)}


@pytest.mark.parametrize(("budget", "final_budget"), [(0.1, 0.5), (0.5, 0.1), (0.3, None)])
def test_random_labels_the_rows_of_its_largest_budget(budget, final_budget):
    policy = SelectionPolicyRandom(budget, 3, final_budget, over_epochs=3)
    asked = policy.rows_to_label(200)
    assert (np.diff(asked) > 0).all()
    chosen = [np.flatnonzero(policy.weights(evidence(epoch=e, n_rows=200))) for e in range(5)]
    assert set().union(*(rows.tolist() for rows in chosen)) == set(asked.tolist())
    assert len(asked) == max(map(len, chosen))
    smaller, larger = sorted(map(set, (chosen[0].tolist(), chosen[3].tolist())), key=len)
    assert smaller <= larger
    assert set(SelectionPolicyRandom(0.05, 3).rows_to_label(200).tolist()) <= set(asked.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.5, "final_budget": 0.0}, r"active\.final_budget is 0\.0, expected a fraction of the rows"),
        ({"budget": 0.5, "over_epochs": 0}, r"active\.over_epochs is 0, expected at least 1"),
        ({"budget": 0.5, "measure": "surprise"}, r"active\.measure is 'surprise', expected"),
        ({"budget": 0.5, "refresh_epochs": 0}, r"active\.refresh_epochs is 0, expected at least 1"),
        ({"budget": 0.5, "top_k": 0}, r"active\.top_k is 0, expected at least 1"),
    ],
)
def test_invalid_policy_options_raise(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SelectionPolicyDisagreement(**arguments)
    if "measure" in arguments:
        with pytest.raises(ConfigError, match=r"'surprise', expected one of best, margin, entropy"):
            SelectionPolicyConfidence(**arguments)


@pytest.mark.parametrize(
    "kind", [SelectionPolicyConfidence, SelectionPolicyUncertainty, partial(SelectionPolicyDisagreement, top_k=3)]
)
def test_pool_based_policies_select_within_the_labelled_pool(tmp_path, kind):
    policy = kind(0.1, pool=0.4, final_budget=0.2, over_epochs=2, seed=3)
    pool = policy.rows_to_label(M)
    assert len(pool) == round(0.4 * M)
    assert (np.diff(pool) > 0).all()
    assert set(pool) == set(SelectionPolicyRandom(0.4, 3).rows_to_label(M))
    assert set(pool) > set(kind(0.1, pool=0.2, seed=3).rows_to_label(M))
    of_pool = TeacherOutputs(TEACHER.embeddings, TEACHER.ranking[pool], TEACHER.distance[pool], {}, pool)
    for epoch, n_chosen in ((0, round(0.1 * M)), (2, round(0.2 * M))):
        part, whole = (
            policy.weights(evidence(teacher, epoch, now(tmp_path, teacher))) for teacher in (of_pool, TEACHER)
        )
        assert part.sum() == n_chosen
        assert set(np.flatnonzero(part)) <= set(pool)
        assert (part == whole).all(), "labels outside the pool change the selection"
    assert kind(0.1).rows_to_label(M) is None
    few = TeacherOutputs(TEACHER.embeddings, TEACHER.ranking[pool[:2]], TEACHER.distance[pool[:2]], {}, pool[:2])
    with pytest.raises(ConfigError, match=r"only 2 of the rows that it may select have teacher labels; lower"):
        policy.weights(evidence(few, student=now(tmp_path, few)))
    with pytest.raises(TeacherOutputsError, match=r"distils \d+ rows without teacher labels"):
        Selection(policy, M, PARTIAL, lambda epoch: None, tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"active\.pool is 0\.15, smaller than the largest budget, 0\.2"):
        kind(0.1, pool=0.15, final_budget=0.2)
    with pytest.raises(ConfigError, match=r"active\.pool is 0\.0, expected a fraction"):
        kind(0.1, pool=0.0)
    with pytest.raises(ConfigError, match=r"active\.seed is -1"):
        kind(0.1, seed=-1)


# ---- the teacher's own opinion ---------------------------------------------------------------------------------------

# exp(-distance) is .9 to .1, .5 to .5 and .6 to .4 among the two, but the last row's are 100 times smaller.
SURE = TeacherOutputs(
    torch.zeros(N, 2),
    np.tile(np.array([[0, 1]], np.int32), (3, 1)),
    -np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.006, 0.004]], np.float32)),
    {},
)


@pytest.mark.parametrize(("measure", "surest"), [("best", [0, 1, 2]), ("margin", [0, 2, 1]), ("entropy", [0, 2, 1])])
def test_confidence_and_uncertainty_by_hand(measure, surest):
    for n_chosen in (1, 2, 3):
        for kind, order in ((SelectionPolicyConfidence, surest), (SelectionPolicyUncertainty, surest[::-1])):
            weights = kind(n_chosen / 3, measure).weights(evidence(SURE, n_rows=3))
            assert weights.dtype == np.float32
            assert set(np.flatnonzero(weights)) == set(order[:n_chosen])
            assert set(weights) <= {0, 1}


def test_entropy_equals_a_plain_sum():
    probs = np.exp(-TEACHER.distance.astype(np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    ours = SelectionPolicyUncertainty(0.5).uncertainty(evidence())
    np.testing.assert_allclose(ours, -(probs * np.log(probs)).sum(axis=1), rtol=1e-6)


def test_ties_select_the_earlier_rows():
    alike = replace(TEACHER, distance=np.ones((M, K), np.float32))
    assert np.flatnonzero(SelectionPolicyConfidence(0.2).weights(evidence(alike))).tolist() == list(range(7))


def test_policy_selects_among_the_labelled_rows():
    weights = SelectionPolicyConfidence(0.2, "best").weights(evidence(PARTIAL))
    surest = LABELLED[np.argsort(PARTIAL.distance[:, 0], kind="stable")[:7]]
    assert sorted(np.flatnonzero(weights)) == sorted(surest)


def test_margin_with_one_candidate_raises():
    single = replace(TEACHER, distance=TEACHER.distance[:, :1])
    with pytest.raises(ConfigError, match=r"'margin', but the teacher outputs have one candidate.*export\.top_k"):
        SelectionPolicyConfidence(0.2, "margin").weights(evidence(single))


# ---- the student as it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [512, 5])
@pytest.mark.parametrize("teacher", [TEACHER, PARTIAL])
@pytest.mark.parametrize("measure", ["overlap", "rank"])
def test_disagreement_equals_a_plain_loop(tmp_path, measure, teacher, batch_size):
    _, logits = logits_of(student())
    rows, expected = teacher.rows_labelled(M), []
    for place, row in enumerate(rows):
        order = logits[row].argsort(descending=True).tolist()
        ranking = teacher.ranking[place].tolist()
        shared = len(set(order[:3]) & set(ranking[:3])) / 3
        expected.append(1 - shared if measure == "overlap" else order.index(ranking[0]))
    policy = SelectionPolicyDisagreement(0.2, measure, top_k=3)
    seen = evidence(teacher, student=now(tmp_path, teacher, batch_size=batch_size))
    np.testing.assert_allclose(seen.student.each_row(policy.disagreement), expected, rtol=1e-6)
    chosen = np.flatnonzero(policy.weights(seen))
    assert sorted(chosen) == sorted(rows[np.argsort(-np.array(expected), kind="stable")[:7]])


def test_scoring_rows_does_not_change_the_student(tmp_path):
    model = student().train()
    seen = now(tmp_path, model=model)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert not seen.was_read
    seen.each_row(lambda scored: scored.ranking_gradient().sum(dim=1))
    assert seen.was_read
    seen.validation_gradient()
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_weights(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_validation_gradient_equals_autograd(tmp_path):
    model = student().eval()
    batch = VALIDATION.batch(np.arange(len(VALIDATION)))
    with torch.no_grad():
        users, vectors = model(batch.history, batch.lengths), model.output_items.vectors()
    vectors = vectors.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(users @ vectors.T, batch.targets).backward()
    ours = now(tmp_path, model=model, batch_size=7).validation_gradient()
    torch.testing.assert_close(ours, vectors.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("teacher", [TEACHER, PARTIAL])
def test_meta_weights_are_products_of_gradients(tmp_path, teacher):
    """Against the gradient of each row's loss, one by one, with respect to the vectors items are scored with."""
    model = student()
    seen = evidence(teacher, student=now(tmp_path, teacher, model, batch_size=8))
    validation = seen.student.validation_gradient()
    users, _ = logits_of(model)
    rows, products = teacher.rows_labelled(M), []
    for place, row in enumerate(rows):
        vectors = model.output_items.vectors().detach().clone().requires_grad_()
        ranking = torch.from_numpy(teacher.ranking[place : place + 1].astype(np.int64))
        loss = listwise(users[row : row + 1] @ vectors.T, ranking, torch.from_numpy(teacher.distance[[place]]))
        (gradient,) = torch.autograd.grad(loss.sum(), vectors)
        products.append((gradient * validation).sum().item())
    expected = np.zeros(M)
    expected[rows] = np.maximum(products, 0) / np.maximum(products, 0).mean()
    weights = SelectionPolicyMeta().weights(seen)
    np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-4)
    assert weights[rows].mean() == pytest.approx(1, rel=1e-5)
    assert 0 < (weights[rows] > 0).mean() < 1


def test_meta_weights_are_zero_if_no_row_helps(tmp_path):
    seen = now(tmp_path, losses=lambda logits, rows, targets, teacher_batch: 0 * logits.sum(dim=1))
    assert SelectionPolicyMeta().weights(evidence(student=seen)).tolist() == [0] * M


# ---- training --------------------------------------------------------------------------------------------------------


def settings_of(ranking=0.5, **changes):
    return DistillSettings(
        teacher_outputs="unused",
        ranking=RankingSettings(weight=ranking, top_k=4, **changes),
        embedding=EmbeddingSettings(fusion_scale=0.0),
    )


def train_in(
    folder, policy, *, kind=Engine, teacher=TEACHER, settings=None, data=(TRAIN, VALIDATION), align=False, **changes
):
    training = {"epochs": 3, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01, **changes}
    settings, engine = settings or settings_of(), engine_in(folder, kind=kind, **training)
    align = settings.embedding.alignment_weight > 0
    model = DistilledStudent(student(), teacher.embeddings, fusion_scale=0.0, align=align)
    return train_distilled(model, data[0], teacher, data[1], policy, engine, settings)


class Watched(SelectionPolicy):
    """Wraps a policy and records its weights."""

    def __init__(self, policy):
        self.policy, self.given = policy, {}

    def weights(self, evidence):
        self.given[evidence.epoch] = self.policy.weights(evidence)
        return self.given[evidence.epoch]

    def rows_to_label(self, n_rows):
        return self.policy.rows_to_label(n_rows)

    def decided_at(self, epoch):
        return self.policy.decided_at(epoch)


POLICIES = {
    "disagreement": lambda: SelectionPolicyDisagreement(0.3, "rank", final_budget=0.6, over_epochs=2),
    "meta": SelectionPolicyMeta,
    "uncertainty": lambda: SelectionPolicyUncertainty(0.3, final_budget=0.6, over_epochs=2),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("killed_before", "every"), [(8, 3), (5, 1), (13, 2)])
def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path, policy, killed_before, every):
    """Killed in the middle of an epoch of five steps, when the student of the epoch's start is gone."""
    changes = {"checkpoint_every_steps": every}
    whole = train_in(tmp_path / "whole", POLICIES[policy](), **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", POLICIES[policy](), kind=killed_at(killed_before), **changes)
    resumed = train_in(tmp_path / "broken", POLICIES[policy](), **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert not (tmp_path / "broken" / "selection").exists()


def test_weights_are_recomputed_every_refresh_epochs(tmp_path):
    every, second = (Watched(SelectionPolicyDisagreement(0.3, "rank", refresh_epochs=n)) for n in (1, 2))
    train_in(tmp_path / "every", every, epochs=4, learning_rate=0.05)
    train_in(tmp_path / "second", second, epochs=4, learning_rate=0.05)
    assert list(every.given) == [0, 1, 2, 3]
    assert list(second.given) == [0, 2]
    assert (every.given[0] == second.given[0]).all()
    assert (every.given[0] != every.given[3]).any()


@pytest.mark.parametrize("changes", [{}, {"loss": "ranknet", "negative": "ranked_last"}, {"confidence": "per_row"}])
def test_meta_uses_the_configured_ranking_loss(tmp_path, changes):
    policy = Watched(SelectionPolicyMeta())
    train_in(tmp_path, policy, settings=settings_of(**changes), epochs=1)
    assert policy.given[0].mean() == pytest.approx(1, rel=1e-5)


def test_meta_without_ranking_loss_raises(tmp_path):
    settings = replace(settings_of(ranking=0.0), embedding=EmbeddingSettings(alignment_weight=0.5))
    with pytest.raises(ConfigError, match=r"by their ranking loss, but `distill\.ranking\.weight` is 0"):
        train_in(tmp_path, SelectionPolicyMeta(), settings=settings)


def test_meta_prefers_rows_with_a_correct_teacher(tmp_path):
    """The teacher is right about every second row and wrong about the others."""
    train, validation = counting_rows(200, N, L), counting_rows(100, N, L, seed=3)
    right = np.arange(200) % 2 == 0
    best = np.where(right, train.targets.numpy(), np.random.default_rng(0).integers(N, size=200))
    ranking = np.stack([np.roll(np.arange(N), -int(item))[:K] for item in best]).astype(np.int32)
    teacher = TeacherOutputs(TEACHER.embeddings, ranking, np.tile(np.arange(K, dtype=np.float32) * 3, (200, 1)), {})
    policy = Watched(SelectionPolicyMeta())
    base = settings_of(loss="listwise")
    settings = replace(base, ranking=replace(base.ranking, top_k=1))
    changes = {"settings": settings, "data": (train, validation), "micro_batch_size": 8}
    train_in(tmp_path, policy, teacher=teacher, **changes)
    for weights in policy.given.values():
        assert weights[right].mean() > 1.3 * weights[~right].mean()


def test_compact_outputs_train_like_full_outputs(tmp_path):
    """Teacher outputs of rows with weight 0 have no effect, and can be left out."""
    policy = SelectionPolicyRandom(0.4, seed=0)
    rows = policy.rows_to_label(M)
    compact = TeacherOutputs(TEACHER.embeddings, TEACHER.ranking[rows], TEACHER.distance[rows], {}, rows)
    whole = train_in(tmp_path / "whole", policy)
    assert_same_weights(train_in(tmp_path / "compact", policy, teacher=compact).state_dict(), whole.state_dict())


# ---- invalid weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SelectionPolicyAll(), SelectionPolicyRandom(0.5, seed=0)])
def test_policy_with_unlabelled_rows_raises(tmp_path, policy):
    missing = np.setdiff1d(policy.rows_to_label(M), LABELLED)
    message = rf"{len(missing)} rows without teacher labels, the first is row {missing[0]}; .* has labelled 19 of 37"
    with pytest.raises(TeacherOutputsError, match=message):
        train_in(tmp_path, policy, teacher=PARTIAL)


def test_final_budget_above_the_labelled_rows_raises_before_training(tmp_path):
    policy = SelectionPolicyUncertainty(0.1, final_budget=0.6, over_epochs=4)
    with pytest.raises(ConfigError, match=r"largest budget is 22 rows, but the teacher has labelled 19 of 37"):
        train_in(tmp_path, policy, teacher=PARTIAL, kind=killed_at(0))


@pytest.mark.parametrize("policy", [SelectionPolicyAll(), SelectionPolicyRandom(0.9, seed=0)])
def test_embedding_distillation_needs_no_labels(tmp_path, policy):
    settings = replace(settings_of(ranking=0.0), embedding=EmbeddingSettings(fusion_scale=0.0, alignment_weight=0.5))
    weights = [
        train_in(tmp_path / name, policy, teacher=teacher, settings=settings).state_dict()
        for name, teacher in {"partial": PARTIAL, "whole": TEACHER}.items()
    ]
    assert_same_weights(*weights)


@pytest.mark.parametrize("policy", [SelectionPolicyRandom(0.5, seed=0), POLICIES["disagreement"]()])
def test_selection_without_a_weighted_loss_raises(tmp_path, policy):
    settings = replace(settings_of(ranking=0.0), embedding=EmbeddingSettings(fusion_scale=0.3))
    with pytest.raises(ConfigError, match=r"selects rows.*ranking\.weight` and `.*alignment_weight` are 0.*active=all"):
        train_in(tmp_path / "refused", policy, settings=settings)
    train_in(tmp_path / "all", SelectionPolicyAll(), settings=settings)


class Labels(SelectionPolicyAll):
    def __init__(self, rows):
        self.rows = rows

    def rows_to_label(self, n_rows):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([3, 1], r"\[3 1\]"),
        ([1, 1], r"\[1 1\]"),
        ([0, M], r"\[ 0 37\]"),
        ([-1, 2], r"\[-1  2\]"),
        ([], r"\[\]"),
        ([0.5], r"\[0\.5\]"),
        ([[0]], r"\[\[0\]\]"),
    ],
)
def test_invalid_rows_to_label_raise(rows, text):
    message = rf"Labels\.rows_to_label returned {text}, expected unique row numbers from 0 to 36 in ascending order"
    with pytest.raises(ConfigError, match=message):
        Labels(rows).checked_rows_to_label(M)


def test_top_k_above_the_stored_candidates_raises(tmp_path):
    with pytest.raises(ConfigError, match=rf"active\.top_k is {K + 1}, but the teacher outputs have {K} candidates"):
        SelectionPolicyDisagreement(0.3, top_k=K + 1).weights(evidence(student=now(tmp_path)))


class Constant(SelectionPolicy):
    def __init__(self, values):
        self.values = values

    def weights(self, evidence):
        return np.asarray(self.values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(M - 1), r"Constant returned weights of shape \(36,\) in epoch 2, expected \(37,\)"),
        (np.where(np.arange(M) == 4, np.nan, 1.0), r"weight nan for row 4 in epoch 2, expected a number from 0"),
        (np.where(np.arange(M) == 6, -1.0, 1.0), r"weight -1\.0 for row 6"),
        (np.ones(M), r"selects row 1 in epoch 2, which has no teacher label; select among `evidence\.rows`"),
    ],
)
def test_invalid_weights_raise(tmp_path, values, message):
    student_now = now(tmp_path, PARTIAL)
    selection = Selection(Constant(values), M, PARTIAL, lambda _: student_now, tmp_path / "selection")
    with pytest.raises(ConfigError, match=message):
        selection.weights(2)


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Unpopular(SelectionPolicy):
    """Custom policy: distils rows with a rare first candidate and a wrong prediction of the student."""

    def __init__(self, at_most: int):
        self.at_most = at_most

    def weights(self, evidence):
        first = evidence.teacher.ranking[:, 0]
        wrong = evidence.student.each_row(lambda scored: scored.logits.argmax(dim=1) != scored.targets)
        weights = np.zeros(evidence.n_rows, np.float32)
        weights[evidence.rows] = (np.bincount(first)[first] <= self.at_most) * wrong
        return weights


def test_custom_policy_is_built_from_the_configuration(tmp_path):
    register()
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        name = f"{__name__}.Unpopular"
        chosen = ["active=custom", f"active.policy={name}", "+active.arguments.at_most=3", "paths.root=/somewhere"]
        policy = instantiate(compose("config", overrides=chosen).active)
    assert isinstance(policy, Unpopular)
    watched = Watched(policy)
    train_in(tmp_path, watched, teacher=PARTIAL)
    assert list(watched.given) == [0, 1, 2]
    first = PARTIAL.ranking[:, 0]
    assert 0 < watched.given[0].sum() <= (np.bincount(first)[first] <= 3).sum()


def test_source_hash_of_a_custom_policy(tmp_path, monkeypatch):
    assert SelectionPolicyAll().source() is SelectionPolicyRandom(0.1, 0).source() is None
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "policies_of_ones_own.py"
    text = "from llm2rec.distill.selection_policy import SelectionPolicyAll\nclass Mine(SelectionPolicyAll): pass\n"
    file.write_text(text)
    before = policy_named("policies_of_ones_own.Mine", {}).source()
    assert before == hashlib.sha256(text.encode()).hexdigest()
    file.write_text(text + "# another\n")
    assert policy_named("policies_of_ones_own.Mine", {}).source() != before


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        ("nowhere.Policy", {}, r"'nowhere\.Policy', which cannot be imported \(No module named 'nowhere'\)"),
        ("Policy", {}, r"'Policy', which cannot be imported"),
        (f"{__name__}.Missing", {}, "which cannot be imported"),
        (f"{__name__}.student", {}, "expected a subclass of llm2rec.distill.selection_policy"),
        (f"{__name__}.Unpopular", {"budget": 1}, r"cannot be built from \{'budget': 1\}: .*'budget'"),
    ],
)
def test_custom_policy_that_cannot_be_built_raises(policy, arguments, message):
    with pytest.raises(ConfigError, match=message):
        policy_named(policy, arguments)
