"""SIGKILL at any moment costs the work since the last checkpoint, SIGTERM not even that, and nothing else."""

import json
import os
import signal

import numpy as np
import pytest
from command_helpers import (
    PLAIN,
    STUDENT,
    TEACHER,
    TORCHRUN,
    adapter,
    checkpoint_step,
    equal,
    history,
    outputs,
    run,
    run_until,
    runs,
)
from command_helpers import student as student_weights

pytestmark = pytest.mark.slow
# Dropout on: its draws must come back too. Blocks of 5 rows, so that an export is still under way when it is killed.
TEACHER_RUN = [
    *TEACHER,
    "teacher.adapter.dropout=0.1",
    "teacher.training.checkpoint_every_steps=1",
    "teacher.export.block_rows=5",
]
STUDENT_RUN = [
    *STUDENT,
    "student.model.dropout=0.2",
    "student.training.epochs=20",
    "student.training.checkpoint_every_steps=5",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Teacher and student that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, "teacher", *TEACHER_RUN)
    run(folder, "student", *STUDENT_RUN)
    return folder, *runs(folder)


def resumed(folder, stage, overrides):
    (killed,) = runs(folder)
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    done = run(folder, stage, *overrides, f"resume={killed.relative_to(folder)}")
    assert runs(folder) == [killed]
    assert json.loads((killed / "run.json").read_text())["status"] == "finished"
    return killed, done


def check_teacher(killed, folder, whole):
    unbroken, expected, _ = whole
    assert history(killed) == history(expected)
    assert equal(adapter(killed), adapter(expected))
    for ours, theirs in zip(outputs(folder), outputs(unbroken), strict=True):
        assert np.array_equal(ours, theirs)
    assert not (killed / "export").exists()


@pytest.mark.parametrize("step", [1, 13])
def test_a_teacher_killed_in_training_ends_the_same(step, whole, tmp_path):
    run_until(tmp_path, "teacher", *TEACHER_RUN, reached=lambda: checkpoint_step(tmp_path) >= step)
    killed, done = resumed(tmp_path, "teacher", TEACHER_RUN)
    assert "resuming at step_" in done.stderr
    check_teacher(killed, tmp_path, whole)


def test_a_teacher_killed_in_its_export_ends_the_same(whole, tmp_path):
    def blocks():
        return [block for each in runs(tmp_path) for block in each.glob("export/block_*")]

    run_until(tmp_path, "teacher", *TEACHER_RUN, reached=lambda: len(blocks()) >= 2)
    assert not (tmp_path / "data" / "teacher_outputs").exists()
    first = sorted(blocks())[0]
    written = first.stat().st_mtime_ns
    os.link(first, tmp_path / "kept.safetensors")  # shows whether it is replaced, after the run's own clean-up
    killed, done = resumed(tmp_path, "teacher", TEACHER_RUN)
    assert (tmp_path / "kept.safetensors").stat().st_mtime_ns == written
    assert "resuming at step_000000024" in done.stderr
    assert "step 24: loss" not in done.stderr
    check_teacher(killed, tmp_path, whole)


def test_a_student_killed_in_training_ends_the_same(whole, tmp_path):
    run_until(tmp_path, "student", *STUDENT_RUN, reached=lambda: checkpoint_step(tmp_path) >= 40)
    killed, done = resumed(tmp_path, "student", STUDENT_RUN)
    assert "resuming at step_" in done.stderr
    expected = whole[2]
    assert history(killed) == history(expected)
    assert equal(student_weights(killed), student_weights(expected))


@pytest.mark.parametrize(
    ("launcher", "sent", "name"),
    [(PLAIN, signal.SIGTERM, "SIGTERM"), (PLAIN, signal.SIGINT, "Ctrl-C"), (TORCHRUN, signal.SIGTERM, "SIGTERM")],
    ids=["one process", "interrupted", "two"],
)
def test_a_terminated_student_stores_its_step_and_goes_on_from_there(launcher, sent, name, whole, tmp_path):
    status = run_until(
        tmp_path,
        "student",
        *STUDENT_RUN,
        reached=lambda: checkpoint_step(tmp_path) >= 40,
        launcher=launcher,
        sent=sent,
    )
    stored = checkpoint_step(tmp_path)
    (killed,) = runs(tmp_path)
    record, shown = json.loads((killed / "run.json").read_text()), (tmp_path / "killed.txt").read_text()
    assert f"Interrupted: {name} received; step {stored} is stored. Continue with: {record['continue']}" in shown
    assert record["status"] == "interrupted"
    assert record["continue"].endswith(f"resume=result/{killed.name}")
    if launcher is PLAIN:
        assert status == 128 + sent
        assert "Traceback" not in shown
    done = run(tmp_path, "student", *STUDENT_RUN, f"resume={killed.relative_to(tmp_path)}", launcher=launcher)
    assert f"resuming at step_{stored:09d}" in done.stderr
    if launcher is PLAIN:
        assert history(killed) == history(whole[2])
        assert equal(student_weights(killed), student_weights(whole[2]))
    else:  # each process has a dropout of its own
        assert [entry["step"] for entry in history(killed)] == [entry["step"] for entry in history(whole[2])]


def test_a_student_that_is_good_enough_is_finished_and_evaluated(tmp_path):
    run_until(tmp_path, "student", *STUDENT_RUN, reached=lambda: checkpoint_step(tmp_path) >= 40, sent=signal.SIGTERM)
    stored = checkpoint_step(tmp_path)
    (killed,) = runs(tmp_path)
    fewer = [*STUDENT_RUN, "student.training.epochs=10"]  # epochs may change
    done = run(tmp_path, "student", *fewer, f"resume=result/{killed.name}", "finish=true")
    assert f"resuming at step_{stored:09d}" in done.stderr
    record = json.loads((killed / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["ended_early"]
    validation = json.loads((killed / "metrics" / "validation.json").read_text())
    steps = {row["step"]: row["val/ndcg@10"] for row in validation["history"]}
    assert max(steps) <= stored
    assert steps[validation["best_step"]] == max(steps.values()) == validation["best"]
    run(tmp_path, "evaluate", *STUDENT_RUN, f"runs=[result/{killed.name}]")
    scores = json.loads((killed / "metrics" / "test.json").read_text())["metrics"]
    assert 0 < scores["ndcg@10"] <= 1
