"""Dockerfile, compose file and the scripts that start containers, with a `docker` that only writes down its calls."""

import json
import os
import re
import subprocess
from types import ModuleType

import pytest
import yaml
from script_checkout import ROOT, Checkout, linter

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
    assert "Docker engine does not respond" in run.stderr
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
