import sys
from pathlib import Path

import pytest
from engine_helpers import fresh_processes  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "teacher"))


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):  # noqa: F811
    return fresh_processes
