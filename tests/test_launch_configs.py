"""The launch configurations, as Accelerate's launcher reads them and as our processes then see them."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from llm2rec.core.processes import uses_deepspeed
from llm2rec.core.train.sharding import shards_frozen_weights

FOLDER = Path(__file__).resolve().parents[1] / "accelerate_configs"
ONE, EIGHT, TWO_MACHINES = (1, 1), (1, 8), (2, 16)  # machines, processes
EXPECTED = {  # and DeepSpeed's stage, whether frozen weights are sharded, the number format
    "cpu": (ONE, None, False, "no"),
    "cpu_2proc": ((1, 2), None, False, "no"),
    "single_a100": (ONE, None, False, "bf16"),
    "multi_gpu_ddp": (EIGHT, None, False, "bf16"),
    "multi_gpu_zero2": (EIGHT, "2", False, "bf16"),
    "multi_gpu_zero2_offload": (EIGHT, "2", False, "bf16"),
    "multi_gpu_zero3": (EIGHT, "3", True, "bf16"),
    "multi_gpu_fsdp2": (EIGHT, None, True, "bf16"),
    "multi_node_zero2": (TWO_MACHINES, "2", False, "bf16"),
}


def launched(name):
    """The launcher's arguments, and the environment that it gives its processes."""
    file = str(FOLDER / f"{name}.yaml")
    args, config, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, "-m", "llm2rec.teacher", "seed=1"])
    )
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as the launcher does
        return args, prepare_deepspeed_cmd_env(args)[1]
    if args.num_processes > 1:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


def test_every_launch_configuration_is_expected_and_says_for_whom_it_is():
    assert {file.stem for file in FOLDER.iterdir()} == EXPECTED.keys()
    for file in FOLDER.iterdir():
        assert file.read_text().startswith("# For "), file


@pytest.mark.parametrize("name", EXPECTED)
def test_our_processes_see_what_a_launch_configuration_asks_for(name, monkeypatch):
    args, environment = launched(name)
    (n_machines, n_processes), stage, divides, precision = EXPECTED[name]
    assert (args.num_machines, args.num_processes) == (n_machines, n_processes)
    assert args.use_cpu == name.startswith("cpu")
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(n_processes))  # which torchrun sets
    variables = {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert variables["ACCELERATE_MIXED_PRECISION"] == precision
    assert variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == stage
    assert uses_deepspeed() == (stage is not None)
    assert shards_frozen_weights() == divides
    offloaded = variables.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
    assert offloaded == (None if stage is None else "cpu" if name == "multi_gpu_zero2_offload" else "none")
