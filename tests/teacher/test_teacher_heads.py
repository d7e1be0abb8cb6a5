"""Heads by their formulas, and titles that are read anew while the language model learns."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at, written
from safetensors.torch import load_file
from teacher_helpers import CPU, build, fit, padded, randomise, split, teacher_rows

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.checkpoint import trainable_weights
from llm2rec.core.train.engine import Engine
from llm2rec.student.models import load_student
from llm2rec.teacher.heads import HEADS, build_head
from llm2rec.teacher.settings import TeacherSettings
from llm2rec.teacher.store import load_teacher, save_teacher

HISTORIES = [[3, 5, 7, 11], [2], [40, 1, 30], [9, 8]]
TRAINING = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2}
N, D, WIDTH = 5, 3, 4  # items, width of the language model, width of the recommender


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_scores_by_its_formula(kind):
    """Item by item and user by user, with weights of no special value."""
    unit = torch.nn.functional.normalize
    titles, users = unit(normal(N, D, seed=0), dim=1), unit(normal(2, D, seed=1), dim=1)
    bias, items, theirs = normal(N, seed=2), normal(N, WIDTH, seed=3), normal(2, WIDTH, seed=4)
    head = build_head(kind, titles, bias, 6.0, items)
    for seed, parameter in enumerate(head.parameters(), start=5):
        parameter.data.copy_(normal(*parameter.shape, seed=seed))
    found = head(users, theirs)
    for user, its in enumerate(theirs):
        for item in range(N):
            h = users[user]
            if kind == "projected":
                h = unit(head.projection.weight @ h, dim=0)
            score = 6.0 * (h @ titles[item])
            if kind != "titles":
                score = score * head.title_weight
            if kind in ("joined", "residual"):
                score = score + (head.to_items.weight @ (D**0.5 * h)) @ items[item] + head.item_bias[item]
            if kind == "residual":
                score = score + head.recommender_weight * (its @ items[item])
            torch.testing.assert_close(found[user, item], (score + bias[item]).squeeze(), rtol=1e-5, atol=1e-5)


def test_residual_dropout_leaves_the_recommender_out_of_single_rows_of_training():
    unit = torch.nn.functional.normalize
    items, users, theirs = normal(N, WIDTH, seed=3), unit(normal(400, D, seed=1), dim=1), normal(400, WIDTH, seed=4)
    head = build_head("residual", unit(normal(N, D, seed=0), dim=1), torch.zeros(N), 6.0, items)
    alone, both = head(users, torch.zeros_like(theirs)), head(users, theirs)
    head.residual_dropout = 0.25
    dropped = head(users, theirs)
    is_alone, is_both = (torch.isclose(dropped, each).all(dim=1) for each in (alone, both))
    assert (is_alone ^ is_both).all(), "a row has the recommender's score whole, or not at all"
    assert 60 < is_alone.sum() < 140  # a quarter of 400; five standard deviations are 43
    torch.testing.assert_close(head.eval()(users, theirs), both)


def logits(model, asked):
    with model.use_gates(model.gate_inputs(*asked)), torch.no_grad():
        return model(**vars(model.read(*asked)))


@pytest.fixture
def asked(data):
    return padded(HISTORIES, data.n_items, 4)


@pytest.mark.parametrize("kind", ["projected", "joined"])
def test_an_untrained_head_scores_by_titles(kind, data, llm_folder, recommender, asked):
    reads = recommender if kind == "joined" else None
    plain, other = build("llama", llm_folder, data)[0], build("llama", llm_folder, data, reads, head=kind)[0]
    torch.testing.assert_close(logits(other.eval(), asked), logits(plain.eval(), asked), rtol=1e-4, atol=1e-4)


def test_a_target_that_the_history_shows_can_be_kept(data, llm_folder, asked):
    model = build("llama", llm_folder, data)[0].eval()
    shown, rows = np.array([5, 2, 30, 8], np.int32), torch.arange(4)
    assert (model.log_probs(*asked)[rows, shown] < -1000).all()
    kept, free = model.log_probs(*asked, shown), build("llama", llm_folder, data, exclude_history=False)[0].eval()
    best = free.log_probs(*asked)
    assert (kept[rows, shown] > -100).all()
    shown_otherwise = 3  # of the first row
    assert kept[0, shown_otherwise] < -1000
    ratio = (kept[0, 5] - kept[0, 6]) - (best[0, 5] - best[0, 6])
    torch.testing.assert_close(ratio, torch.zeros(()), atol=1e-4, rtol=0)


def test_an_untrained_residual_head_adds_the_recommenders_own_scores(data, llm_folder, recommender, asked, tmp_path):
    options = {"exclude_history": False, "popularity_prior": 0.5}
    plain = build("llama", llm_folder, data, **options)[0].eval()
    residual = build("llama", llm_folder, data, recommender, head="residual", **options)[0].eval()
    recommender.save(tmp_path)
    student = load_student(tmp_path / "recommender")
    history, lengths = (torch.from_numpy(each).long() for each in asked)
    with torch.no_grad():
        own = student.score(student(history, lengths))
    assert own.std() > 0.5
    torch.testing.assert_close(logits(residual, asked) - logits(plain, asked), own, rtol=1e-4, atol=1e-3)


# ---- titles read anew ------------------------------------------------------------------------------------------------


def train(model, data, folder, *, kind=Engine, every=3, **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    train_rows, validation = (
        teacher_rows(model, split(data, name), np.arange(n)) for name, n in (("train", 32), ("validation", 20))
    )
    return fit(model, train_rows, validation, engine, item_refresh_steps=every)


def refreshed(data, llm_folder, **settings):
    return build("llama", llm_folder, data, item_refresh_steps=3, adapter={"dropout": 0.1}, **settings)


class TitlesNoted(Engine):
    """Keeps the titles' vectors that each step is trained with."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        type(self).noted = []

    def prepare(self, model, optimizer):
        self.model = model
        return super().prepare(model, optimizer)

    def begin_step(self, *arguments):
        self.noted.append(self.model.head.titles.clone())
        super().begin_step(*arguments)


