"""Stages run as a user runs them: commands in a folder of their own, on a tiny toy."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TOY = ["dataset.n_users=60", "dataset.n_items=60", "dataset.n_worlds=5"]
# No dropout, so that runs may be compared; sizes that do not divide: 424 rows, 36 a step, the last step has 28.
OF_ILORA = [
    "teacher.adapter.dropout=0",
    # What is about a whole step, or a part of the parameters, has to survive any division of the work.
    "teacher.balance_loss=0.5",
    "teacher.gate_learning_rate_ratio=3",
]
TEACHER = [
    *TOY,
    *OF_ILORA,
    "teacher.training.epochs=2",
    "teacher.training.batch_size=36",
    "teacher.training.micro_batch_size=7",
    "teacher.export.block_rows=50",
    "llm.width=32",
]
STUDENT = [*TOY, "student.training.epochs=3", "student.training.batch_size=37", "student.model.dropout=0"]

PLAIN = [sys.executable, "-m"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m"]


def environment() -> dict[str, str]:
    """What every command gets: this checkout, no network, one thread a process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HYDRA_", "PYTEST_"))}
    inherited.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate would not look at DeepSpeed
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def accelerate_on_cpu(name: str, folder: Path, **changes: Any) -> list[str]:
    """A command that launches with ``accelerate_configs/<name>.yaml`` two processes without a GPU, in float32.

    Args:
        name: Name of the launch configuration.
        folder: Where the changed copy is written.
        **changes: What else of it is changed.
    """
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no", **changes}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return [str(BIN / "accelerate"), "launch", "--config_file", str(file)]


def run(folder: Path, stage: str, *overrides: str, launcher: list[str] = PLAIN, check: bool = True, **variables: str):
    """Run a stage to its end; returns the finished process, output as text.

    One process in the usual environment is forked from a server that has imported everything (`forked_stages`).

    Args:
        folder: Working directory.
        stage: Name of the stage.
        *overrides: Its command line.
        launcher: What comes before the stage.
        check: Whether it must succeed.
        **variables: Added to its environment.
    """
    if launcher is PLAIN and not variables:
        import forked_stages  # imports this module

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            out, err = Path(aside) / "stdout.txt", Path(aside) / "stderr.txt"
            status, _ = forked_stages.run(folder, stage, overrides, err, out)
            done = subprocess.CompletedProcess([stage, *overrides], status, out.read_text(), err.read_text())
        assert status == 0 or not check, done.stderr
        return done
    return run_command(folder, [*launcher, f"llm2rec.{stage}", *overrides], check=check, **variables)


def run_command(folder: Path, command: list[str], *, check: bool = True, **variables: str):
    """Run a command in a folder to its end, ``variables`` in its environment; the finished process, output as text."""
    folder.mkdir(parents=True, exist_ok=True)
    # Files, not pipes: a grandchild that outlives a launcher would keep a pipe open.
    with open(folder / "stdout.txt", "w") as out, open(folder / "stderr.txt", "w") as err:
        done = subprocess.run(command, cwd=folder, env=environment() | variables, stdout=out, stderr=err, timeout=400)
    done.stdout, done.stderr = (folder / "stdout.txt").read_text(), (folder / "stderr.txt").read_text()
    if check:
        assert done.returncode == 0, done.stderr
    return done


def run_until(
    folder: Path,
    stage: str,
    *overrides: str,
    reached: Callable[[], bool],
    launcher: list[str] = PLAIN,
    sent: signal.Signals = signal.SIGKILL,
    **variables: str,
) -> int:
    """Run a stage until ``reached`` says so, then send a signal; returns the exit status.

    ``variables`` are in its environment. SIGKILL goes to all its processes, any other signal to the first alone, as a
    cluster or a container sends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "killed.txt", "w") as log:
        process = subprocess.Popen(
            [*launcher, f"llm2rec.{stage}", *overrides],
            cwd=folder,
            env=environment() | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        limit = time.monotonic() + 300
        while process.poll() is None and not reached() and time.monotonic() < limit:
            time.sleep(0.005)
        assert process.poll() is None, f"ended before it could be killed: {(folder / 'killed.txt').read_text()}"
        if sent == signal.SIGKILL:
            os.kill(process.pid, signal.SIGSTOP)  # it gets no further while the others are looked for
        for pid in _family(process.pid) if sent == signal.SIGKILL else [process.pid]:
            with contextlib.suppress(ProcessLookupError):  # a launcher may end on its own once its workers are gone
                os.kill(pid, sent)
        return process.wait(timeout=120)


def _family(process: int) -> list[int]:
    """A process and all that it has started: torchrun gives each worker a session of its own."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = {int(pid): int(parent) for pid, parent in zip(listed[::2], listed[1::2], strict=True)}
    family = [process]
    for member in family:  # grows while it is read
        family += [pid for pid, parent in parents.items() if parent == member]
    return family


def runs(folder: Path) -> list[Path]:
    """Run folders, oldest first."""
    return sorted((folder / "result").glob("result_*"))


def checkpoint_step(folder: Path) -> int:
    """Step of the newest checkpoint of the newest run, 0 without one."""
    steps = [int(path.name.split("_")[1]) for each in runs(folder)[-1:] for path in each.glob("checkpoints/step_*")]
    return max(steps, default=0)


def history(run_folder: Path) -> list[dict[str, float]]:
    """Losses and validation metrics, evaluation by evaluation."""
    return json.loads((run_folder / "metrics" / "validation.json").read_text())["history"]


def close_histories(first: list[dict[str, float]], second: list[dict[str, float]], tolerance: float) -> bool:
    """Whether two histories have the same entries up to rounding."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)
    return True


def weights(file: Path) -> dict[str, np.ndarray]:
    return load_file(file)


def adapter(run_folder: Path) -> dict[str, np.ndarray]:
    return weights(run_folder / "teacher" / "adapter" / "adapter_model.safetensors")


def student(run_folder: Path) -> dict[str, np.ndarray]:
    return weights(run_folder / "student" / "model.safetensors")


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two sets of weights are the same bit by bit."""
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def outputs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Exported rankings and confidences."""
    return outputs_of(folder, "ilora")


def outputs_of(folder: Path, teacher: str) -> tuple[np.ndarray, np.ndarray]:
    """Rankings and confidences that the teacher of a name has exported."""
    found = folder / "data" / "teacher_outputs" / "toy" / f"{teacher}-tiny_random"
    return np.load(found / "myrank_train.npy"), np.load(found / "confidence_train.npy")
