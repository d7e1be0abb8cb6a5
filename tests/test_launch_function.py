"""The function `launch` of ``cmd/_common.sh``: stages run where the caller stands and end with their own error."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE = """
import os, pathlib, signal, sys
print(pathlib.Path.cwd(), os.environ["ACCELERATE_MIXED_PRECISION"], *sys.argv[1:], flush=True)
if os.environ.get("RANK", "0") == "1":
    sys.exit(0)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.stderr.write("ConfigError: no.\\n")
sys.exit(7)
"""


@pytest.fixture
def launch(tmp_path):
    """A checkout whose stage `failing` reports one error; the function launches it from a folder beside."""
    root, here = tmp_path / "checkout", tmp_path / "here"
    for part in ("cmd", "env_shell", "accelerate_configs"):
        shutil.copytree(ROOT / part, root / part)
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{root}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (root / "llm2rec").mkdir()
    (root / "llm2rec" / "__init__.py").touch()
    (root / "llm2rec" / "failing.py").write_text(STAGE)
    here.mkdir()

    def run(config, *arguments):
        script = f'set -euo pipefail; . "{root}/cmd/_common.sh"; launch failing "$@"; echo not reached'
        command = ["bash", "-c", script, "script", *arguments]
        environment = {"PATH": "/usr/bin:/bin", "ACCELERATE_CONFIG": config}
        return here, subprocess.run(
            command, cwd=here, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )

    return run


def test_one_process_runs_without_a_launcher_where_the_caller_stands(launch):
    here, done = launch("cpu", "dataset=toy", "note=two words")
    assert done.stdout == f"{here} no dataset=toy note=two words\n"
    assert done.stderr == ">>> llm2rec.failing dataset=toy note=two words\nConfigError: no.\n"
    assert done.returncode == 7


@pytest.mark.parametrize("stage_ends", ["fail", "kill"])
def test_several_processes_end_with_the_error_of_the_stage(launch, tmp_path, stage_ends):
    config = (ROOT / "accelerate_configs" / "multi_gpu_ddp.yaml").read_text()
    lines = [line for line in config.splitlines() if not line.startswith(("use_cpu", "num_processes", "mixed_prec"))]
    file = tmp_path / "cpu_ddp.yaml"
    file.write_text("\n".join([*lines, "use_cpu: true", "num_processes: 2", "mixed_precision: 'no'"]))
    _, done = launch(str(file), stage_ends)
    assert "Traceback" not in done.stderr
    assert "not reached" not in done.stdout
    expected = "ConfigError: no." if stage_ends == "fail" else "a process was killed by signal 9"
    assert expected in done.stderr.splitlines()[-1]
    assert done.returncode == (7 if stage_ends == "fail" else 137)
