"""Two processes with half of every batch each train what one process trains with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("train_ilora.py")
ALONE = [sys.executable]
TWO = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]

# What one process computes, by adapter; and the ways of computing the same in two.
ADAPTERS = {"shared": {}, "per_layer": {"gate_per_layer": True}, "mlp": {"gate": "mlp"}}
WAYS = {
    "plain": {},
    "find_unused": {"find_unused": True},  # gates are computed outside the forward that DDP watches
    "accumulated": {"micro_batches": 2},
    "checkpointed": {"checkpointing": True},
}
CASES = {(adapter, way): {"adapter": ADAPTERS[adapter], **WAYS[way]} for adapter in ADAPTERS for way in WAYS}

pytestmark = pytest.mark.slow


def launch(launcher, folder, cases):
    """Run the script to its end; return the folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate would not look at DeepSpeed
    folder.mkdir(exist_ok=True)
    with open(folder / "log.txt", "w") as log:  # no pipe, which a grandchild that outlives its launcher keeps open
        command = [*launcher, str(SCRIPT), str(folder), json.dumps(cases)]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=300, check=False)
    assert done.returncode == 0, (folder / "log.txt").read_text()
    return folder


def trained(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(ALONE, tmp_path_factory.mktemp("alone"), {name: {"adapter": each} for name, each in ADAPTERS.items()})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = {f"{adapter}/{way}": case for (adapter, way), case in CASES.items()}
    return launch(TWO, tmp_path_factory.mktemp("two"), cases)


@pytest.mark.parametrize(("adapter", "way"), list(CASES))
def test_gradients_and_weights_are_those_of_one_process(alone, two, adapter, way):
    expected = load_file(alone / adapter / "gradients.safetensors")
    found = load_file(two / adapter / way / "gradients.safetensors")
    assert sum("ilora_gate" in name for name in found) == {"shared": 1, "per_layer": 14, "mlp": 4}[adapter]
    assert sum("ilora_A" in name for name in found) == sum("ilora_B" in name for name in found) == 14
    assert all(gradient.any() for gradient in expected.values())
    # float32, and sums over rows in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert_close_weights(trained(two / adapter / way), trained(alone / adapter))


@pytest.mark.parametrize("adapter", ["shared", "per_layer"])
def test_zero2_trains_what_one_process_trains(alone, adapter, tmp_path):
    pytest.importorskip("deepspeed")
    launch(TWO, tmp_path, {"zero2": {"adapter": ADAPTERS[adapter], "zero2": True}})
    assert_close_weights(trained(tmp_path / "zero2"), trained(alone / adapter))


def assert_close_weights(found, expected):
    # Weights moved by about 3 steps of 1e-2. A gradient that is off by 1e-8 moves Adam's step by 1e-8 / eps = 1e-3 of
    # its size at most, that is 3e-5 in all.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
