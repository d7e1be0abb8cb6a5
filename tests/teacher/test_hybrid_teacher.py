"""Hybrid prompts: what is injected, when it is shown, and what learns from it."""

import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at, written
from teacher_helpers import build, fit, padded, randomise, split, teacher_rows

from llm2rec.core.train.checkpoint import trainable_weights
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.injection import ItemProjector, embedded
from llm2rec.teacher.settings import TeacherSettings, is_hybrid
from llm2rec.teacher.trainer import _optimizer

TRAINING = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 1.0}
HYBRID = {"prompts": "hybrid", "recommender_run": "result/result_x"}
HISTORIES = [[3, 5, 7, 11], [2], [40, 1, 30], [9, 8]]
SCHEDULE = json.loads((Path(__file__).parents[1] / "golden" / "lr_schedule.json").read_text())


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


@pytest.fixture
def hybrid(data, llm_folder, recommender):
    """Builds hybrid teachers, the same at every call."""
    return lambda **settings: build("llama", llm_folder, data, recommender, prompts="hybrid", **settings)[0]


def rows_of(model, data, name="train", n_rows=32):
    return teacher_rows(model, split(data, name), np.arange(n_rows))


def train(model, data, folder, *, kind=Engine, settings=None, **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    return fit(
        model, rows_of(model, data), rows_of(model, data, "validation", 20), engine, **HYBRID, **(settings or {})
    )


def weights_of(model, part):
    return {name: p.detach().clone() for name, p in model.named_parameters() if f"{part}." in name and p.requires_grad}


def gradients(model, data, *, hybrid):
    """Gradients of the mean loss of some rows, by name."""
    history, lengths = padded(HISTORIES, data.n_items, 6)
    targets = torch.tensor([4, 6, 0, 1])
    model.zero_grad()
    with model.use_gates(model.gate_inputs(history, lengths)):
        logits = model(**vars(model.read(history, lengths, hybrid=hybrid)), keep=targets)
        cross_entropy(logits, targets).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- injection -------------------------------------------------------------------------------------------------------


def test_vectors_are_put_where_a_loop_puts_them_and_words_are_the_tables(recommender):
    torch.manual_seed(0)
    table, projector = torch.nn.Embedding(50, 16), ItemProjector(recommender.read_items(), 16, 0.5)
    n_items, placeholder = len(projector.items), 50  # which the table does not have
    item_ids = torch.full((3, 7), n_items)
    item_ids[0, 2], item_ids[0, 5], item_ids[2, 6] = 3, 0, n_items - 1
    input_ids = torch.randint(50, (3, 7)).masked_fill(item_ids < n_items, placeholder)
    found = embedded(table, projector, input_ids, item_ids, padding_id=0)
    for row in range(3):
        for position in range(7):
            item, token = item_ids[row, position], input_ids[row, position]
            if item < n_items:
                torch.testing.assert_close(found[row, position], projector(item[None])[0])
            else:
                assert torch.equal(found[row, position], table(token))
    found[item_ids == n_items].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in projector.parameters())  # words teach it nothing


def test_a_projector_begins_as_loud_as_the_words(hybrid):
    model = hybrid()
    table = model.llm.get_input_embeddings().weight
    projected = model.projector(torch.arange(len(model.projector.items)))
    rms = projected.square().mean().sqrt() / table.square().mean().sqrt()
    assert 0.7 < rms.item() < 1.4
    assert torch.pdist(projected).min() > 0


def test_the_teacher_reads_the_vectors_of_the_items_shown(hybrid, data):
    """Another vector for an item changes the answers to the histories that show it, and no others."""
    model = hybrid().eval()
    asked = padded(HISTORIES, data.n_items, 6)
    before = model.log_probs(*asked)
    model.projector.items[1] = -model.projector.items[1]
    changed = (model.log_probs(*asked) - before).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [False, False, True, False]
    assert not torch.allclose(model.eval().log_probs(*asked), build_text(model, asked))


