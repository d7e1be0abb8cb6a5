"""The gate reads a trained student's user vectors: the same everywhere, and a finished teacher needs nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at
from safetensors import safe_open
from teacher_helpers import (
    CPU,
    build,
    configured,
    finished_run,
    fit,
    llm_of,
    padded,
    randomise,
    recommender_of,
    split,
)

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import write_json
from llm2rec.core.train.checkpoint import trainable_weights
from llm2rec.core.train.engine import Engine
from llm2rec.ilora.gate import GATES
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import load_student
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.gate_cache import GateCache
from llm2rec.teacher.outputs import rank_blocks
from llm2rec.teacher.settings import ExportSettings, TeacherSettings
from llm2rec.teacher.store import load_teacher, save_teacher

TRAINING = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2}
STUDENTS = [("sasrec", 64, 10), ("gru4rec", 20, 10), ("caser", 16, 10), ("sasrec", 8, 3), ("gru4rec", 20, 3)]


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


def teacher_of(llm_folder, data, recommender, **adapter):
    """A teacher with a fresh adapter whose gate reads ``recommender``."""
    return build("llama", llm_folder, data, recommender, adapter=adapter, gate_input="sequence")


def cached(model, recipe, engine, folder, rows, numbers):
    return GateCache(model, recipe.identity, engine, folder, block_rows=40, batch_tokens=300).rows(rows, numbers)


@pytest.fixture
def recommender(data, tmp_path):
    return recommender_of(finished_run(tmp_path / "student_run", data), data, tmp_path / "kept")


# ---- what the gate reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width", "max_length"), STUDENTS)
def test_gate_inputs_are_the_students_user_vectors(name, width, max_length, data, llm_folder, engine, tmp_path):
    folder = finished_run(tmp_path / "student_run", data, name, width, max_length)
    model, recipe = teacher_of(llm_folder, data, recommender_of(folder, data, tmp_path / "kept"))
    rows = split(data)
    found = cached(model, recipe, engine, tmp_path / "cache", rows, np.arange(len(rows))).gate_inputs
    own = Rows.of(data, "train", max_length)  # as the student itself reads the split
    with torch.no_grad():
        users = load_student(folder / "student")(*own.batch(own.units).inputs)
    assert found.shape == (len(rows), width)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(users, dim=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_the_width_of_the_gate_is_the_students(data, llm_folder, tmp_path):
    folder = finished_run(tmp_path / "student_run", data, "gru4rec", 20)
    model, _ = teacher_of(llm_folder, data, recommender_of(folder, data, tmp_path / "kept"), gate_per_layer=True)
    assert model.tuner.peft_config["default"].gate_input_size == 20
    assert {layer.ilora_gate["default"].input_size for layer in model.tuner.adapted_layers("default")} == {20}


def test_a_rows_gate_input_ignores_other_rows_padding_and_the_mode(recommender, data, llm_folder):
    model, _ = teacher_of(llm_folder, data, recommender)
    histories = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9]]
    history, lengths = padded(histories, data.n_items, 9)
    together = model.train().gate_inputs(history, lengths)
    assert torch.pdist(together).min() > 0.01
    assert torch.equal(together, randomise(model).eval().gate_inputs(history, lengths))
    for row, items in enumerate(histories):
        alone = model.gate_inputs(*padded([items], data.n_items, len(items)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_student_is_no_part_of_what_is_trained_and_stored(recommender, data, llm_folder):
    model, _ = teacher_of(llm_folder, data, recommender)
    plain, _ = build("llama", llm_folder, data)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert recommender.n_parameters == sum(p.numel() for p in recommender._student.parameters())
    assert not any(p.requires_grad for p in recommender._student.parameters())


def test_the_cache_tells_students_and_the_language_model_apart(data, llm_folder, engine, tmp_path, monkeypatch):
    rows, numbers, found = split(data), np.arange(20), []
    recommenders = [
        recommender_of(finished_run(tmp_path / f"run_{n}", data, seed=seed), data, tmp_path / f"kept_{n}")
        for n, seed in enumerate((0, 1))
    ]
    for each in recommenders:
        model, recipe = teacher_of(llm_folder, data, each)
        found.append(cached(model, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs)
    plain, recipe = build("llama", llm_folder, data)
    found.append(cached(plain, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs)
    assert [each.shape[1] for each in found] == [64, 64, 32]
    assert not np.array_equal(found[0], found[1])
    assert len(list((tmp_path / "cache").iterdir())) == 3

    again = recommender_of(finished_run(tmp_path / "elsewhere", data, seed=0), data, tmp_path / "kept_again")
    monkeypatch.setattr(again, "users", lambda *_: pytest.fail("computed again"))
    model, recipe = teacher_of(llm_folder, data, again, gate="mlp")
    assert np.array_equal(cached(model, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs, found[0])


# ---- training, saving, loading, export -------------------------------------------------------------------------------


def train(model, recipe, data, folder, kind=Engine, **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    rows = [
        cached(model, recipe, engine, folder.parent / "cache", split(data, name), np.arange(n))
        for name, n in (("train", 32), ("validation", 20))
    ]
    return fit(model, *rows, engine, balance_loss=0.1)


@pytest.mark.parametrize("kind", tuple(GATES))
def test_every_kind_of_gate_trains_on_it_and_is_loaded_without_the_students_run(
    kind, recommender, data, llm_folder, tmp_path
):
    model, recipe = teacher_of(llm_folder, data, recommender, gate=kind)
    before = trainable_weights(model)
    train(model, recipe, data, tmp_path / "run")
    after = trainable_weights(model)
    moved = {name for name in before if ".ilora_gate." in name and not torch.equal(before[name], after[name])}
    # The released program keeps one expert, whose gate is 1 whatever the logits: nothing to learn from.
    assert bool(moved) == (kind != "topk_released")

    save_teacher(tmp_path / "teacher", model, recipe)
    shutil.rmtree(tmp_path / "student_run")
    shutil.rmtree(tmp_path / "kept")
    moved_to = (tmp_path / "teacher").rename(tmp_path / "moved")
    again, recipe_again = load_teacher(moved_to, data, CPU)
    assert recipe_again == recipe
    assert recipe.gate_input == "sequence"
    assert again.recommender.identity == model.recommender.identity
    rows = split(data, "validation")
    asked = rows.histories()
    assert torch.equal(again.log_probs(*asked), model.log_probs(*asked))


def test_a_finished_teacher_holds_plain_files_only(recommender, data, llm_folder, tmp_path):
    save_teacher(tmp_path / "teacher", *teacher_of(llm_folder, data, recommender))
    files = {file.name for file in (tmp_path / "teacher").rglob("*") if file.is_file()}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md"}
    with safe_open(tmp_path / "teacher" / "recommender" / "model.safetensors", "pt") as stored:
        assert "input_items.weight" in stored.keys()


def test_other_gates_give_other_users_other_answers(recommender, data, llm_folder):
    """The student's vectors reach the answer: two histories with one prompt get different mixtures."""
    model = randomise(teacher_of(llm_folder, data, recommender)[0]).eval()
    asked = padded([[3, 1, 4]], data.n_items, 3)
    first = model.log_probs(*asked)
    model.gate_inputs = lambda *_: torch.nn.functional.one_hot(torch.tensor([5]), 64).float()
    assert (model.log_probs(*asked) - first).abs().max() > 1e-3


