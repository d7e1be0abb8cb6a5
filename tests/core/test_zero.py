import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
import zero_program
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = TESTS / "core" / "zero_program.py"


def on_two_processes(name, folder, *stops):
    """Run the program with a launch configuration, without a GPU."""
    config = yaml.safe_load((TESTS.parent / "accelerate_configs" / f"{name}.yaml").read_text())
    config |= {"use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ACCELERATE_USE_CPU", None)
    launcher = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--config_file",
        str(folder / f"{name}.yaml"),
    ]
    done = subprocess.run(
        [*launcher, str(PROGRAM), str(folder), *map(str, stops)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "end.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_processes")
def test_zero2_frozen_groups_and_checkpoints_equal_one_process(tmp_path):
    """Under ZeRO-2 on the host: frozen groups keep their state, in training and in checkpoints of either launch."""
    pytest.importorskip("deepspeed")
    zero_program.main(tmp_path / "alone", [zero_program.N_STEPS])
    expected = load_file(tmp_path / "alone" / "end.safetensors")
    stopped = tmp_path / "stopped"
    zero_program.main(stopped, [2])  # while the projector has rested from the start, and has no state
    # What one process has begun two go on with, stop, and go on again.
    trained = on_two_processes("multi_gpu_zero2_offload", stopped, 3, zero_program.N_STEPS)
    assert trained.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-5, atol=1e-6)
