import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm2rec.data import Toy, prepare
from llm2rec.recommend import Recommender

ROOT = Path(__file__).resolve().parents[2]
TOY = ["dataset.n_users=60", "dataset.n_items=120", "dataset.n_worlds=5", "dataset.history_length=5"]


@pytest.fixture(scope="session")
def command():
    """Run a stage as a user does; returns the finished process, output as text."""

    def run(folder, stage, *overrides, check=True):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        arguments = [sys.executable, "-m", f"llm2rec.{stage}", *overrides]
        done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, command):
    """The run folder of a student, made by its command."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["student.training.epochs=3", "student.model.width=16", "logging.tensorboard=false"]
    command(folder, "student", *TOY, *settings)
    (run,) = (folder / "result").iterdir()
    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The dataset that it was trained on."""
    return prepare(Toy(n_users=60, n_items=120, n_worlds=5, history_length=5), tmp_path_factory.mktemp("processed"))


@pytest.fixture(scope="session")
def recommender(trained):
    return Recommender.load(trained)
