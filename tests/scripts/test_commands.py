"""The scripts of `cmd/` and CI, run for real with programs on PATH that only write down how they were called."""

import re
import subprocess

import pytest
from script_checkout import Checkout


def launches(checkout: Checkout) -> list[str]:
    return checkout.calls(r"-m llm2rec\.")


def stages(checkout: Checkout) -> list[str]:
    return [re.search(r"-m llm2rec\.(\w+)", call).group(1) for call in launches(checkout)]  # type: ignore[union-attr]


def test_pipeline_runs_every_stage_in_order_with_the_overrides(ready: Checkout) -> None:
    run = ready.run("cmd/run_all_pipeline.sh", "seed=7", "student=gru4rec")
    assert run.returncode == 0, run.stderr
    order = list(dict.fromkeys(stages(ready)))
    assert order == ["data", "student", "teacher", "distill", "ensemble", "evaluate"]
    assert "distill=listwise_reading" in launches(ready)[-2]
    assert all("seed=7" in call for call in launches(ready))


@pytest.mark.parametrize(("arguments", "reuse"), [(["seed=7"], "true"), (["seed=7", "--force"], "false"), ([], "true")])
def test_pipeline_takes_what_is_up_to_date_unless_forced(ready: Checkout, arguments: list[str], reuse: str) -> None:
    run = ready.run("cmd/run_all_pipeline.sh", *arguments)
    assert run.returncode == 0, run.stderr
    *others, evaluate = launches(ready)
    assert len(others) == 7
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
    assert all("dataset=toy llm=tiny_random" in call for call in launches(checkout))
    assert all("seed=3" in call for call in launches(checkout))


@pytest.mark.parametrize(
    ("script", "stage"),
    [("run_teacher_train", "teacher"), ("run_student_baseline", "student"), ("run_distill_dllm2rec", "distill")],
)
def test_each_command_launches_its_stage(ready: Checkout, script: str, stage: str) -> None:
    assert ready.run(f"cmd/{script}.sh", "dataset=toy", "note='two words'").returncode == 0
    assert stages(ready) == [stage]
    assert launches(ready)[0].endswith("dataset=toy note='two words'")


@pytest.mark.parametrize(("gpu", "setting", "precision"), [(False, "", "no"), (True, "", "bf16"), (True, "cpu", "no")])
def test_launch_configuration_fits_the_machine(ready: Checkout, gpu: bool, setting: str, precision: str) -> None:
    ready.gpu(gpu)
    run = ready.run("cmd/run_student_baseline.sh", ACCELERATE_CONFIG=setting)
    assert run.returncode == 0, run.stderr
    assert ready.calls("^precision") == [f"precision {precision}"]
    assert launches(ready) == ["python -m llm2rec.student"]  # in this very process


def test_several_processes_are_launched_by_accelerate(ready: Checkout) -> None:
    assert ready.run("cmd/run_student_baseline.sh", ACCELERATE_CONFIG="multi_gpu_zero2").returncode == 0
    (call,) = launches(ready)
    file = f"{ready.root}/accelerate_configs/multi_gpu_zero2.yaml"
    assert call == f"python {ready.root}/cmd/_launch.py --config_file {file} -m llm2rec.student"


def test_unknown_launch_configuration_is_named(ready: Checkout) -> None:
    run = ready.run("cmd/run_student_baseline.sh", ACCELERATE_CONFIG="tpu")
    assert run.returncode == 1
    assert "'tpu'" in run.stderr
    assert "single_a100" in run.stderr
    assert launches(ready) == []


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
