import pytest
from engine_helpers import fresh_processes  # noqa: F401


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):  # noqa: F811
    return fresh_processes
