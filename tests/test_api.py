"""What `import llm2rec` offers, and the example that uses it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llm2rec
from llm2rec.launch import StageError, run

ROOT = Path(__file__).resolve().parents[1]
TINY = ["dataset=toy", "dataset.n_users=30", "dataset.n_items=48", "dataset.n_worlds=4", "logging.tensorboard=false"]


def test_every_name_is_there_documented_and_listed():
    for name in llm2rec.__all__:
        assert getattr(llm2rec, name).__doc__, name
        assert name in dir(llm2rec)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm2rec.nothing


def test_a_stage_is_run_and_gives_its_folder(tmp_path, capfd):
    folder = run("data", *TINY, folder=tmp_path)
    assert folder.parent == tmp_path / "result"
    assert (folder / "run.json").is_file()
    assert f"data: done, see result/{folder.name}" in capfd.readouterr().out
    assert run("data", *TINY, f"resume={folder}", folder=tmp_path, quiet=True) == folder
    assert capfd.readouterr().out == ""


def test_a_stage_that_fails_says_why(tmp_path):
    with pytest.raises(StageError, match=r"(?s)ended with exit code 1; .*n_users"):
        run("data", "dataset=toy", "dataset.n_users=-1", folder=tmp_path, quiet=True)


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / "notebook.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert told.count("teacher  ") == told.count("student  ") == 3
    assert "SASRec, " in told
    assert "sasrec + dllm2rec" in told
