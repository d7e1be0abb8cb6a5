"""Stages that need not run again, and sweeps of which a part fails, as commands."""

import json
import shutil

import pytest
from command_helpers import STUDENT, TEACHER, TOY, run, runs

from llm2rec.core.files import write_json

pytestmark = pytest.mark.slow
QUICK = ["student.training.epochs=1", "logging.tensorboard=false"]


def is_up_to_date(folder, stage, *overrides):
    """Whether a stage is not run again; it then leaves no folder."""
    before = runs(folder)
    done = run(folder, stage, *overrides, "reuse=true")
    assert (runs(folder) == before) == ("up to date" in done.stderr), done.stderr
    return runs(folder) == before


def test_a_stage_runs_again_only_where_something_has_changed(tmp_path):
    student = [*STUDENT, *QUICK]
    assert not is_up_to_date(tmp_path, "data", *TOY)
    assert is_up_to_date(tmp_path, "data", *TOY)
    assert not is_up_to_date(tmp_path, "student", *student)
    assert is_up_to_date(tmp_path, "student", *student)
    assert is_up_to_date(tmp_path, "student", *student, "teacher.adapter.r=16")
    assert not is_up_to_date(tmp_path, "student", *student, "student.training.learning_rate=0.01")
    assert not is_up_to_date(tmp_path, "student", *student, "dataset.seed=3")
    assert is_up_to_date(tmp_path, "student", *student)
    for folder in runs(tmp_path):
        shutil.rmtree(folder / "student", ignore_errors=True)
    assert not is_up_to_date(tmp_path, "student", *student)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("of somebody")
    assert is_up_to_date(tmp_path, "data", *TOY, "hydra.run.dir=mine")
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["kept.txt"]
    refused = run(tmp_path, "evaluate", *TOY, "reuse=true", check=False)
    assert "`reuse` is true, but evaluate cannot reuse runs" in refused.stderr


def test_a_student_is_distilled_again_when_its_teacher_has_written_again(tmp_path):
    teacher = [*TEACHER, "teacher.training.epochs=0", "logging.tensorboard=false"]
    distill = [*STUDENT, *QUICK]
    assert not is_up_to_date(tmp_path, "teacher", *teacher)
    assert is_up_to_date(tmp_path, "teacher", *teacher)
    assert not is_up_to_date(tmp_path, "distill", *distill)
    assert is_up_to_date(tmp_path, "distill", *distill)
    # Another teacher of the same name takes the place of the outputs.
    assert not is_up_to_date(tmp_path, "teacher", *teacher, "seed=5")
    assert not is_up_to_date(tmp_path, "distill", *distill)
    assert not is_up_to_date(tmp_path, "teacher", *teacher)
    (manifest,) = (tmp_path / "data" / "teacher_outputs").rglob("manifest.json")
    write_json(manifest, {**json.loads(manifest.read_text()), "run": "result_20000101_000000"})
    assert not is_up_to_date(tmp_path, "teacher", *teacher)
    # Nor does a student that was being distilled go on with another teacher, or with other data.
    record = max(
        each for each in tmp_path.glob("result/*/run.json") if json.loads(each.read_text())["stage"] == "distill"
    )
    killed = {**json.loads(record.read_text()), "status": "running"}
    resume = f"resume=result/{record.parent.name}"
    for changed, value in (("teacher_outputs", killed["teacher_outputs"]), ("dataset", {"name": "toy"})):
        write_json(record, {**killed, changed: value})
        refused = run(tmp_path, "distill", *distill, resume, check=False)
        assert f"was started with another value of `{changed}`" in refused.stderr


def test_a_failing_job_loses_no_other_and_evaluation_gathers_the_rest(tmp_path):
    options = ["seed=1,2", "student.training.batch_size=0,37,53"]
    swept = run(tmp_path, "student", *TOY, "--multirun", *QUICK, *options, check=False)
    assert swept.returncode == 1
    assert "student: jobs 0, 3 failed; the other jobs of the sweep are done" in swept.stderr
    assert swept.stderr.count("`batch_size` is 0, expected at least 1") == 2
    assert "Traceback" not in swept.stderr
    (sweep,) = runs(tmp_path)
    assert {path.name for path in sweep.iterdir()} == {*"012345", "multirun.yaml"}
    statuses = [json.loads((sweep / str(n) / "run.json").read_text())["status"] for n in range(6)]
    assert statuses == ["failed", "finished", "finished"] * 2
    evaluated = run(tmp_path, "evaluate", *TOY, f"runs=[result/{sweep.name}]")
    sweep_report = json.loads((runs(tmp_path)[-1] / "sweep.json").read_text())
    assert [each["options"] for each in sweep_report["combinations"]] == [
        {"student.training.batch_size": "37"},
        {"student.training.batch_size": "53"},
    ]
    assert [each["seeds"] for each in sweep_report["combinations"]] == [[1, 2], [1, 2]]
    for each in sweep_report["combinations"]:
        values = [
            json.loads((sweep.parent / name / "metrics" / "test.json").read_text())["metrics"]["ndcg@10"]
            for name in each["runs"]
        ]
        assert each["metrics"]["ndcg@10"]["values"] == values
    assert sweep_report["not_finished"] == [f"{sweep.name}/0", f"{sweep.name}/3"]
    assert "sasrec student.training.batch_size=37" in evaluated.stderr
    assert "±" in evaluated.stderr


def test_a_sweep_resumes_nothing(tmp_path):
    refused = run(tmp_path, "student", "-m", *TOY, "seed=1,2", "reuse=true", check=False)
    assert refused.returncode == 1
    assert "`resume` and `reuse` do not work with `--multirun`" in refused.stderr
