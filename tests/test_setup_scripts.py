"""The shell scripts, run for real with programs on PATH that only write down how they were called."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("cmd/*.sh"), *ROOT.glob("env_shell/*.sh"), ROOT / ".ci" / "run"])
RUNNABLE = [path for path in SCRIPTS if not path.name.startswith("_")]
CUDA_NAMES = re.compile(r"^(nvidia|cuda|triton)", re.MULTILINE)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# All scripts --------------------------------------------------------------------------------------------------------


def test_all_scripts_are_there() -> None:
    expected = {"cmd/quickstart.sh", "cmd/test.sh", "cmd/run_all_pipeline.sh", "cmd/run_teacher_train.sh", ".ci/run"}
    assert expected <= set(names(SCRIPTS))


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_script_parses(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("script", RUNNABLE, ids=names(RUNNABLE))
def test_script_tells_what_it_does(script: Path) -> None:
    assert os.access(script, os.X_OK)
    run = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=20)
    assert run.returncode == 0
    assert script.name in run.stdout
    assert "set -" not in run.stdout  # the header alone


def linter(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_scripts_pass_shellcheck() -> None:
    run = subprocess.run([linter("shellcheck"), "-x", *names(SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout + run.stderr == ""


# The lock -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lock_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locked_requirements", ROOT / "env_shell" / "locked_requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


# A checkout with a Python that writes down its calls -----------------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
here="$(dirname "$0")"
printf '%s\\n' "python $*" >>"$CALLS"
case "$*" in
  "-m venv"*)
    place="${!#}"
    case "$*" in *--clear*) rm -rf "$place" ;; esac
    mkdir -p "$place/bin" && cp "$0" "$place/bin/python" && exit ;;
  "-m pip"*"+cpu") exit "${CPU_TORCH_STATUS:-0}" ;;
  "-m pip"*"install uv"*) printf '#!/bin/sh\\necho "uv $*" >>"$CALLS"\\n' >"$here/uv" && chmod +x "$here/uv" && exit ;;
  "-m pip"*"-r "*) cp "${!#}" "$CALLS.requirements" && exit "${PIP_STATUS:-0}" ;;
  "-m pip"*) exit ;;
  "-m accelerate"*) case "$*" in *"${FAILING_STAGE:-nothing fails}"*) exit 3 ;; esac; exit 0 ;;
  "-m ruff check"*) exit "${RUFF_STATUS:-0}" ;;
  "-m ruff"* | "-m mypy"* | "-m pytest"*) exit ;;
  *" check "*) exit "${CHECK_STATUS:-0}" ;;
  *'m.version("torch")'*) [ -n "${FAKE_TORCH:-}" ] && echo "$FAKE_TORCH" ; exit ;;
esac
exec "$REAL_PYTHON" "$@"
"""


