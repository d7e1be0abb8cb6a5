import pytest
from engine_helpers import fresh_processes  # noqa: F401

from llm2rec.data import Toy, prepare


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):  # noqa: F811
    return fresh_processes


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare(Toy(n_users=30, n_items=60, n_worlds=5), tmp_path_factory.mktemp("processed"))
