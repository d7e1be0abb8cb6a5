"""The gate reads a trained student's user vectors: the same everywhere, and a finished teacher needs nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at
from safetensors import safe_open
from teacher_helpers import CPU, build, configured, llm_of, padded, randomise, split

from llm2rec.core.checkpoint import trainable_weights
from llm2rec.core.engine import Engine
from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import write_json
from llm2rec.core.seed import seed_everything
from llm2rec.ilora.config import GateKind
from llm2rec.student.datamodule import SequenceData
from llm2rec.student.models import build_model
from llm2rec.student.store import load_student, save_student
from llm2rec.teacher.export import rank_blocks
from llm2rec.teacher.factory import build_teacher, load_teacher, save_teacher
from llm2rec.teacher.gate_cache import GateCache
from llm2rec.teacher.gate_source import FrozenBase, StudentVectors, load_gate_source, open_gate_source
from llm2rec.teacher.settings import AdapterSettings, ExportSettings, TeacherSettings
from llm2rec.teacher.trainer import train_teacher

TRAINING = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2}
STUDENTS = [("sasrec", 64, 10), ("gru4rec", 20, 10), ("sasrec", 8, 3), ("gru4rec", 20, 3)]


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


def finished_run(folder, data, name="sasrec", width=64, max_length=10, seed=0, **record):
    """A run folder as the student stage leaves it; the weights are random and large enough to matter."""
    arguments = {"n_items": data.n_items, "width": width, "max_length": max_length, "dropout": 0.5}
    torch.manual_seed(seed)
    student = build_model(name, **arguments)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_student(folder / "student", student, name, arguments)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    write_json(folder / "run.json", {"stage": "student", "status": "finished", "dataset": dataset, **record})
    return folder


def source_of(folder, data, kept):
    return open_gate_source(folder, kept, data.name, data.fingerprint, CPU)


def teacher_of(llm_folder, data, source, **adapter):
    """A teacher with a fresh adapter whose gate reads ``source``."""
    llm, path = llm_of("llama", llm_folder, data)
    chosen = AdapterSettings(**{"r": 8, "num_experts": 4, "dropout": 0.0, **adapter})
    settings = TeacherSettings(adapter=chosen, gate_input="sequence", gate_run="result/result_x")
    seed_everything(3)
    return build_teacher(llm, path, settings, data, split(data).targets.numpy(), CPU, source)


def cached(model, recipe, engine, folder, rows, numbers):
    return GateCache(model, recipe.identity, engine, folder, block_rows=40, batch_tokens=300).rows(rows, numbers)


@pytest.fixture
def source(data, tmp_path):
    return source_of(finished_run(tmp_path / "student_run", data), data, tmp_path / "kept")


# ---- what the gate reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width", "max_length"), STUDENTS)
def test_gate_inputs_are_the_students_user_vectors(name, width, max_length, data, llm_folder, engine, tmp_path):
    folder = finished_run(tmp_path / "student_run", data, name, width, max_length)
    model, recipe = teacher_of(llm_folder, data, source_of(folder, data, tmp_path / "kept"))
    rows = split(data)
    found = cached(model, recipe, engine, tmp_path / "cache", rows, np.arange(len(rows))).gate_inputs
    own = SequenceData.of(data.splits["train"], data.n_items, max_length)  # as the student itself reads the split
    with torch.no_grad():
        users = load_student(folder / "student")(own.history.long(), own.lengths.long())
    assert found.shape == (len(rows), width)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(users, dim=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_the_width_of_the_gate_is_the_students(data, llm_folder, tmp_path):
    folder = finished_run(tmp_path / "student_run", data, "gru4rec", 20)
    model, _ = teacher_of(llm_folder, data, source_of(folder, data, tmp_path / "kept"), gate_per_layer=True)
    assert model.tuner.peft_config["default"].gate_input_size == 20
    assert {layer.ilora_gate["default"].input_size for layer in model.tuner.adapted_layers("default")} == {20}


def test_a_rows_gate_input_ignores_other_rows_padding_and_the_mode(source, data, llm_folder):
    model, _ = teacher_of(llm_folder, data, source)
    histories = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9]]
    history, lengths = padded(histories, data.n_items, 9)
    tokens = model.prompts.histories(history, lengths)
    together = source.vectors(model.train(), history, lengths, tokens)
    assert torch.pdist(together).min() > 0.01
    assert torch.equal(together, source.vectors(randomise(model).eval(), history, lengths, tokens))
    for row, items in enumerate(histories):
        alone = source.vectors(model, *padded([items], data.n_items, len(items)), tokens)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_student_is_no_part_of_what_is_trained_and_stored(source, data, llm_folder):
    model, _ = teacher_of(llm_folder, data, source)
    plain, _ = build("llama", llm_folder, data)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert source.n_parameters == sum(p.numel() for p in source._student.parameters())
    assert not any(p.requires_grad for p in source._student.parameters())


def test_the_cache_tells_students_and_the_language_model_apart(data, llm_folder, engine, tmp_path, monkeypatch):
    rows, numbers, found = split(data), np.arange(20), []
    sources = [
        source_of(finished_run(tmp_path / f"run_{n}", data, seed=seed), data, tmp_path / f"kept_{n}")
        for n, seed in enumerate((0, 1))
    ]
    for source in sources:
        model, recipe = teacher_of(llm_folder, data, source)
        found.append(cached(model, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs)
    plain, recipe = build("llama", llm_folder, data)
    found.append(cached(plain, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs)
    assert [each.shape[1] for each in found] == [64, 64, 32]
    assert not np.array_equal(found[0], found[1])
    assert len(list((tmp_path / "cache").iterdir())) == 3

    again = source_of(finished_run(tmp_path / "elsewhere", data, seed=0), data, tmp_path / "kept_again")
    monkeypatch.setattr(again, "vectors", lambda *_: pytest.fail("computed again"))
    model, recipe = teacher_of(llm_folder, data, again, gate="mlp")
    assert np.array_equal(cached(model, recipe, engine, tmp_path / "cache", rows, numbers).gate_inputs, found[0])


def test_the_language_models_own_caches_are_named_as_before():
    assert (FrozenBase().identity, FrozenBase().label, FrozenBase().width) == ("", "", None)


# ---- training, saving, loading, export -------------------------------------------------------------------------------


def train(model, recipe, data, folder, kind=Engine, **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    rows = [
        cached(model, recipe, engine, folder.parent / "cache", split(data, name), np.arange(n))
        for name, n in (("train", 32), ("validation", 20))
    ]
    return train_teacher(model, *rows, engine, balance_weight=0.1)


@pytest.mark.parametrize("kind", get_args(GateKind))
def test_every_kind_of_gate_trains_on_it_and_is_loaded_without_the_students_run(
    kind, source, data, llm_folder, tmp_path
):
    model, recipe = teacher_of(llm_folder, data, source, gate=kind)
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
    assert again.gate_source.identity == source.identity
    rows = split(data, "validation")
    asked = rows.history.numpy(), rows.lengths.numpy()
    assert torch.equal(again.log_probs(*asked), model.log_probs(*asked))


def test_a_finished_teacher_holds_plain_files_only(source, data, llm_folder, tmp_path):
    save_teacher(tmp_path / "teacher", *teacher_of(llm_folder, data, source))
    files = {file.name for file in (tmp_path / "teacher").rglob("*") if file.is_file()}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".md"}
    with safe_open(tmp_path / "teacher" / "gate_student" / "model.safetensors", "pt") as stored:
        assert "input_items.weight" in stored.keys()


def test_other_gates_give_other_users_other_answers(source, data, llm_folder):
    """The student's vectors reach the answer: two histories with one prompt get different mixtures."""
    model = randomise(teacher_of(llm_folder, data, source)[0]).eval()
    asked = padded([[3, 1, 4]], data.n_items, 3)
    first = model.log_probs(*asked)
    model.gate_source.vectors = lambda *_: torch.nn.functional.one_hot(torch.tensor([5]), 64).float()
    assert (model.log_probs(*asked) - first).abs().max() > 1e-3


