"""LLM teachers as members: their best items, stored or computed, and exported outputs that are read instead."""

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from teacher_helpers import CPU, build

from llm2rec.core.errors import TeacherOutputsError
from llm2rec.data import prepare
from llm2rec.data.toy import Toy
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.llm_teacher import (
    LLMTeacherMember,
    exported_ranking,
    lazily_loaded,
    rank_rows_of,
    ranked_training_rows,
)
from llm2rec.ensemble.members import distribution
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.outputs import write_outputs
from llm2rec.teacher.settings import ExportSettings
from llm2rec.teacher.store import save_teacher

K = 12


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    data = prepare(Toy(n_users=30, n_items=48, n_worlds=4, min_length=5, max_length=9), folder)
    model, recipe = build("bert", folder, data, tuning="none")
    save_teacher(folder / "run" / "teacher", model.eval(), recipe)
    return data, model, folder / "run" / "teacher"


def member_of(teacher, **more):
    data, _, folder = teacher
    about = {"run": "result_1", "label": "zero shot", "top_k": K}
    return LLMTeacherMember(lazily_loaded(folder, data, CPU), about, 7, data.history_length, **more)


def test_a_teacher_gives_its_best_items_and_no_others(teacher):
    data, model, _ = teacher
    rows = SplitRows(data, "validation", 20)
    scores = member_of(teacher).scores(rows.batch(np.arange(len(rows))))
    history, lengths = Rows.of(data, "validation").histories()
    items, log_probs = model.best_items(history, lengths, K)
    expected = torch.full_like(scores, -torch.inf).scatter(1, items, log_probs)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    probs, known = distribution(scores, 2.0)
    assert known.all()
    assert ((probs > 0).sum(dim=1) == K).all()
    assert torch.equal(member_of(teacher).item_vectors, model.item_vectors)


def test_stored_rankings_are_the_same(teacher, tmp_path):
    data, _, folder = teacher
    rows, numbers = SplitRows(data, "validation", 20), np.arange(1, 25, 2)
    load = lazily_loaded(folder, data, CPU)
    ranked = rank_rows_of(load, data, "validation", numbers, K, engine_in(tmp_path), tmp_path / "b", tmp_path / "g")
    stored = member_of(teacher, ranked={"validation": ranked})
    stored.load = None  # which is not needed
    for part in (numbers, numbers[[5, 2, 7]]):
        batch = rows.batch(part)
        torch.testing.assert_close(stored.scores(batch), member_of(teacher).scores(batch), rtol=1e-4, atol=1e-5)
    assert stored.has("validation")
    assert not stored.has("train")


def test_exported_outputs_are_read_if_they_are_the_runs_and_whole(teacher, tmp_path):
    data, model, folder = teacher
    numbers = np.arange(len(data.splits["train"]))
    load, engine = lazily_loaded(folder, data, CPU), engine_in(tmp_path)
    ranked = rank_rows_of(load, data, "train", numbers, K, engine, tmp_path / "b", tmp_path / "g")

    def written(name, labelled=None, **about):
        about = {"dataset": data.name, "fingerprint": data.fingerprint, "run": "result_1", **about}
        blocks = sorted((tmp_path / "b").glob("*"))
        write_outputs(tmp_path / name, blocks, model.item_vectors, ExportSettings(top_k=K), about, labelled=labelled)
        return tmp_path / name

    outputs = exported_ranking(written("whole"), "result_1", data)
    read = ranked_training_rows(outputs, 5)
    assert np.array_equal(read.items, ranked.items[:, :5])
    np.testing.assert_allclose(read.scores, ranked.scores[:, :5], rtol=1e-5)
    assert exported_ranking(tmp_path / "whole", "result_2", data) is None
    assert exported_ranking(tmp_path / "none", "result_1", data) is None
    assert exported_ranking(written("some", labelled=numbers), "result_1", data) is None
    with pytest.raises(TeacherOutputsError, match="belong to dataset"):
        exported_ranking(written("other", fingerprint="another"), "result_1", data)