def build_text(model, asked):
    with model.use_gates(model.gate_inputs(*asked)), torch.no_grad():
        return model(**vars(model.read(*asked, hybrid=False))).log_softmax(dim=1)


def test_every_trained_parameter_gets_a_gradient(hybrid, data):
    model = randomise(hybrid())
    found = gradients(model, data, hybrid=True)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in found.values())


def test_text_teaches_the_projector_exactly_nothing(hybrid, data):
    model = randomise(hybrid())
    found = gradients(model, data, hybrid=False)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}  # DDP waits for all
    silent = {name for name, gradient in found.items() if not gradient.any()}
    assert silent == weights_of(model, "projector").keys()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_gradient_checkpointing_gives_the_same_gradients(precision, hybrid, data):
    plain, again = (
        gradients(
            randomise(hybrid(gradient_checkpointing=each, precision=precision), std=0.1).train(), data, hybrid=True
        )
        for each in (False, True)
    )
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_narrow_base_weights_train_hybrid_prompts(precision, hybrid, data, tmp_path):
    model = hybrid(precision=precision, head="residual")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = weights_of(model, "")
    train(model, data, tmp_path, settings={"head": "residual"})
    assert all(not torch.equal(before[name], after) for name, after in weights_of(model, "").items())


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def test_parts_have_the_rates_and_decays_of_their_settings(hybrid):
    settings = TeacherSettings(
        **HYBRID,
        head="joined",
        training=TrainingSettings(learning_rate=0.1, weight_decay=0.5),
        gate_learning_rate_ratio=3.0,
        projector_learning_rate_ratio=0.2,
        head_learning_rate_ratio=7.0,
        gate_weight_decay=0.0,
        projector_weight_decay=0.25,
    )
    model = hybrid(head="joined")
    optimizer = _optimizer(model, settings)
    found = {(g["name"], g["params"][0].ndim >= 2): (g["lr_ratio"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        (None, True): (1.0, 0.5),
        ("ilora_gate", True): (3.0, 0.0),
        ("projector", True): (0.2, 0.25),
        ("projector", False): (0.2, 0.0),
        ("head", True): (7.0, 0.5),
        ("head", False): (7.0, 0.0),
    }
    of_head = {id(p) for group in optimizer.param_groups if group["name"] == "head" for p in group["params"]}
    assert of_head == {id(p) for p in model.head.parameters()}


def test_rates_follow_the_released_programs_schedule(hybrid, data, tmp_path):
    """Step by step, each part at its own ratio."""
    model, n_steps = hybrid(), SCHEDULE["max_steps"]
    training = {
        "learning_rate": SCHEDULE["lr"],
        "min_learning_rate_ratio": SCHEDULE["min_lr"] / SCHEDULE["lr"],
        "warmup_ratio": SCHEDULE["warmup_steps"] / n_steps,
        "warmup_start_ratio": SCHEDULE["warmup_start_lr"] / SCHEDULE["lr"],
    }
    engine = engine_in(tmp_path, **training)
    settings = TeacherSettings(**HYBRID, training=engine.training, projector_learning_rate_ratio=0.2)
    _, optimizer = engine.prepare(model, _optimizer(model, settings))
    ratios = {None: 1.0, "ilora_gate": 10.0, "projector": 0.2}
    for step, expected in enumerate(SCHEDULE["values"]):
        engine.begin_step(step, n_steps, optimizer)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({name: ratio * expected for name, ratio in ratios.items()}, rel=1e-9)


def test_the_projector_is_frozen_in_text_steps(hybrid, data, tmp_path):
    """Through 2 epochs of 2 steps, the latter half of them hybrid; weight decay does not move it either."""
    model, seen, moments = hybrid(), [], []

    class Watching(Engine):
        @contextmanager
        def timed(self, step):
            with super().timed(step):
                yield
            seen.append(weights_of(model, "projector"))
            groups = [group for group in self._optimizer.param_groups if group["name"] == "projector"]
            parameters = [parameter for group in groups for parameter in group["params"]]
            moments.append(any(self._optimizer.state.get(parameter) for parameter in parameters))

    before = weights_of(model, "projector")
    train(model, data, tmp_path, kind=Watching, settings={"curriculum": "two_stage"}, weight_decay=0.5)
    assert moments == [False, False, True, True], "neither do Adam's averages begin"
    assert len(seen) == 4
    for text in seen[:2]:
        assert_same_weights(text, before)
    for earlier, later in ((before, seen[2]), (seen[2], seen[3])):
        assert not any(torch.equal(earlier[name], later[name]) for name in before)


# ---- curricula -------------------------------------------------------------------------------------------------------


def plan(curriculum, n_steps=1000, seed=0):
    return np.array([is_hybrid(curriculum, step, n_steps, seed) for step in range(n_steps)])


def test_curricula_show_vectors_when_they_say():
    assert plan("off").all()
    assert plan("two_stage", 7).tolist() == [False] * 4 + [True] * 3
    linear = plan("linear")
    shares = linear.reshape(5, 200).mean(axis=1)
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.5, 0.7, 0.9], atol=0.08)
    assert not linear[0]


