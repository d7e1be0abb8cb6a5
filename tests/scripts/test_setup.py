"""`env_shell/setup.sh`, run for real with programs on PATH that only write down how they were called."""

import re
import sys
from pathlib import Path

import pytest
from script_checkout import CUDA_NAMES, Checkout


def test_setup_installs_torch_then_the_lock_then_the_project(checkout: Checkout) -> None:
    run = checkout.run("env_shell/setup.sh")
    assert run.returncode == 0, run.stderr
    torch, packages, project = checkout.calls("-m pip.* install ")
    assert torch.endswith("install --no-deps torch==2.13.0+cpu")
    assert "--no-deps" in packages
    assert "--require-hashes" in packages
    assert project.endswith("install --no-deps -e .")
    requirements = Path(f"{checkout.calls_file}.requirements").read_text()
    assert CUDA_NAMES.findall(requirements) == []
    assert "\ntorch==" not in requirements
    assert re.search(r"^transformers==[\d.]+ \\\n +--hash=sha256:", requirements, re.MULTILINE)


def test_second_setup_does_nothing(ready: Checkout) -> None:
    run = ready.run("env_shell/setup.sh")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert ready.calls("pip|venv") == []
    # What has the development tools serves those who do not ask for them.
    ready.run("env_shell/setup.sh", "--no-dev")
    assert ready.calls("pip|venv") == []


def test_tools_are_added_to_an_environment_without_them(checkout: Checkout) -> None:
    assert checkout.run("env_shell/setup.sh", "--no-dev").returncode == 0
    assert "\npytest==" not in Path(f"{checkout.calls_file}.requirements").read_text()
    assert checkout.run("env_shell/setup.sh").returncode == 0
    assert "\npytest==" in Path(f"{checkout.calls_file}.requirements").read_text()


def test_changed_lock_is_installed_into_what_is_there(ready: Checkout) -> None:
    with (ready.root / "poetry.lock").open("a") as lock:
        lock.write("# changed\n")
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert len(ready.calls("--require-hashes")) == 1
    assert ready.calls("-m venv") == []


def test_interrupted_setup_starts_over(ready: Checkout) -> None:
    (ready.root / ".venv" / ".llm2rec-unfinished").touch()
    (ready.root / ".venv" / "half-copied").touch()
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert len(ready.calls("-m venv --clear")) == 1
    assert not (ready.root / ".venv" / "half-copied").exists()
    assert not (ready.root / ".venv" / ".llm2rec-unfinished").exists()


def test_broken_python_is_replaced(ready: Checkout) -> None:
    python = ready.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/no/such/python")
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert len(ready.calls("-m venv --clear")) == 1


def test_moved_checkout_gets_a_new_environment(ready: Checkout) -> None:
    ready.root = ready.root.rename(ready.root.with_name("moved"))
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert len(ready.calls("-m venv --clear")) == 1


def test_another_checkouts_environment_is_not_emptied_through_a_link(ready: Checkout) -> None:
    other = (ready.root / ".venv").rename(ready.root.with_name("other"))
    stamp = other / ".llm2rec-ready"
    stamp.write_text(stamp.read_text().replace(str(ready.root), "/another/checkout"))
    before = sorted(other.rglob("*"))
    (ready.root / ".venv").symlink_to(other)
    run = ready.run("env_shell/setup.sh")
    assert run.returncode != 0
    assert f".venv is a link to {other}" in run.stderr
    assert "rm .venv" in run.stderr
    assert ready.calls("-m venv") == []
    assert sorted(other.rglob("*")) == before


def test_environment_of_others_is_completed_and_not_cleared(ready: Checkout) -> None:
    (ready.root / ".venv" / ".llm2rec-ready").unlink()  # as `poetry install` would have left it
    (ready.root / ".venv" / "precious").touch()
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert ready.calls("-m venv") == []
    assert (ready.root / ".venv" / "precious").exists()


def test_failed_install_is_not_taken_for_done(checkout: Checkout) -> None:
    run = checkout.run("env_shell/setup.sh", PIP_STATUS="1")
    assert run.returncode == 1
    assert "pip could not install the locked packages" in run.stderr
    assert not (checkout.root / ".venv" / ".llm2rec-ready").exists()
    # The next call goes on from there.
    assert checkout.run("env_shell/setup.sh").returncode == 0
    assert len(checkout.calls("--require-hashes")) == 1
    assert checkout.calls("-m venv") == []


