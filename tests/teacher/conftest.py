"""One small dataset for all tests of the teacher."""

import os

import pytest
from engine_helpers import fresh_processes  # noqa: F401
from teacher_helpers import engine_in, finished_run, recommender_of

from llm2rec.data import RecData, prepare
from llm2rec.data.toy import Toy

os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> RecData:
    return prepare(
        Toy(n_users=30, n_items=48, n_worlds=4, min_length=5, max_length=9), tmp_path_factory.mktemp("processed")
    )


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("llm")


@pytest.fixture(scope="session")
def recommender(data, tmp_path_factory):
    """A student of random weights."""
    folder = tmp_path_factory.mktemp("student")
    return recommender_of(finished_run(folder / "run", data, width=24), data, folder / "kept")


@pytest.fixture
def engine(tmp_path):
    return engine_in(tmp_path / "run")