def test_a_killed_training_ends_the_same_without_the_students_run(data, llm_folder, tmp_path):
    run, plan = finished_run(tmp_path / "student_run", data), {"epochs": 2, "checkpoint_every_steps": 1}

    def teacher():
        return teacher_of(llm_folder, data, recommender_of(run, data, tmp_path / "kept"), gate="conv")

    whole = train(*teacher(), data, tmp_path / "whole", **plan)
    with pytest.raises(Killed):
        train(*teacher(), data, tmp_path / "run", kind=killed_at(3), **plan)
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "cache")
    resumed = train(*teacher(), data, tmp_path / "run", **plan)
    assert_same_weights(trainable_weights(resumed), trainable_weights(whole))


def test_a_run_keeps_the_student_it_began_with(data, tmp_path):
    first = recommender_of(finished_run(tmp_path / "student_run", data, seed=0), data, tmp_path / "kept")
    finished_run(tmp_path / "student_run", data, seed=1)
    assert recommender_of(tmp_path / "student_run", data, tmp_path / "kept").identity == first.identity
    assert recommender_of(tmp_path / "student_run", data, tmp_path / "new").identity != first.identity


def test_export_ranks_with_these_gates(recommender, data, llm_folder, engine, tmp_path):
    model, recipe = teacher_of(llm_folder, data, recommender)
    randomise(model).eval()
    rows = split(data)
    asked = cached(model, recipe, engine, tmp_path / "cache", rows, np.arange(len(rows)))
    settings = ExportSettings(top_k=5, block_rows=1000, batch_tokens=300)
    (block,) = rank_blocks(model, asked, engine, tmp_path / "blocks", settings)
    best = model.log_probs(*rows.histories()).topk(5).values
    with safe_open(block, "np") as stored:
        np.testing.assert_allclose(stored.get_tensor("log_probs"), best, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_another_version_is_refused_by_what_its_recipe_lacks(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data)
    save_teacher(tmp_path / "teacher", model, recipe)
    assert not BorrowedStudent.is_in(tmp_path / "teacher")
    stored = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert stored.pop("gate_input") == "llm"
    write_json(tmp_path / "teacher" / "config.json", stored)
    with pytest.raises(CheckpointError, match=r"written by another version .*gate_input.*train again"):
        load_teacher(tmp_path / "teacher", data, CPU)


# ---- what cannot work ------------------------------------------------------------------------------------------------


def test_the_configuration_asks_for_it_by_run():
    settings = configured("teacher.gate_input=sequence", "teacher.recommender_run=result/result_x")
    assert (settings.gate_input, settings.recommender_run) == ("sequence", "result/result_x")
    assert (configured().gate_input, configured().recommender_run) == ("llm", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate_input=user"], r"teacher.gate_input is 'user', expected one of llm, sequence"),
        (
            ["gate_input=sequence"],
            r"gate_input=sequence need .*recommender_run is None; add `teacher.recommender_run=result",
        ),
        (["recommender_run=result/x"], r"recommender_run is 'result/x' and nothing reads it; add"),
    ],
)
def test_settings_that_do_not_agree_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*(f"teacher.{each}" for each in overrides))


