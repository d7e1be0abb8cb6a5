"""Sizes computed by hand, memory by launch, disk space and rejected settings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.plan.memory import (
    BUCKET_ELEMENTS,
    CONTEXT_BYTES,
    LIVE_ELEMENTS,
    Memory,
    disk_bytes,
    largest_rows,
    memory_at_rest,
    quantisation_bytes,
    student_sizes,
)
from llm2rec.plan.models import PlannedTeacher, Sizes, TeacherShape, config_of_shape, model_config
from llm2rec.plan.settings import LAUNCHES, PlanSettings, check_plan
from llm2rec.plan.workload import Workload, rows_per_micro_batch
from llm2rec.student.settings import LossSettings, SASRecStudent
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, ShapeSettings, TeacherSettings

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
D, INNER, LAYERS, VOCABULARY, N_ITEMS = 64, 128, 2, 100, 30
PER_LAYER = 4 * D * D + 3 * D * INNER  # q, k, v, o; gate, up, down


def planned(precision, **settings):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    teacher = TeacherSettings(adapter=AdapterSettings(r=8, num_experts=4), **settings)
    return PlannedTeacher(TeacherShape(config, teacher, precision, "last", N_ITEMS, 10, 16)).sizes


def test_weights_by_hand():
    norms = (2 * LAYERS + 1) * D
    whole = VOCABULARY * D + norms
    adapter = LAYERS * 8 * (4 * (D + D) + 3 * (D + INNER))
    sizes = planned("bfloat16")
    assert sizes.frozen_parameters == LAYERS * PER_LAYER + whole
    assert sizes.multiplied_parameters == sizes.frozen_parameters - VOCABULARY * D
    assert sizes.frozen_bytes == {"quantised": 0, "constants": 0, "whole": 2 * (LAYERS * PER_LAYER + whole)}
    assert sizes.trained_parameters == adapter + 4 * D  # the gate
    assert sizes.item_bytes == 4 * (N_ITEMS * D + N_ITEMS)
    assert sum(planned("float32").frozen_bytes.values()) == 4 * sizes.frozen_parameters
    rows = LAYERS * (4 * D + 2 * INNER + D)
    assert planned("int8").frozen_bytes == {"quantised": LAYERS * PER_LAYER, "constants": 4 * rows, "whole": 2 * whole}
    assert planned("int4").frozen_bytes == {
        "quantised": LAYERS * PER_LAYER // 2,
        "constants": 4 * LAYERS * PER_LAYER // 64,
        "whole": 2 * whole,
    }
    # The title objective has a language-model head, which is never packed, and keeps titles on the host.
    title = planned("int8", objective="title")
    assert title.frozen_bytes["whole"] == 2 * (whole + VOCABULARY * D)
    assert title.item_bytes == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_are_those_that_bitsandbytes_makes(precision, tmp_path):
    pytest.importorskip("bitsandbytes")
    from llm2rec.teacher.llm import load_model

    config = AutoConfig.for_model(
        "llama", hidden_size=D, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = LLMSettings(name="tiny", path=str(tmp_path))
    model = load_model(str(tmp_path), settings, precision, torch.device("cpu"), writes=True)
    real = sum(each.nbytes for each in model.parameters())
    for module in model.modules():
        if precision == "int8" and type(module).__name__ == "Linear8bitLt":
            real += (module.state.SCB if module.weight.SCB is None else module.weight.SCB).nbytes
        if precision == "int4" and type(module).__name__ == "Linear4bit":
            real += 4 * module.weight.quant_state.absmax.numel()  # a CPU that was evaluated on may hold them in 16 bits
    shape = TeacherShape(config, TeacherSettings(objective="title"), precision, "last", N_ITEMS, 10, 16, on_cpu=True)
    assert sum(PlannedTeacher(shape).sizes.frozen_bytes.values()) == real


SIZES = Sizes(
    1_000_000, 900_000, {"quantised": 0, "constants": 0, "whole": 2_000_000}, 1000, 500, (0, 0), 1_600_000, 100_000
)


def at_rest(launch, gpus=4, sizes=SIZES, wide=False, on_cpu=False):
    return memory_at_rest(sizes, launch, gpus, 80e9, wide=wide, on_cpu=on_cpu).parts


def test_memory_by_launch():
    common = {"weights": 2_000_000, "items": 500, "context": CONTEXT_BYTES}
    whole = common | {"trained": 4000, "gradients": 4000, "optimizer": 8000}
    assert at_rest("ddp", gpus=1) == whole | {"buckets": 0}
    assert at_rest("ddp") == whole | {"buckets": 4000}
    zero = {"trained": 2000, "buckets": 2 * BUCKET_ELEMENTS}
    assert at_rest("zero2") == common | zero | {"gradients": 1000, "optimizer": 3000}
    assert at_rest("zero2_offload") == common | zero | {"gradients": 0, "optimizer": 0}
    # Frozen weights: a quarter of all, and as many as there are put together; a quarter of blocks, and two of them.
    assert at_rest("zero3") == whole | {"buckets": 4000, "weights": 500_000, "gathered": 2_000_000}
    assert at_rest("fsdp2") == whole | {"buckets": 4000, "weights": 400_000 + 400_000, "gathered": 200_000}
    assert at_rest("zero3", gpus=1) == at_rest("fsdp2", gpus=1) == at_rest("ddp", gpus=1)
    large = replace(SIZES, frozen_bytes={"whole": 2 * 10**11})
    assert at_rest("zero3", sizes=large)["gathered"] == 2 * LIVE_ELEMENTS
    assert at_rest("zero2", wide=True)["trained"] == 4000
    assert at_rest("ddp", on_cpu=True)["context"] == 0


def test_fsdp2_shards_blocks():
    sizes = planned("bfloat16")
    assert sizes.block_bytes == LAYERS * sizes.largest_block_bytes
    assert sizes.frozen_bytes["whole"] - sizes.block_bytes == 2 * (VOCABULARY * D + D)  # embeddings and the last norm


def test_workspace_of_quantised_products():
    sizes = Sizes(0, 0, {}, 0, 0, (20, 10), 0, 0)
    assert quantisation_bytes(sizes, "bfloat16", 1000, on_cpu=False) == 0
    assert quantisation_bytes(sizes, "int4", 1000, on_cpu=False) == 2 * 20 * 10
    assert quantisation_bytes(sizes, "int8", 1, on_cpu=True) == 4 * 20 * 10
    assert quantisation_bytes(sizes, "int8", 1000, on_cpu=True) == 1000 * (3 * 10 + 4 * 20)


@pytest.mark.parametrize(
    ("room", "expected"), [(5, 0), (10, 1), (45, 4), (49, 4), (79, 5), (94, 6), (95, 6), (1000, 8)]
)
def test_the_largest_micro_batch_fits_and_one_more_does_not(room, expected):
    def peak(rows):
        return max(10 * rows, 15 * rows if rows > 4 else 0)  # another part of the step takes over at 5 rows

    found = largest_rows(peak, room, 8)
    assert found == expected
    assert found == 0 or peak(found) <= room


def test_memory_fits_up_to_capacity():
    memory = Memory({"a": 60, "b": 39}, 100)
    assert memory.fits
    assert memory.with_activations(1).fits
    assert not memory.with_activations(2).fits


def test_disk_space_of_outputs_is_that_of_written_files(tmp_path):
    """Rankings and confidences of the form that `write_outputs` gives them."""
    rows, k, n_items, width = 400, 20, 900, 16
    generator = np.random.default_rng(0)
    np.savetxt(tmp_path / "ranking.txt", generator.integers(n_items, size=(rows, k)), fmt="%d")
    scores = -np.log(generator.dirichlet(np.ones(n_items), size=rows)[:, :k]).astype(np.float32)
    np.savetxt(tmp_path / "confidence.txt", scores, fmt="%.9g")
    real = sum(file.stat().st_size for file in tmp_path.iterdir())
    work = Workload(n_items, rows, rows, 0, 10, 1.0, 1, 1.0, 1, 1.0, 1, 77)
    disk = disk_bytes(SIZES, work, width=width, gate_width=8, top_k=k, zero=False)
    assert disk["outputs"] - 16 * rows * k == pytest.approx(real, rel=0.05)
    assert disk["title_vectors"] == 2 * 4 * n_items * width
    assert disk["checkpoints"] == 32 * SIZES.trained_parameters
    assert (disk["gate_inputs"], disk["prepared_data"]) == (4 * 8 * rows, 77)
    without = disk_bytes(SIZES, work, width=width, gate_width=0, top_k=0, zero=True)
    assert without["outputs"] == without["gate_inputs"] == 0
    assert without["checkpoints"] == 40 * SIZES.trained_parameters


def test_a_student_with_a_rowwise_table_holds_less():
    def held(loss, item_optimizer="rowwise", **training):
        settings = SASRecStudent(
            loss=LossSettings(loss), item_optimizer=item_optimizer, training=TrainingSettings(**training)
        )
        return student_sizes(settings, N_ITEMS)

    table, rows = 64 * (N_ITEMS + 1), N_ITEMS + 1
    parameters, whole = held("cross_entropy", "adamw")
    rest = parameters - table
    assert whole == 16 * parameters
    assert held("cross_entropy")[1] == 16 * rest + (4 + 4) * table + 8 * rows
    assert held("sampled_softmax")[1] == 16 * rest + 4 * table + 8 * rows
    assert held("sampled_softmax", max_grad_norm=1.0) == held("cross_entropy")


@pytest.mark.parametrize(
    "values",
    [
        {"card": "v100"},
        {"utilisation": 0.0},
        {"utilisation": 1.5},
        {"launch": "1"},
        {"n_items": 0},
        {"characters_per_token": 0.0},
    ],
)
def test_invalid_values_are_rejected(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"plan.{name}"):
        PlanSettings(**values)


@pytest.mark.parametrize(
    ("settings", "gpus", "precision", "message"),
    [
        (PlanSettings(), 0, "bfloat16", "gpus is 0"),
        (PlanSettings(launch="zero3"), 8, "int8", "plan.launch=ddp"),
        (PlanSettings(launch="fsdp2"), 8, "int4", "teacher.precision=bfloat16"),
        (PlanSettings(card="cpu"), 2, "float32", "plan.card is 'cpu'"),
        (PlanSettings(card="cpu", launch="zero2"), 1, "float32", "plan.launch 'zero2'"),
    ],
)
def test_combinations_that_cannot_be_launched_are_rejected(settings, gpus, precision, message):
    with pytest.raises(ConfigError, match=message):
        check_plan(settings, gpus, precision)


def test_every_launch_has_a_configuration():
    assert check_plan(PlanSettings(), 1, "int8") == "ddp"
    assert check_plan(PlanSettings(), 8, "int8") == "zero2"
    assert check_plan(PlanSettings(launch="fsdp2"), 8, "bfloat16") == "fsdp2"
    assert all((CONFIGS / f"multi_gpu_{launch}.yaml").is_file() for launch in LAUNCHES)


@pytest.mark.parametrize(("gpus", "rows"), [(1, 32), (2, 32), (4, 32), (8, 16), (64, 2), (200, 1)])
def test_rows_of_a_gpu(gpus, rows):
    training = TeacherSettings().training
    training.batch_size, training.micro_batch_size = 128, 32
    assert rows_per_micro_batch(training, gpus) == rows


def test_a_model_that_cannot_be_read_needs_a_shape(tmp_path):
    llm = LLMSettings(name="far", path=str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"llm.shape"):
        model_config(llm, tmp_path, tmp_path, [])
    llm.shape = ShapeSettings("llama", 64, 128, 2, 4, None, None, 100, 512)
    config, source, used = model_config(llm, tmp_path, tmp_path, [])
    assert (config.hidden_size, config.num_key_value_heads, source) == (64, 4, None)
    assert "`llm.shape`" in used
    AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "absent")
    config, source, used = model_config(llm, tmp_path, tmp_path, [])
    assert (config.hidden_size, source) == (32, str(tmp_path / "absent"))
    assert "its own configuration" in used


def test_an_incomplete_or_unknown_shape_is_rejected():
    with pytest.raises(ConfigError, match="lacks intermediate_size, num_hidden_layers"):
        config_of_shape(ShapeSettings("llama", 64))
    with pytest.raises(ConfigError, match="model_type is 'lama'"):
        config_of_shape(ShapeSettings("lama", 64, 128, 2, 4, None, None, 100, 512))
