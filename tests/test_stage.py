"""What every stage does: reuse finished runs, report errors in one line, log as Hydra is configured to."""

import ast
import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import llm2rec
from llm2rec.core.errors import ConfigError, Interrupted
from llm2rec.core.files import write_json
from llm2rec.reporting import error_line, exit_code, interrupt_as_error
from llm2rec.stage import made_by_other_code, same_runs

CONFIG = {
    "dataset": {"name": "toy", "seed": 0},
    "student": {"training": {"epochs": 3, "micro_batch_size": None}},
    "teacher": {"r": 8},
    "seed": 1,
}
READS = ("dataset", "seed", "student")
# What every stage reads without a change in what it makes, and what `reads` need not name.
ALWAYS = {"dataset", "seed", "paths", "logging", "resume", "finish", "reuse"}


def run_in(results, name, stage="student", status="finished", config=CONFIG, **more):
    folder = results / name
    write_json(folder / "config.json", config)
    dataset = {"name": "toy", "fingerprint": "f"}
    write_json(folder / "run.json", {"stage": stage, "status": status, "dataset": dataset, **more})
    return folder


def changed(**values):
    config = copy.deepcopy(CONFIG)
    for key, value in values.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def found(results, config=CONFIG):
    return [folder.name for folder, _ in same_runs(results, "student", config, READS)]


def test_the_newest_finished_run_of_the_same_stage_comes_first(tmp_path):
    assert found(tmp_path) == []
    run_in(tmp_path, "result_1")
    run_in(tmp_path, "result_2")
    run_in(tmp_path, "result_3", status="running")
    run_in(tmp_path, "result_4", stage="teacher")
    (tmp_path / "result_5").mkdir()
    write_json(tmp_path / "result_6" / "run.json", {"stage": "student"})
    write_json(tmp_path / "result_7" / "run.json", {"stage": "student", "status": "finished", "dataset": {}})
    run_in(tmp_path, "result_8", config={"seed": 1})
    run_in(tmp_path, "result_9", ended_early=True)
    assert same_runs(tmp_path, "student", CONFIG, READS) == [(tmp_path / "result_2", "f"), (tmp_path / "result_1", "f")]


@pytest.mark.parametrize(
    ("values", "is_found"),
    [
        ({"teacher__r": 16}, True),  # which a student does not read
        ({"student__training__micro_batch_size": 4}, True),
        ({"student__training__epochs": 4}, False),
        ({"dataset__seed": 1}, False),
        ({"seed": 2}, False),
    ],
)
def test_only_what_the_stage_reads_has_to_be_the_same(tmp_path, values, is_found):
    run_in(tmp_path, "result_1")
    assert bool(found(tmp_path, changed(**values))) == is_found


def test_a_home_folder_in_an_option_is_the_same_as_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    run_in(tmp_path, "result_1", config=changed(dataset__file="~/shop.csv"))
    assert found(tmp_path, changed(dataset__file="/home/ann/shop.csv")) == ["result_1"]


def test_a_run_of_another_commit_is_recognised(tmp_path):
    assert made_by_other_code(run_in(tmp_path, "result_1")) is None
    other = run_in(tmp_path, "result_2", git={"commit": "1" * 40})
    assert made_by_other_code(other) in ("1" * 12, None)  # None where this is no checkout


def test_stages_name_all_that_they_read():
    """Else a run of another configuration would be taken for this one."""
    checked = []
    for file in Path(llm2rec.__file__).parent.rglob("__main__.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "stage"]
        (reads,) = [kw.value for call in calls for kw in call.keywords if kw.arg == "reads"] or [None]
        if reads is None:
            continue
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        read = {node.attr for node in attributes if ast.unparse(node.value) == "cfg"}
        assert read <= {*ast.literal_eval(reads), *ALWAYS}, file
        checked.append(file.parent.name)
    assert sorted(checked) == ["data", "distill", "ensemble", "student", "teacher"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("`seed` is -1,\n  expected 0 or more."), "ConfigError: `seed` is -1, expected 0 or more."),
        (PermissionError(13, "Permission denied", "/x"), "ConfigError: /x: Permission denied; use another path"),
        (FileNotFoundError(2, "No such file or directory", "/x"), None),  # the code should have looked
        (RuntimeError("shapes differ"), None),
    ],
)
def test_errors_that_a_user_can_act_on_have_one_line(error, line):
    found = error_line(error)
    assert found is None if line is None else found.startswith(line)


@pytest.mark.parametrize(
    ("stop", "line", "code"),
    [
        (KeyboardInterrupt(), "Interrupted: Ctrl-C received. Continue.", 130),
        (KeyboardInterrupt(signal.SIGTERM), "Interrupted: SIGTERM received. Continue.", 143),
        (Interrupted("step 3 is stored.", signal.SIGINT), "Interrupted: step 3 is stored. Continue.", 130),
    ],
)
def test_an_interruption_says_how_to_continue(stop, line, code):
    with pytest.raises(Interrupted) as caught, interrupt_as_error(" Continue."):
        raise stop
    assert (error_line(caught.value), exit_code(caught.value)) == (line, code)


def launch(folder, *overrides):
    """The data stage of a tiny dataset, as a user starts it."""
    root = Path(llm2rec.__file__).parents[1]
    toy = ["dataset.n_users=20", "dataset.n_items=60", "dataset.n_worlds=5"]
    command = [sys.executable, "-m", "llm2rec.data", *toy, *overrides]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"],
        pytest.param(["hydra/job_logging=none", "hydra/hydra_logging=none"], marks=pytest.mark.slow),
        pytest.param(["hydra/job_logging=stdout", "hydra.output_subdir=null"], marks=pytest.mark.slow),
        pytest.param(["hydra/job_logging=default", "hydra.job.chdir=false"], marks=pytest.mark.slow),
        pytest.param(["hydra/hydra_logging=hydra_debug", "hydra.run.dir=there/x"], marks=pytest.mark.slow),
    ],
)
def test_a_run_finishes_with_any_logging_of_hydra_and_errors_are_shown(tmp_path, overrides):
    done = launch(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("*/*/run.json")
    assert '"finished"' in record.read_text()
    failed = launch(tmp_path, *overrides, "seed=-1")
    assert failed.returncode == 1
    assert (failed.stdout + failed.stderr).count("`seed` is -1, expected 0 or more.") == 1
    assert "Traceback" not in failed.stdout + failed.stderr
    assert len([*(tmp_path / "result").glob("*")]) <= 1  # the refused run leaves no folder


def test_help_says_what_the_stage_does_and_hides_the_schemas(tmp_path):
    shown = launch(tmp_path, "--help").stdout
    assert "prepare a dataset" in shown
    assert "  python -m llm2rec.data dataset=csv" in shown
    assert re.search(r"^  dataset\.k_core=0 +Keep only users and items", shown, re.MULTILINE)
    assert (
        "dataset=toy: amazon_beauty, amazon_games, amazon_office, amazon_sports, amazon_toys, csv, movielens, toy"
        in shown
    )
    assert "base_" not in shown