def test_titles_change_after_so_many_steps_and_not_between(data, llm_folder, tmp_path):
    model, _ = refreshed(data, llm_folder)
    first = model.item_vectors.clone()
    train(model, data, tmp_path, kind=TitlesNoted, epochs=4)
    before = [first, *TitlesNoted.noted]
    changed = [not torch.equal(one, other) for one, other in pairwise(before)]
    assert changed == [False, False, False, True, False, False, True, False]


def test_titles_are_what_the_adapted_model_makes_of_each_alone(data, llm_folder):
    model = randomise(refreshed(data, llm_folder)[0])
    model.train().refresh_titles(batch_tokens=64)
    assert model.training
    raw = []
    for item in range(data.n_items):
        with model.eval().use_gates(model.gate_inputs(*padded([[item]], data.n_items, 1))), torch.no_grad():
            tokens = model.prompts.titles(np.array([item]))
            raw.append(model.llm(input_ids=tokens.input_ids).last_hidden_state.mean(dim=1)[0])
    centred = torch.stack(raw) - torch.stack(raw).mean(dim=0)
    expected = torch.nn.functional.normalize(centred, dim=1)
    torch.testing.assert_close(model.item_vectors, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("killed_before", [3, 5])  # right before titles are read anew, and after
def test_a_killed_training_ends_like_the_unbroken_one(killed_before, data, llm_folder, tmp_path):
    def run(folder, seed=None, **changes):
        model, _ = refreshed(data, llm_folder)
        if seed is not None:  # what is not in the checkpoint is lost
            randomise(model, seed).refresh_titles()
        return train(model, data, folder, epochs=4, checkpoint_every_steps=1, **changes)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", kind=killed_at(killed_before))
    (checkpoint,) = (tmp_path / "broken" / "checkpoints").glob("step_*")
    assert "head.titles" in load_file(checkpoint / "model.safetensors")
    resumed = run(tmp_path / "broken", seed=9)
    assert_same_weights(trainable_weights(resumed), trainable_weights(whole))
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


@pytest.mark.parametrize("head", ["titles", "residual"])
def test_the_titles_of_the_best_weights_are_saved_with_them(head, data, llm_folder, recommender, asked, tmp_path):
    reads = recommender if head == "residual" else None
    model, recipe = build("llama", llm_folder, data, reads, head=head, item_refresh_steps=1)
    fresh = model.item_vectors.clone()
    train(model, data, tmp_path / "run", every=1, epochs=1)
    assert not torch.equal(model.item_vectors, fresh)
    save_teacher(tmp_path / "teacher", model, recipe)
    again, _ = load_teacher(tmp_path / "teacher", data, CPU)
    assert torch.equal(again.item_vectors, model.item_vectors)
    assert torch.equal(again.log_probs(*asked), model.log_probs(*asked))


def test_titles_that_stay_are_not_stored_in_checkpoints(data, llm_folder):
    assert "head.titles" not in trainable_weights(build("llama", llm_folder, data)[0])


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_steps_that_cannot_be_counted_are_refused(value):
    with pytest.raises(ConfigError, match=f"teacher.item_refresh_steps is {value}, expected 0"):
        TeacherSettings(item_refresh_steps=value)
