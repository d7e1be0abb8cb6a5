"""The iLoRA paper's teacher from end to end: a student feeds it, it learns titles, another student learns from it."""

import json
import shutil

import numpy as np
import pytest
from command_helpers import (
    STUDENT,
    TORCHRUN,
    TOY,
    adapter,
    checkpoint_step,
    close_histories,
    equal,
    history,
    run,
    run_until,
    runs,
)

pytestmark = pytest.mark.slow
PAPER = [
    *TOY,
    "teacher=ilora_paper",
    "teacher.recommender_run=result/student",
    "teacher.training.epochs=2",
    "teacher.training.batch_size=36",
    "teacher.training.micro_batch_size=7",
    "teacher.training.learning_rate=3e-3",
    "teacher.adapter.dropout=0",
    "teacher.export.block_rows=50",
    "teacher.export.top_k=12",
    "llm.width=32",
    "llm.prompt.wording=domain",
    "llm.prompt.max_tokens=512",
]
DISTILLED = [*TOY, "distill.ranking.top_k=8", "student.training.epochs=1"]


def outputs(folder, name):
    found = folder / "data" / "teacher_outputs" / "toy" / f"{name}-tiny_random"
    manifest = json.loads((found / "manifest.json").read_text())
    return np.load(found / "myrank_train.npy"), np.load(found / "confidence_train.npy"), manifest


def with_student(folder, trained):
    """A folder in which only the student's run lies, under a name that every folder shares."""
    shutil.copytree(trained, folder / "result" / "student")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a student."""
    folder = tmp_path_factory.mktemp("student")
    run(folder, "student", *STUDENT)
    return runs(folder)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trained):
    """A student, the paper's teacher, never disturbed."""
    folder = with_student(tmp_path_factory.mktemp("whole"), trained)
    run(folder, "teacher", *PAPER)
    return folder


def test_the_papers_teacher_learns_and_teaches_and_is_compared(whole, tmp_path):
    folder = tmp_path / "chain"
    shutil.copytree(whole, folder)
    teacher = runs(folder)[0]
    losses = [entry["train/loss"] for entry in history(teacher)]
    assert losses[-1] < losses[0]
    ranking, confidence, manifest = outputs(folder, "ilora_paper")
    assert manifest["confidence"] == "neg_log_prob"
    assert ranking.shape == (manifest["rows"], 12)
    assert (np.diff(confidence, axis=1) >= 0).all()
    assert confidence.min() > 0
    run(folder, "distill", *PAPER, *DISTILLED)
    run(folder, "evaluate", *TOY, "metrics.n_candidates=21", "runs=[result/student," + ",".join(
        f"result/{each.name}" for each in runs(folder)[:2]) + "]")  # fmt: skip
    comparison = json.loads((runs(folder)[-1] / "comparison.json").read_text())
    rows = {row["run"]: row for row in comparison["rows_scored"]}
    assert len(rows) == 4
    assert all({"hr@1", "ndcg@10", "candidates_hr@1"} <= row["metrics"].keys() for row in rows.values())
    titles = rows[teacher.name]
    assert titles["n_titles"] == 21
    assert {"generated_hr@1", "generated_hr@1_valid", "valid_ratio", "candidates_ndcg@10"} <= titles["metrics"].keys()
    assert {"generated_hr@1", "valid_ratio", "candidates_hr@1"} <= titles["intervals"].keys()
    text = (runs(folder)[-1] / "comparison.txt").read_text()
    assert "generated: HR@1 of all rows" in text


@pytest.mark.parametrize("tuning", ["lora", "zero_shot"])
def test_other_tunings_and_grounding_are_distilled_and_compared(tuning, trained, tmp_path):
    """Plain LoRA and zero shot, text only; ranked by what lies nearest to the title they write."""
    unread = ("teacher=", "teacher.recommender_run=", *(["teacher.adapter."] if tuning == "zero_shot" else []))
    overrides = [
        *[each for each in PAPER if not each.startswith(unread)],
        f"teacher={tuning}",
        "teacher.objective=title",
        "teacher.title.n_candidates=21",
        "teacher.title.ranking=grounding",
        f"teacher.name=titles_{tuning}",
    ]
    folder = with_student(tmp_path, trained)
    done = run(folder, "teacher", *overrides)
    ranking, confidence, manifest = outputs(folder, f"titles_{tuning}")
    assert manifest["confidence"] == "distance"
    assert (confidence >= 0).all()
    assert (np.diff(confidence, axis=1) >= -1e-6).all()
    assert len(set(map(tuple, ranking))) > 1
    (teacher,) = [each for each in runs(folder)]
    assert (teacher / "metrics" / "validation.json").is_file() is (tuning == "lora"), done.stderr
    run(folder, "distill", *overrides, *DISTILLED)
    run(folder, "evaluate", *TOY, f"runs=[result/{teacher.name}]")
    (row,) = [
        each for each in json.loads((runs(folder)[-1] / "comparison.json").read_text())["rows_scored"] if each["run"]
    ]
    assert row["n_titles"] == 21
    assert "valid_ratio" in row["metrics"]


def test_a_killed_title_training_ends_the_same(whole, trained, tmp_path):
    folder = with_student(tmp_path, trained)
    overrides = [*PAPER, "teacher.training.checkpoint_every_steps=1"]
    run_until(folder, "teacher", *overrides, reached=lambda: checkpoint_step(folder) >= 7)
    run(folder, "teacher", *overrides, f"resume=result/{runs(folder)[-1].name}")
    assert equal(adapter(runs(folder)[0]), adapter(runs(whole)[0]))
    assert history(runs(folder)[0]) == history(runs(whole)[0])
    assert equal(*({"ranking": outputs(each, "ilora_paper")[0]} for each in (folder, whole)))


def test_two_processes_train_export_and_evaluate_as_one(whole, trained, tmp_path):
    folder = with_student(tmp_path, trained)
    run(folder, "teacher", *PAPER, launcher=TORCHRUN)
    one, two = runs(whole)[0], runs(folder)[0]
    assert close_histories(history(two), history(one), 2e-3)
    for each, launcher in ((whole, None), (folder, TORCHRUN)):
        options = {} if launcher is None else {"launcher": launcher}
        run(each, "evaluate", *TOY, f"runs=[result/{runs(each)[0].name}]", **options)
    found = [np.load(each / "metrics" / "test_titles_ranks.npy") for each in (one, two)]
    assert found[0].shape == found[1].shape
    assert (found[0] == found[1]).mean() > 0.9  # weights differ in their last digits