def test_a_curriculum_by_epochs_rises_to_one_over_their_number_in_each():
    """As iLoRA's program with 5 epochs: .20 at the end of each, 8 to 11 % of all steps."""
    n_steps, per_epoch = 10_000, 2_000
    starts = [step - step % per_epoch for step in range(n_steps)]
    steps = [is_hybrid("linear_per_epoch", step, n_steps, 3, start) for step, start in enumerate(starts)]
    epochs = np.array(steps).reshape(5, 4, 500).mean(axis=2)  # quarters of each epoch
    np.testing.assert_allclose(epochs.mean(axis=0), [0.025, 0.075, 0.125, 0.175], atol=0.02)
    np.testing.assert_allclose(epochs.mean(axis=1), 0.1, atol=0.02)


def test_a_linear_curriculum_depends_on_step_and_seed_alone():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert np.array_equal(plan("linear"), plan("linear"))
    backwards = [is_hybrid("linear", step, 1000, 0) for step in reversed(range(1000))]
    assert plan("linear").tolist() == backwards[::-1]
    assert (plan("linear") != plan("linear", seed=1)).any()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_training_follows_its_curriculum(hybrid, data, tmp_path):
    for curriculum in ("linear", "linear_per_epoch"):
        settings, folder = {"curriculum": curriculum}, tmp_path / curriculum
        train(hybrid(), data, folder, settings=settings, epochs=5, evaluate_every_steps=1)
        told = [entry["train/hybrid"] for entry in written(folder, "validation")["history"]]
        expected = [is_hybrid(curriculum, step, 10, 0, step - step % 2) for step in range(10)]
        assert told == np.array(expected, float).tolist()
        assert curriculum != "linear" or 0 < sum(told) < 10


def test_a_killed_training_ends_like_the_unbroken_one(hybrid, data, tmp_path):
    run = partial(
        train, data=data, settings={"curriculum": "linear", "head": "residual"}, epochs=4, checkpoint_every_steps=1
    )

    def teacher(seed=None):
        model = hybrid(head="residual", adapter={"dropout": 0.1})
        return model if seed is None else randomise(model, seed)  # what is not in the checkpoint is lost

    whole = run(teacher(), folder=tmp_path / "whole")
    chosen = plan("linear", 8).tolist()
    assert True in chosen[:5]
    assert False in chosen[1:5]
    with pytest.raises(Killed):
        run(teacher(), folder=tmp_path / "broken", kind=killed_at(5))
    resumed = run(teacher(seed=9), folder=tmp_path / "broken")
    assert_same_weights(trainable_weights(resumed), trainable_weights(whole))
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")