class Checkout:
    """A copy of what the scripts need, and the calls that they make from it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        self.root.mkdir()
        for part in ("cmd", "env_shell", "accelerate_configs", ".ci"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("poetry.lock", "pyproject.toml", "Dockerfile"):
            shutil.copy(ROOT / part, self.root / part)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls_file = folder / "calls"
        self.program("fakepython", FAKE_PYTHON)
        self.gpu(False)
        drop = ("LLM2REC_", "ACCELERATE_", "OMP_", "PYTEST_", "FAKE_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "PYTHON": str(self.bin / "fakepython"),
            "REAL_PYTHON": sys.executable,
            "LLM2REC_TORCH": "cpu",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def gpu(self, there: bool) -> None:
        self.program("nvidia-smi", f"#!/bin/sh\nexit {0 if there else 9}\n")

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            ["bash", self.root / script, *arguments],
            env=self.environment | environment,
            cwd=self.bin,  # not the checkout: scripts work from anywhere
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )

    def calls(self, pattern: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if re.search(pattern, line)]


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


# Set-up -------------------------------------------------------------------------------------------------------------


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


# Commands -----------------------------------------------------------------------------------------------------------


def stages(checkout: Checkout) -> list[str]:
    return [re.search(r"-m llm2rec\.(\w+)", call).group(1) for call in checkout.calls("accelerate")]  # type: ignore[union-attr]


def test_pipeline_runs_every_stage_in_order_with_the_overrides(ready: Checkout) -> None:
    run = ready.run("cmd/run_all_pipeline.sh", "seed=7", "student=gru4rec")
    assert run.returncode == 0, run.stderr
    order = list(dict.fromkeys(stages(ready)))
    assert order == ["data", "student", "teacher", "distill", "evaluate"]
    assert all("seed=7" in call for call in ready.calls("accelerate"))


@pytest.mark.parametrize(("arguments", "reuse"), [(["seed=7"], "true"), (["seed=7", "--force"], "false"), ([], "true")])
def test_pipeline_takes_what_is_up_to_date_unless_forced(ready: Checkout, arguments: list[str], reuse: str) -> None:
    run = ready.run("cmd/run_all_pipeline.sh", *arguments)
    assert run.returncode == 0, run.stderr
    *others, evaluate = ready.calls("accelerate")
    assert len(others) == 5
    assert all(call.endswith(f" reuse={reuse}") for call in others)
    assert "reuse" not in evaluate
    assert "--force" not in "".join([*others, evaluate])


def test_pipeline_stops_where_a_stage_fails(ready: Checkout) -> None:
    run = ready.run("cmd/run_all_pipeline.sh", FAILING_STAGE="llm2rec.teacher")
    assert run.returncode == 3
    assert "distill" not in stages(ready)


def test_quickstart_sets_up_and_takes_the_toy(checkout: Checkout) -> None:
    run = checkout.run("cmd/quickstart.sh", "seed=3")
    assert run.returncode == 0, run.stderr
    assert len(checkout.calls("--require-hashes")) == 1
    assert all("dataset=toy llm=tiny_random" in call for call in checkout.calls("accelerate"))
    assert all("seed=3" in call for call in checkout.calls("accelerate"))


@pytest.mark.parametrize(
    ("script", "stage"),
    [("run_teacher_train", "teacher"), ("run_student_baseline", "student"), ("run_distill_dllm2rec", "distill")],
)
def test_each_command_launches_its_stage(ready: Checkout, script: str, stage: str) -> None:
    assert ready.run(f"cmd/{script}.sh", "dataset=toy", "note='two words'").returncode == 0
    assert stages(ready) == [stage]
    assert ready.calls("accelerate")[0].endswith("dataset=toy note='two words'")


@pytest.mark.parametrize(
    ("gpu", "setting", "file"),
    [
        (False, "", "accelerate_configs/cpu.yaml"),
        (True, "", "accelerate_configs/single_a100.yaml"),
        (True, "cpu", "accelerate_configs/cpu.yaml"),
        (False, "multi_gpu_zero2", "accelerate_configs/multi_gpu_zero2.yaml"),
    ],
)
def test_launch_configuration_fits_the_machine(ready: Checkout, gpu: bool, setting: str, file: str) -> None:
    ready.gpu(gpu)
    run = ready.run("cmd/run_student_baseline.sh", ACCELERATE_CONFIG=setting)
    assert run.returncode == 0, run.stderr
    assert f"--config_file {file} " in ready.calls("accelerate")[0]


def test_unknown_launch_configuration_is_named(ready: Checkout) -> None:
    run = ready.run("cmd/run_student_baseline.sh", ACCELERATE_CONFIG="tpu")
    assert run.returncode == 1
    assert "'tpu'" in run.stderr
    assert "single_a100" in run.stderr
    assert ready.calls("accelerate") == []


def test_tests_run_in_several_processes(ready: Checkout) -> None:
    assert ready.run("cmd/test.sh", "-k", "something", LLM2REC_TEST_WORKERS="2").returncode == 0
    (call,) = ready.calls("-m pytest")
    assert "-n 2 " in call
    assert call.endswith("-k something")


# CI -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ci(ready: Checkout) -> Checkout:
    for name in ("shellcheck", "hadolint"):
        program = ready.root / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\n')
        program.chmod(0o755)
    ready.program("poetry", '#!/bin/sh\necho "poetry $*" >>"$CALLS"\necho "Poetry (version 2.5.1)"\n')
    ready.program("chromium", "#!/bin/sh\n")  # else CI would install a real one
    subprocess.run(["git", "init", "-q", ready.root], check=True)
    return ready


def test_ci_runs_every_step(ci: Checkout) -> None:
    run = ci.run(".ci/run")
    assert run.returncode == 0, run.stderr
    assert "-m not gpu" in ci.calls("-m pytest")[0]
    assert len(ci.calls("ruff")) == 2
    assert len(ci.calls("mypy")) == 1
    assert "cmd/test.sh" in ci.calls("^shellcheck")[0]
    assert ".ci/run" in ci.calls("^shellcheck")[0]
    assert ci.calls("^poetry check") == ["poetry check --lock"]


def test_ci_names_the_failed_step_and_goes_on(ci: Checkout) -> None:
    run = ci.run(".ci/run", RUFF_STATUS="1")
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("FAILED: ruff check")
    assert ci.calls("^poetry check") == ["poetry check --lock"]


# Containers ---------------------------------------------------------------------------------------------------------

FAKE_DOCKER = """#!/usr/bin/env bash
printf '%s\\n' "docker $*" >>"$CALLS"
case "$1 $2" in
  "info "*) exit "${ENGINE_STATUS:-0}" ;;
  "container inspect") [ -n "${STATE:-}" ] && echo "$STATE" ;;
  "image inspect") [ "${IMAGE:-}" = there ] ;;
