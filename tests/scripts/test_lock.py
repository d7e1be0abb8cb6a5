"""The lock, as set-up and container read it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from script_checkout import CUDA_NAMES, ROOT

LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"}
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def machine(platform: dict[str, str], python: str) -> dict[str, str]:
    return platform | {"python_version": python, "python_full_version": f"{python}.1"}


@pytest.mark.parametrize("python", PYTHONS)
def test_cuda_variant_is_the_whole_lock(lock_reader: ModuleType, python: str) -> None:
    locked = {p.name: p.version for p in lock_reader.locked_packages(environment=machine(LINUX, python))}
    assert locked["torch"] == "2.13.0"
    assert {"nvidia-cublas", "triton", "deepspeed", "bitsandbytes", "pytest", "ruff"} <= set(locked)


@pytest.mark.parametrize("python", PYTHONS)
def test_cpu_variant_has_no_cuda_package(lock_reader: ModuleType, python: str) -> None:
    packages = list(lock_reader.locked_packages(variant="cpu", environment=machine(LINUX, python)))
    locked = {package.name for package in packages}
    assert [name for name in locked if CUDA_NAMES.match(name)] == []
    assert "torch" not in locked
    assert {"transformers", "deepspeed", "sympy", "pytest"} <= locked
    assert all(package.hashes for package in packages)


@pytest.mark.parametrize("python", PYTHONS)
def test_mac_takes_torch_and_nothing_for_linux(lock_reader: ModuleType, python: str) -> None:
    locked = {package.name for package in lock_reader.locked_packages(environment=machine(MAC, python))}
    assert "torch" in locked
    assert "deepspeed" not in locked
    assert [name for name in locked if CUDA_NAMES.match(name)] == []


def test_development_tools_can_be_left_out(lock_reader: ModuleType) -> None:
    environment = machine(LINUX, "3.12")
    everything = {package.name for package in lock_reader.locked_packages(environment=environment)}
    main = {package.name for package in lock_reader.locked_packages(dev=False, environment=environment)}
    assert main < everything
    assert {"pytest", "ruff", "mypy"} <= everything - main


def test_two_versions_for_one_machine_are_refused(lock_reader: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "poetry.lock"
    entry = '[[package]]\nname = "numpy"\nversion = "{}"\noptional = false\ngroups = ["main"]\nfiles = []\n'
    lock.write_text(entry.format("1.0") + entry.format("2.0"))
    with pytest.raises(ValueError, match=r"numpy is locked at both 1\.0 and 2\.0"):
        list(lock_reader.locked_packages(lock))


def test_differences_name_what_is_not_as_locked(lock_reader: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "poetry.lock"
    entry = '[[package]]\nname = "{}"\nversion = "{}"\noptional = false\ngroups = ["main"]\nfiles = []\n'
    pytest_version = importlib.metadata.version("pytest")
    lock.write_text(
        entry.format("pytest", pytest_version) + entry.format("torch", "0.1") + entry.format("no-such-thing", "1.0")
    )
    found = lock_reader.differences(variant="cpu", dev=True, lock=lock)
    assert [line.split(":")[0] for line in found] == ["no-such-thing", "torch"]
    assert "installed missing" in found[0]


def test_a_fresh_environment_reads_the_lock_with_the_pip_it_has(lock_reader: ModuleType, tmp_path: Path) -> None:
    # The pip of a fresh Python may be years older than ours, and its copy of `packaging` knows less.
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    run = subprocess.run(
        [tmp_path / "fresh" / "bin" / "python", lock_reader.__file__, "list", "--variant", "cpu", "--no-dev"],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
    listed = [line.split("==")[0] for line in run.stdout.splitlines() if "==" in line]
    assert listed == [package.name for package in lock_reader.locked_packages(variant="cpu", dev=False)]


def test_lock_names_no_package_index() -> None:
    assert "[package.source]" not in (ROOT / "poetry.lock").read_text()
