import re

import pytest
import torch
from torch import nn

from llm2rec.core import host_memory, processes
from llm2rec.core.errors import ConfigError
from llm2rec.core.host_memory import available_bytes, check_host_memory
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.sharding import (
    complete_deepspeed_config,
    full_numel,
    shard,
    shards_frozen_weights,
    zero3_config,
)
from llm2rec.teacher.llm import check_launch

LAUNCHES = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.fixture
def launch(monkeypatch):
    def launch(name, **more):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for key, value in {**LAUNCHES[name], **more}.items():
            monkeypatch.setenv(key, value)

    return launch


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_sharding_quantised_weights_raises(name, precision, launch):
    check_launch(precision)  # no launch, nothing to refuse
    launch(name)
    with pytest.raises(ConfigError, match=f"{precision}.*precision=bfloat16.*multi_gpu_ddp"):
        check_launch(precision)
    check_launch("bfloat16")


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_process_does_not_shard(name, launch, monkeypatch):
    launch(name)
    assert shards_frozen_weights()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not shards_frozen_weights()


@pytest.mark.parametrize(("variable", "value"), [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true")])
def test_unsupported_fsdp_options_raise(variable, value, launch):
    launch("fsdp", **{variable: value})
    with pytest.raises(ConfigError, match=f"{variable.lower()}={value}.*multi_gpu_fsdp2"):
        shards_frozen_weights()


def test_missing_deepspeed_raises(launch, monkeypatch):
    launch("zero3")
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"DeepSpeed, which is not installed.*multi_gpu_ddp"):
        processes.process_arguments()


def test_model_without_block_names_raises():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"Linear does not name its blocks.*multi_gpu_ddp"):
        shard(model, model, (), torch.device("cpu"))


def test_accelerate_sees_plain_data_parallelism(launch):
    launch("zero3", ACCELERATE_USE_FSDP="true")
    with processes.launch_hidden():
        assert not processes.uses_deepspeed()
        assert not processes.uses_fsdp()
    assert processes.uses_zero3()
    assert processes.uses_fsdp()


def test_zero2_uses_deepspeed(launch):
    launch("zero3", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
    with processes.launch_hidden():
        assert processes.uses_deepspeed()
    assert not shards_frozen_weights()


def test_weights_are_loaded_on_the_device_of_the_launch(launch, monkeypatch):
    assert zero3_config(torch.bfloat16)["bf16"] == {"enabled": True}
    assert zero3_config(torch.float32)["zero_optimization"]["offload_param"]["device"] == "none"
    launch("zero3", ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu")
    assert zero3_config(torch.float32)["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_full_numel_of_a_sharded_parameter():
    parameter = nn.Parameter(torch.ones(3, 2))
    assert full_numel(parameter) == 6
    parameter.ds_numel = 12
    assert full_numel(parameter) == 12


def test_offload_without_enough_host_memory_raises(tmp_path, monkeypatch):
    assert available_bytes() > 0
    check_host_memory(1, "nothing", "")
    with pytest.raises(ConfigError, match=r"weights on the host needs 1000000000.0 GB, but only .*; buy more"):
        check_host_memory(10**18, "weights", "buy more")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   3 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == 3072
    for limit, expected in (("max", 3072), ("2000", 1500)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("500")
        assert available_bytes() == expected
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    complete_deepspeed_config(config, nn.Linear(9, 9), TrainingSettings(), 1)  # 1440 bytes
    with pytest.raises(ConfigError, match=re.escape("multi_gpu_zero2.yaml")):
        complete_deepspeed_config(config, nn.Linear(10, 10), TrainingSettings(), 1)
    (tmp_path / "meminfo").write_text("nothing\n")
    assert available_bytes() is None
