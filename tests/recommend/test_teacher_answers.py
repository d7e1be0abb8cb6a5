"""A finished teacher answers in ids and titles, and says what its own scores say."""

import numpy as np
import pytest
import torch

from llm2rec.core.errors import CheckpointError, ConfigError, DataError, UnknownItemError
from llm2rec.data import load
from llm2rec.recommend import Recommender
from llm2rec.recommend.teacher import TeacherRecommender

SETTINGS = ["dataset.n_users=30", "dataset.n_items=48", "dataset.n_worlds=4", "dataset.history_length=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("teacher")
    training = ["teacher.training.epochs=0", "teacher.export.enabled=false", "logging.tensorboard=false"]
    command(folder, "teacher", *SETTINGS, "llm=tiny_random", *training)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    (run,) = (folder / "result").iterdir()
    return run


@pytest.fixture(scope="module")
def prepared(folder):
    (prepared,) = (folder / "data" / "processed").glob("toy-*")
    return load(prepared)


@pytest.fixture(scope="module")
def teacher(run, prepared):
    return TeacherRecommender.load(run, prepared)


def raw(prepared, ids):
    return [prepared.items[int(i)]["raw_id"] for i in ids]


def test_answers_are_the_best_of_its_log_probabilities(teacher, prepared):
    histories = [[3], [5, 9, 11], [7, 1, 2, 40, 41, 13, 22]]  # the last is longer than what is read
    answers = teacher.recommend([raw(prepared, history) for history in histories], k=6, batch_size=2)
    for history, answer in zip(histories, answers, strict=True):
        read = np.array([history[-5:]], np.int32)
        scores = teacher.model.log_probs(read, np.array([read.shape[1]], np.int32))[0]
        scores[history] = -torch.inf  # also what it does not read
        best = scores.topk(6)
        assert [item.item_id for item in answer] == raw(prepared, best.indices)
        assert [item.title for item in answer] == [prepared.items[i]["title"] for i in best.indices.tolist()]
        torch.testing.assert_close(torch.tensor([item.score for item in answer]), best.values)


def test_titles_name_the_same_history(teacher, prepared):
    titles = [prepared.items[i]["title"] for i in (5, 9)]
    assert teacher.recommend_one(titles, by="title") == teacher.recommend_one(raw(prepared, [5, 9]))


def test_what_the_teacher_leaves_out_is_not_answered(teacher, prepared):
    answer = teacher.recommend_one(raw(prepared, [5, 9]), k=prepared.n_items)
    assert len(answer) == prepared.n_items - 2
    assert not {item.item_id for item in answer} & set(raw(prepared, [5, 9]))


def test_what_it_does_not_read_of_a_history_is_left_out_too(teacher, prepared):
    whole = list(range(9))  # of which it reads five
    long, short = raw(prepared, whole), raw(prepared, [40])
    alone = teacher.recommend_one(long, k=prepared.n_items)
    assert len(alone) == prepared.n_items - len(whole)
    assert not {item.item_id for item in alone} & set(long)
    together = teacher.recommend([long, short, long], k=prepared.n_items)
    assert together == [alone, teacher.recommend_one(short, k=prepared.n_items), alone]
    assert len(together[1]) == prepared.n_items - 1


def test_what_cannot_be_asked_is_said(teacher, run, prepared, trained):
    with pytest.raises(UnknownItemError, match="no item with id 'nothing'"):
        teacher.recommend_one(["nothing"])
    with pytest.raises(DataError, match="history 1: the history is empty"):
        teacher.recommend([raw(prepared, [1]), []])
    with pytest.raises(ConfigError, match=f"`k` is 99, expected 1 to the {prepared.n_items}"):
        teacher.recommend_one(raw(prepared, [1]), k=99)
    with pytest.raises(CheckpointError, match="finished run of teacher"):
        TeacherRecommender.load(trained, prepared)
    with pytest.raises(CheckpointError, match="finished run of student or distill"):
        Recommender.load(run)
