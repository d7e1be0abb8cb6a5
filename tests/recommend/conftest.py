import sys
from pathlib import Path

import pytest

from llm2rec.data import Toy, prepare
from llm2rec.recommend import Recommender

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from command_helpers import run

TOY = ["dataset.n_users=60", "dataset.n_items=120", "dataset.n_worlds=5", "dataset.history_length=5"]


@pytest.fixture(scope="session")
def command():
    """Runs a stage as a user does; returns the finished process, output as text."""
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
