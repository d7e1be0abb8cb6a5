"""A student's user vectors feed the teacher's gate, by the commands a user types."""

import json
import shutil

import numpy as np
import pytest
from command_helpers import (
    OF_ILORA,
    STUDENT,
    TEACHER,
    TORCHRUN,
    adapter,
    checkpoint_step,
    close_histories,
    equal,
    history,
    outputs,
    run,
    run_until,
    runs,
)

pytestmark = pytest.mark.slow
GATED = [
    *TEACHER,
    "teacher.gate_input=sequence",
    "teacher.recommender_run=result/student",
    "teacher.adapter.gate=conv",
    "teacher.training.checkpoint_every_steps=1",
]


def with_student(folder, trained):
    """A folder in which only the student's run lies, under a name that every folder shares."""
    shutil.copytree(trained, folder / "result" / "student")
    return folder / "result" / "student"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a student."""
    folder = tmp_path_factory.mktemp("student")
    run(folder, "student", *STUDENT, "student=gru4rec", "student.model.width=24", "student.model.max_length=4")
    return runs(folder)[0]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """A teacher that nobody killed; the student's run is gone since."""
    folder = tmp_path_factory.mktemp("whole")
    student_run = with_student(folder, trained)
    run(folder, "teacher", *GATED)
    shutil.rmtree(student_run)
    return folder, runs(folder)[0]


def test_a_finished_teacher_is_evaluated_without_the_students_run(whole):
    folder, teacher = whole
    files = {str(file.relative_to(teacher)) for file in teacher.rglob("*") if file.is_file()}
    assert {"teacher/recommender/config.json", "teacher/recommender/model.safetensors"} <= files
    assert not (teacher / "recommender_of_run").exists()
    assert json.loads((teacher / "teacher" / "adapter" / "adapter_config.json").read_text())["gate_input_size"] == 24
    assert json.loads((teacher / "run.json").read_text())["label"] == "ilora tiny_random (gru4rec gate)"
    run(folder, "evaluate", *TEACHER, f"runs=[{teacher.relative_to(folder)}]")
    scores = json.loads((teacher / "metrics" / "test.json").read_text())["metrics"]
    assert 0 < scores["ndcg@10"] <= 1


def test_a_teacher_killed_in_training_ends_the_same_without_the_students_run(trained, whole, tmp_path):
    student_run = with_student(tmp_path, trained)
    run_until(tmp_path, "teacher", *GATED, reached=lambda: checkpoint_step(tmp_path) >= 2)
    shutil.rmtree(student_run)
    (killed,) = runs(tmp_path)
    done = run(tmp_path, "teacher", *GATED, f"resume={killed.relative_to(tmp_path)}")
    assert "resuming at step_" in done.stderr
    assert history(killed) == history(whole[1])
    assert equal(adapter(killed), adapter(whole[1]))
    for ours, theirs in zip(outputs(tmp_path), outputs(whole[0]), strict=True):
        assert np.array_equal(ours, theirs)


def test_two_processes_read_the_same_gate_inputs(trained, whole, tmp_path):
    with_student(tmp_path, trained)
    linear = [*GATED, "teacher.adapter.gate=linear"]  # conv looks at its neighbours in the batch, which differ
    run(tmp_path, "teacher", *linear, launcher=TORCHRUN)
    run(tmp_path, "teacher", *linear, "paths.llm_dir=data/other_llm")
    two, one = runs(tmp_path)
    assert close_histories(history(two), history(one), 2e-3)
    inputs = [
        sorted(file.read_bytes() for file in (tmp_path / "data" / name / "gate_inputs").glob("*/*.npy"))
        for name in ("llm", "other_llm")
    ]
    assert len(inputs[0]) > 9  # blocks of 50 rows
    assert inputs[0] == inputs[1]


def test_two_processes_train_a_hybrid_teacher_as_one_does(trained, tmp_path):
    """Text-only steps leave the projector out, which the other process must not wait for."""
    with_student(tmp_path, trained)
    hybrid = [
        *TEACHER,
        "teacher.recommender_run=result/student",
        "teacher.gate_input=sequence",
        "teacher.prompts=hybrid",
        "teacher.curriculum=linear",
        "teacher.head=residual",
        "teacher.item_refresh_steps=5",
        "teacher.training.evaluate_every_steps=3",
        "teacher.export.enabled=false",
    ]
    run(tmp_path, "teacher", *hybrid, launcher=TORCHRUN)
    run(tmp_path, "teacher", *hybrid)
    two, one = (history(each) for each in runs(tmp_path))
    assert {entry["train/hybrid"] for entry in one} == {0.0, 1.0}
    assert close_histories(two, one, 2e-3)


def test_a_teacher_without_anything_to_train_is_exported_and_evaluated(tmp_path):
    overrides = [each for each in TEACHER if each not in OF_ILORA]
    done = run(tmp_path, "teacher", *overrides, "teacher.tuning=none")
    assert "no trainable parameters: `teacher.tuning` is 'none'" in done.stderr
    (teacher,) = runs(tmp_path)
    assert json.loads((teacher / "run.json").read_text())["trained_parameters"] == 0
    assert len(outputs(tmp_path)[0]) == 424
    run(tmp_path, "evaluate", *overrides, f"runs=[{teacher.relative_to(tmp_path)}]")
    assert json.loads((teacher / "metrics" / "test.json").read_text())["metrics"]["ndcg@10"] > 0


def test_a_run_that_is_no_student_is_reported_before_the_language_model_is_made(whole, tmp_path):
    with_student(tmp_path, whole[1])
    done = run(tmp_path, "teacher", *GATED, check=False)
    assert done.returncode == 1
    assert "a finished run of stage 'teacher'; expected a finished run of student or distill" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data" / "llm").exists()