def test_failed_change_and_way_back_is_installed_again(ready: Checkout) -> None:
    lock = ready.root / "poetry.lock"
    before = lock.read_text()
    lock.write_text(before + "# changed\n")
    assert ready.run("env_shell/setup.sh", PIP_STATUS="1").returncode == 1
    lock.write_text(before)  # packages of both locks may be there now
    assert ready.run("env_shell/setup.sh").returncode == 0
    assert len(ready.calls("--require-hashes")) == 1


def test_versions_that_differ_afterwards_fail_the_setup(checkout: Checkout) -> None:
    assert checkout.run("env_shell/setup.sh", CHECK_STATUS="1").returncode == 1
    assert not (checkout.root / ".venv" / ".llm2rec-ready").exists()


def test_uv_fetches_the_cpu_torch_where_pip_finds_none(checkout: Checkout) -> None:
    run = checkout.run("env_shell/setup.sh", CPU_TORCH_STATUS="1")
    assert run.returncode == 0, run.stderr
    (call,) = checkout.calls("^uv ")
    assert "--torch-backend cpu torch==2.13.0" in call
    assert str(checkout.root / ".venv/bin/python") in call


@pytest.mark.parametrize(("gpu", "torch_line"), [(True, True), (False, False)])
def test_gpu_decides_the_build_of_torch(checkout: Checkout, gpu: bool, torch_line: bool) -> None:
    if sys.platform != "linux":
        pytest.skip("one build of torch outside Linux")
    checkout.gpu(gpu)
    assert checkout.run("env_shell/setup.sh", LLM2REC_TORCH="").returncode == 0
    requirements = Path(f"{checkout.calls_file}.requirements").read_text()
    assert ("\ntorch==2.13.0 " in requirements) == torch_line
    assert bool(CUDA_NAMES.search(requirements)) == torch_line
    assert bool(checkout.calls(r"\+cpu$")) != torch_line


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cu130"])
def test_the_torch_below_serves_where_it_is_the_locked_one(checkout: Checkout, torch: str) -> None:
    settings = {"LLM2REC_TORCH": "base", "FAKE_TORCH": torch}
    run = checkout.run("env_shell/setup.sh", **settings)
    assert run.returncode == 0, run.stderr
    assert len(checkout.calls("-m venv --clear --system-site-packages")) == 1
    assert checkout.calls("pip.* (un)?install.*torch") == []
    requirements = Path(f"{checkout.calls_file}.requirements").read_text()
    assert "\ntorch==" not in requirements
    assert CUDA_NAMES.findall(requirements) == []
    assert "\ntransformers==" in requirements
    checkout.run("env_shell/setup.sh", **settings)
    assert checkout.calls("pip|venv") == []


@pytest.mark.parametrize(
    ("torch", "told"),
    [("2.9.0+cu128", "has torch 2.9.0+cu128, expected 2.13.0"), ("2.13.0+cpu", "no torch with CUDA"), ("", "no torch")],
)
def test_another_torch_below_is_replaced(checkout: Checkout, torch: str, told: str) -> None:
    run = checkout.run("env_shell/setup.sh", LLM2REC_TORCH="base", FAKE_TORCH=torch)
    assert run.returncode == 0, run.stderr
    assert told in run.stderr
    requirements = Path(f"{checkout.calls_file}.requirements").read_text()
    assert "\ntorch==2.13.0 " in requirements
    assert CUDA_NAMES.search(requirements)


def test_old_python_is_named(checkout: Checkout) -> None:
    checkout.program("oldpython", '#!/bin/sh\ncase "$*" in *platform*) echo 3.9.2 ;; esac\nexit 1\n')
    run = checkout.run("env_shell/setup.sh", PYTHON="oldpython")
    assert run.returncode == 1
    assert "Python 3.11 or newer is needed; found: oldpython (3.9.2" in run.stderr


def test_missing_venv_module_is_named(checkout: Checkout) -> None:
    checkout.program("barepython", '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexit 0\n')
    run = checkout.run("env_shell/setup.sh", PYTHON="barepython")
    assert run.returncode == 1
    assert "python3-venv" in run.stderr


@pytest.mark.parametrize(("argument", "torch"), [("--nodev", "cpu"), ("--no-dev", "gpu")])
def test_wrong_settings_are_refused(checkout: Checkout, argument: str, torch: str) -> None:
    run = checkout.run("env_shell/setup.sh", argument, LLM2REC_TORCH=torch)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert not (checkout.root / ".venv").exists()