def test_a_killed_training_ends_the_same_without_the_students_run(data, llm_folder, tmp_path):
    run, plan = finished_run(tmp_path / "student_run", data), {"epochs": 2, "checkpoint_every_steps": 1}

    def teacher():
        return teacher_of(llm_folder, data, source_of(run, data, tmp_path / "kept"), gate="conv")

    whole = train(*teacher(), data, tmp_path / "whole", **plan)
    with pytest.raises(Killed):
        train(*teacher(), data, tmp_path / "run", kind=killed_at(3), **plan)
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "cache")
    resumed = train(*teacher(), data, tmp_path / "run", **plan)
    assert_same_weights(trainable_weights(resumed), trainable_weights(whole))


def test_a_run_keeps_the_student_it_began_with(data, tmp_path):
    first = source_of(finished_run(tmp_path / "student_run", data, seed=0), data, tmp_path / "kept")
    finished_run(tmp_path / "student_run", data, seed=1)
    assert source_of(tmp_path / "student_run", data, tmp_path / "kept").identity == first.identity
    assert source_of(tmp_path / "student_run", data, tmp_path / "new").identity != first.identity


def test_export_ranks_with_these_gates(source, data, llm_folder, engine, tmp_path):
    model, recipe = teacher_of(llm_folder, data, source)
    randomise(model).eval()
    rows = split(data)
    asked = cached(model, recipe, engine, tmp_path / "cache", rows, np.arange(len(rows)))
    settings = ExportSettings(top_k=5, block_rows=1000, batch_tokens=300)
    (block,) = rank_blocks(model, asked, engine, tmp_path / "blocks", settings)
    best = model.log_probs(rows.history.numpy(), rows.lengths.numpy()).topk(5).values
    with safe_open(block, "np") as stored:
        np.testing.assert_allclose(stored.get_tensor("log_probs"), best, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_before_reads_the_language_model(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data)
    save_teacher(tmp_path / "teacher", model, recipe)
    stored = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert stored.pop("gate_input") == "llm"
    write_json(tmp_path / "teacher" / "config.json", stored)
    assert isinstance(load_teacher(tmp_path / "teacher", data, CPU)[0].gate_source, FrozenBase)
    assert not (tmp_path / "teacher" / "gate_student").exists()


# ---- what cannot work ------------------------------------------------------------------------------------------------


def test_the_configuration_asks_for_it_by_run():
    settings = configured("teacher.gate_input=sequence", "teacher.gate_run=result/result_x")
    assert (settings.gate_input, settings.gate_run) == ("sequence", "result/result_x")
    assert (configured().gate_input, configured().gate_run) == ("llm", None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gate_input=user"], r"teacher.gate_input is 'user', expected one of llm, sequence"),
        (["gate_input=sequence"], r"gate_run is None, expected the run.*add `teacher.gate_run=result"),
        (["gate_run=result/x"], r"gate_run is 'result/x' and teacher.gate_input is 'llm'.*add `teacher.gate_input="),
    ],
)
def test_settings_that_do_not_agree_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*(f"teacher.{each}" for each in overrides))


