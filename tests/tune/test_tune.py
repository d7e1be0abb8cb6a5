"""Searches as a user runs them, on a tiny toy."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_helpers import TOY, run_until

from llm2rec.core.errors import ConfigError
from llm2rec.launch import StageError, run
from llm2rec.tune import Interval, tune

pytestmark = pytest.mark.slow
STUDENT = [*TOY, "student.training.epochs=2", "student.training.batch_size=37", "logging.tensorboard=false"]
RATE = "student.training.learning_rate"


def saved(folder):
    """``tune.json`` of the only search in a folder."""
    (file,) = folder.glob("result/tune_*/tune.json")
    return json.loads(file.read_text())


def outcome(trials):
    return [(each["overrides"], each["status"], each["value"]) for each in trials]


def test_a_killed_search_ends_as_an_unbroken_one(tmp_path):
    command = ["stage=student", "n_trials=3", f"{RATE}=tag(log,interval(1e-4,1e-2))", *STUDENT]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    folder = run_folder = run_in(whole, *command)
    assert run_folder.name.startswith("tune_student-")
    runs = broken / folder.relative_to(whole)

    def is_training():
        return (runs / f"{runs.name[5:]}_001" / "run.json").is_file()

    run_until(broken, "tune", *command, reached=is_training)
    assert [each["status"] for each in saved(broken)["trials"]] == ["finished"]
    run_in(broken, *command)
    first, second = saved(whole), saved(broken)
    assert outcome(first["trials"]) == outcome(second["trials"])
    assert [each["status"] for each in first["trials"]] == ["finished"] * 3
    best = max(first["trials"], key=lambda each: each["value"])
    assert first["best"] == best
    validation = json.loads((Path(best["run"]).expanduser() / "metrics" / "validation.json").read_text())
    assert validation["best"] == best["value"]
    assert not list(whole.rglob("test.json"))
    assert f"trial 2: {best['status']}" in (folder / "log.txt").read_text()
    # The command of the best trial repeats it, and the finished search goes no further.
    again = run("student", *first["command"].split()[3:], folder=whole, quiet=True)
    assert json.loads((again / "metrics" / "validation.json").read_text())["best"] == best["value"]
    run_in(whole, *command)
    assert outcome(saved(whole)["trials"]) == outcome(first["trials"])


def test_a_search_that_is_terminated_stops_its_trial_and_continues_it(tmp_path):
    command = ["stage=student", "n_trials=1", "name=mine", f"{RATE}=1e-3,2e-3", *STUDENT, "student.training.epochs=60"]
    command.append("student.training.patience=100")
    trial = tmp_path / "result" / "tune_mine" / "mine_000"

    def has_validated():
        return (trial / "metrics" / "validation.json").is_file()

    assert run_until(tmp_path, "tune", *command, reached=has_validated, sent=signal.SIGTERM) == 143
    assert "Start the same command again to continue." in (tmp_path / "killed.txt").read_text()
    assert json.loads((trial / "run.json").read_text())["status"] == "interrupted"
    (step,) = trial.glob("checkpoints/step_*")
    assert run_in(tmp_path, *command) == trial.parent
    assert f"resuming at step {int(step.name[5:])}" in (trial / "log.txt").read_text()
    (only,) = saved(tmp_path)["trials"]
    assert (only["status"], only["run"]) == ("finished", str(trial))


def run_in(folder, *command):
    folder.mkdir(exist_ok=True)
    return run("tune", *command, folder=folder, quiet=True)


def test_a_failed_trial_is_recorded_and_the_search_goes_on(tmp_path):
    found = tune("student", STUDENT, {RATE: [2e-3, 1e30]}, n_trials=5, folder=tmp_path, name="mine")
    assert found.folder == tmp_path / "result" / "tune_mine"
    statuses = {each.overrides[0].partition("=")[2]: each for each in found.trials if each.overrides}
    assert statuses["1e+30"].status == "failed"
    assert statuses["1e+30"].error.startswith("NonFiniteError: ")
    assert (found.overrides, found.run.name) == ([], "mine_000")
    assert len([each for each in found.trials if each.status == "finished"]) == 1
    assert saved(tmp_path)["best"]["value"] == found.value


def test_trials_that_validate_badly_are_pruned(tmp_path):
    space = {RATE: Interval(1e-7, 1e-2, log=True)}
    found = tune("student", STUDENT, space, n_trials=8, folder=tmp_path, prune=True, jobs=2)
    pruned = [each for each in found.trials if each.status == "pruned"]
    assert pruned
    assert all(each.value < found.value for each in pruned)
    assert len(found.trials) == 8


def test_only_the_best_ensemble_keeps_its_outputs(tmp_path):
    student = run("student", *STUDENT, folder=tmp_path, quiet=True)
    space = {"ensemble.neighbours.share": ["0.1", "0.9"]}
    overrides = [*TOY, f"runs=[{student}]", "ensemble.titles.share=0"]
    found = tune("ensemble", overrides, space, n_trials=9, folder=tmp_path, jobs=3)
    assert [each.status for each in found.trials if each.status != "repeated"] == ["finished"] * 3
    kept = [file.relative_to(found.folder).parts[0] for file in found.folder.rglob("myrank_train.txt")]
    assert kept == [found.run.name]
    assert not (tmp_path / "data" / "teacher_outputs").exists()


def test_defaults_that_are_refused_end_the_search_at_once(tmp_path):
    overrides = ["dataset=csv", "dataset.interactions=gone.csv", "dataset.items=gone.csv"]
    with pytest.raises(StageError, match=r"trial 0, the defaults: DataError: .*gone\.csv"):
        tune("student", overrides, {RATE: [1e-3, 2e-3]}, folder=tmp_path)
    with pytest.raises(ConfigError, match="dropou"):
        tune("student", STUDENT, {"student.model.dropou": [0.1]}, folder=tmp_path)


def test_the_package_is_imported_without_optuna_and_hydra():
    code = "import sys, llm2rec.tune; assert not {'optuna', 'hydra', 'torch'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    code = "import sys, llm2rec.student.__main__; assert not {'optuna', 'sqlalchemy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