esac
"""
START = "env_shell/start_experiment_container.sh"
ATTACH = "env_shell/attach_experiment_container.sh"


@pytest.fixture
def docker(checkout: Checkout) -> Checkout:
    checkout.program("docker", FAKE_DOCKER)
    return checkout


def test_missing_image_is_built_then_run(docker: Checkout) -> None:
    run = docker.run(START)
    assert run.returncode == 0, run.stderr
    assert [call.split()[1] for call in docker.calls("build|run")] == ["build", "run"]
    assert docker.calls("build")[0].endswith(f"--tag llm2rec:cpu --build-arg DEVICE=cpu {docker.root}")


def test_image_that_is_there_is_run_only(docker: Checkout) -> None:
    assert docker.run(START, IMAGE="there").returncode == 0
    (call,) = docker.calls("docker (build|run|exec)")
    assert call.startswith("docker run ")
    assert f"--volume {docker.root}:/workspace " in call
    assert "--workdir /workspace" in call
    assert f"--user {os.getuid()}:{os.getgid()}" in call
    assert "--security-opt no-new-privileges" in call
    assert "--privileged" not in call
    assert "--env HOME=" in call
    assert call.endswith("bash")
    assert " -it " not in call  # no terminal here
    # Docker would make these as root.
    assert (docker.root / ".venv").is_dir()
    assert list((docker.bin.parent / "cache").glob("*/venv-cpu"))


@pytest.mark.parametrize("gpu", [True, False])
def test_gpus_are_handed_over_where_there_are_any(docker: Checkout, gpu: bool) -> None:
    docker.gpu(gpu)
    assert docker.run(START, IMAGE="there").returncode == 0
    (call,) = docker.calls("docker run")
    assert ("--gpus all" in call, "/venv-gpu:" in call, " llm2rec:gpu bash" in call) == (gpu, gpu, gpu)
    assert docker.run(START, IMAGE="there", LLM2REC_DEVICE="cpu").returncode == 0
    assert " llm2rec:cpu bash" in docker.calls("docker run")[0]
    wrong = docker.run(START, LLM2REC_DEVICE="tpu")
    assert (wrong.returncode, "expected cpu or gpu" in wrong.stderr) == (1, True)


def test_command_reaches_the_container(docker: Checkout) -> None:
    assert docker.run(START, "bash", "cmd/quickstart.sh", "seed=1", IMAGE="there").returncode == 0
    assert docker.calls("docker run")[0].endswith("setup bash cmd/quickstart.sh seed=1")


@pytest.mark.parametrize("script", [START, ATTACH])
@pytest.mark.parametrize(
    ("state", "expected"),
    [("running", ["exec"]), ("exited", ["start", "exec"]), ("paused", ["unpause", "exec"])],
)
def test_container_that_is_there_is_joined(docker: Checkout, script: str, state: str, expected: list[str]) -> None:
    run = docker.run(script, "nvidia-smi", STATE=state, IMAGE="there")
    assert run.returncode == 0, run.stderr
    calls = docker.calls("docker (build|run|exec|start|unpause)")
    assert [call.split()[1] for call in calls] == expected
    assert calls[-1].endswith("llm2rec-experiment nvidia-smi")


def test_nothing_to_attach_to_is_said(docker: Checkout) -> None:
    run = docker.run(ATTACH)
    assert run.returncode == 1
    assert "start_experiment_container.sh" in run.stderr


def test_silent_engine_is_said(docker: Checkout) -> None:
    run = docker.run(START, ENGINE_STATUS="1")
    assert run.returncode == 1
    assert "Docker engine does not answer" in run.stderr
    assert docker.calls("docker (build|run)") == []


def test_dockerfile_follows_the_lock_and_copies_no_code(lock_reader: ModuleType) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM pytorch/pytorch:(.+?)-cuda", text, re.MULTILINE).group(1) == lock_reader.torch_version()  # type: ignore[union-attr]
    assert re.findall(r"^\s*(COPY|ADD)\b", text, re.MULTILINE) == []
    assert "WORKDIR /workspace" in text


def test_dockerfile_makes_an_image_with_and_one_without_cuda() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\w+)\nENV LLM2REC_TORCH=(\w+)$", text, re.MULTILINE)
    assert stages == [("gpu", "base"), ("cpu", "cpu")]
    assert re.search(r"^ARG DEVICE=gpu$", text, re.MULTILINE)
    assert re.search(r"^FROM \$\{DEVICE\}$", text, re.MULTILINE)
    assert len(re.findall(r"^RUN --mount=type=cache", text, re.MULTILINE)) == 2


def test_compose_starts_what_the_script_starts(docker: Checkout) -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services.keys() == {"cpu", "gpu"}
    for device, service in services.items():
        assert docker.run(START, IMAGE="there", LLM2REC_DEVICE=device).returncode == 0
        (call,) = docker.calls("docker run")
        assert f" {service['image']} bash -c bash env_shell/setup.sh" in call
        assert service["build"] == {"context": ".", "args": {"DEVICE": device}}
        assert [each.split(":")[-1] for each in service["volumes"]] == re.findall(r"--volume \S+?:(\S+)", call)
        assert [each.split("/")[-1] for each in service["volumes"][1:]] == ["experiment", ".venv"]
        assert f"/venv-{device}:" in service["volumes"][2]
        assert [f"--env {name}" in call for name in service["environment"]] == [True] * 3
        assert (f"--ipc {service['ipc']}" in call, "--security-opt" in call) == (True, True)
        assert ("--gpus" in call) == ("deploy" in service)
        assert service["entrypoint"][:2] == ["bash", "-c"]
        assert service["user"] == "${LLM2REC_UID:-1000}:${LLM2REC_GID:-1000}"
        container = json.loads((ROOT / ".devcontainer" / device / "devcontainer.json").read_text())
        assert container["service"] == device
        assert (ROOT / ".devcontainer" / device / container["dockerComposeFile"]).resolve() == ROOT / "compose.yaml"
        assert container["workspaceFolder"] == service["working_dir"]
        assert container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"].startswith(
            "/workspace/.venv/"
        )


def test_image_is_nobody_elses_root() -> None:
    users = re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")


def test_dockerfile_passes_hadolint() -> None:
    run = subprocess.run([linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout + run.stderr == ""