def test_settings_and_source_must_agree(data, llm_folder, source):
    with pytest.raises(ConfigError, match="is 'sequence' but the `gate_source` given is 'llm'"):
        teacher_of(llm_folder, data, None)
    llm, path = llm_of("llama", llm_folder, data)
    with pytest.raises(ConfigError, match="is 'llm' but the `gate_source` given is 'sequence'"):
        build_teacher(llm, path, TeacherSettings(), data, split(data).targets.numpy(), CPU, source)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"stage": "teacher"}, r"a finished run of stage 'teacher'; expected a finished run of student or distill"),
        ({"status": "running"}, r"a running run of stage 'student'.*resume this run"),
        (
            {"dataset": {"name": "games", "fingerprint": "f" * 64}},
            r"trained on dataset 'games' \(fingerprint ffffffffffff\), expected .* 'toy' .*same dataset overrides",
        ),
    ],
)
def test_a_run_that_cannot_feed_the_gate_is_refused(record, message, data, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        source_of(finished_run(tmp_path / "run", data, **record), data, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_distilled_student_is_as_good(data, tmp_path):
    assert source_of(finished_run(tmp_path / "run", data, stage="distill"), data, tmp_path / "kept").width == 64


def test_a_folder_without_a_run_is_refused(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"gate_run` is '.*nowhere', which holds no run.json.*llm2rec.student"):
        source_of(tmp_path / "nowhere", data, tmp_path / "kept")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_damaged_weights_are_refused(damage, data, tmp_path):
    damage(finished_run(tmp_path / "run", data) / "student" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the student in .*, which the gate reads, cannot be loaded"):
        source_of(tmp_path / "run", data, tmp_path / "kept")


def test_a_teacher_without_its_student_is_refused(source, data, llm_folder, tmp_path):
    model, recipe = teacher_of(llm_folder, data, source)
    save_teacher(tmp_path / "teacher", model, recipe)
    shutil.rmtree(tmp_path / "teacher" / "gate_student")
    with pytest.raises(CheckpointError, match=r"gate_student/ is missing; copy the folder of a teacher as a whole"):
        load_teacher(tmp_path / "teacher", data, CPU)
    with pytest.raises(CheckpointError, match=r"reads 'palm', expected one of llm, sequence"):
        load_gate_source(replace(recipe, gate_input="palm").gate_input, tmp_path / "teacher", CPU)
    assert not StudentVectors.is_in(tmp_path / "teacher")