def test_settings_and_recommender_must_agree(data, llm_folder, recommender):
    llm, path = llm_of("llama", llm_folder, data)
    reading = TeacherSettings(gate_input="sequence", recommender_run="result/x")
    for settings, given, message in (
        (reading, None, "'result/x' but the `recommender` given is None"),
        (TeacherSettings(), recommender, "None but the `recommender` given is 'sasrec'"),
    ):
        with pytest.raises(ConfigError, match=f"`teacher.recommender_run` is {message}"):
            build_teacher(llm, path, settings, data, split(data).targets.numpy(), CPU, given)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"stage": "teacher"}, r"a finished run of stage 'teacher'; expected a finished run of student or distill"),
        ({"status": "running"}, r"a running run of stage 'student'.*resume this one"),
        (
            {"dataset": {"name": "games", "fingerprint": "f" * 64}},
            r"trained on dataset 'games' \(fingerprint ffffffffffff\), expected .* 'toy' .*same dataset overrides",
        ),
    ],
)
def test_a_run_that_cannot_feed_the_gate_is_refused(record, message, data, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        recommender_of(finished_run(tmp_path / "run", data, **record), data, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_distilled_student_is_as_good(data, tmp_path):
    assert recommender_of(finished_run(tmp_path / "run", data, stage="distill"), data, tmp_path / "kept").width == 64


def test_a_folder_without_a_run_is_refused(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"recommender_run` is '.*nowhere', which has no run.json.*m llm2rec"):
        recommender_of(tmp_path / "nowhere", data, tmp_path / "kept")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_damaged_weights_are_refused(damage, data, tmp_path):
    damage(finished_run(tmp_path / "run", data) / "student" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the student in .*, which the teacher reads, cannot be loaded"):
        recommender_of(tmp_path / "run", data, tmp_path / "kept")


def test_a_teacher_without_its_student_is_refused(recommender, data, llm_folder, tmp_path):
    model, recipe = teacher_of(llm_folder, data, recommender)
    save_teacher(tmp_path / "teacher", model, recipe)
    shutil.rmtree(tmp_path / "teacher" / "recommender")
    with pytest.raises(CheckpointError, match=r"lacks recommender/config\.json; copy the whole folder again"):
        load_teacher(tmp_path / "teacher", data, CPU)


def test_a_teacher_with_an_unknown_gate_input_is_refused(recommender, data, llm_folder, tmp_path):
    model, recipe = teacher_of(llm_folder, data, recommender)
    save_teacher(tmp_path / "teacher", model, replace(recipe, gate_input="palm"))
    with pytest.raises(CheckpointError, match=r"reads 'palm', expected llm, sequence, none"):
        load_teacher(tmp_path / "teacher", data, CPU)
