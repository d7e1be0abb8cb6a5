import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from script_checkout import ROOT, Checkout


@pytest.fixture(scope="module")
def lock_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locked_requirements", ROOT / "env_shell" / "locked_requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def environment_set_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = Checkout(tmp_path_factory.mktemp("set-up"))
    run = checkout.run("env_shell/setup.sh")
    assert run.returncode == 0, run.stderr
    return checkout.root / ".venv"


@pytest.fixture
def ready(checkout: Checkout, environment_set_up: Path) -> Checkout:
    """A checkout that is set up: a copy of one that was, told that it was made here."""
    shutil.copytree(environment_set_up, checkout.root / ".venv")
    stamp = checkout.root / ".venv" / ".llm2rec-ready"
    stamp.write_text(stamp.read_text().replace(str(environment_set_up.parent), str(checkout.root)))
    return checkout
