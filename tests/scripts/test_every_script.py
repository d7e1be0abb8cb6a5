"""What holds of every shell script."""

import os
import subprocess
from pathlib import Path

import pytest
from script_checkout import ROOT, linter

SCRIPTS = sorted([*ROOT.glob("cmd/*.sh"), *ROOT.glob("env_shell/*.sh"), ROOT / ".ci" / "run"])
RUNNABLE = [path for path in SCRIPTS if not path.name.startswith("_")]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_all_scripts_are_there() -> None:
    expected = {"cmd/quickstart.sh", "cmd/test.sh", "cmd/run_all_pipeline.sh", "cmd/run_teacher_train.sh", ".ci/run"}
    assert expected <= set(names(SCRIPTS))


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_script_parses(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", RUNNABLE, ids=names(RUNNABLE))
def test_script_tells_what_it_does(script: Path) -> None:
    assert os.access(script, os.X_OK)
    run = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=20)
    assert run.returncode == 0
    assert script.name in run.stdout
    assert "set -" not in run.stdout  # the header alone


def test_scripts_pass_shellcheck() -> None:
    run = subprocess.run([linter("shellcheck"), "-x", *names(SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout + run.stderr == ""
