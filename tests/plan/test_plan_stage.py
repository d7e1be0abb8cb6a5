"""The plan stage: hours, advice and output."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from llm2rec.config import register
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.plan.models import PlannedTeacher, TeacherShape, config_of_shape
from llm2rec.plan.planner import Job, plan
from llm2rec.plan.settings import CARDS, PlanSettings
from llm2rec.plan.table import format_bytes, format_plan, format_seconds
from llm2rec.plan.workload import EstimatedPrompts, workload_of
from llm2rec.stage import build
from llm2rec.student.settings import LossSettings, SASRecStudent
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, PromptSettings, TeacherSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from command_helpers import TOY, run, runs

CONF = Path(__file__).resolve().parents[2] / "conf"
# Parameters that the models' cards and files give, without a head of its own where it is tied to the embeddings.
PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "minilm": 22_713_216,
}


def composed(*overrides):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["paths.root=/somewhere", *overrides])


def shape_of(llm, **settings):
    config = config_of_shape(build(composed(f"llm={llm}").llm, LLMSettings).shape)
    teacher = TeacherSettings(tuning="none", objective="item" if llm == "minilm" else "title", **settings)
    return TeacherShape(config, teacher, "bfloat16", "last", 10, 10, 16)


def test_every_llm_on_the_hub_says_its_shape():
    named = {file.stem for file in (CONF / "llm").glob("*.yaml")}
    assert named - {"tiny_random"} == PARAMETERS.keys()
    for name in PARAMETERS:
        assert "shape" in yaml.safe_load((CONF / "llm" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("llm", PARAMETERS)
def test_shapes_have_the_parameters_of_the_models(llm):
    assert PlannedTeacher(shape_of(llm)).sizes.frozen_parameters == PARAMETERS[llm]


def job(llm="llama2_7b", card="a100_80gb", gpus=1, launch="ddp", precision="bfloat16", plan_settings=None, **settings):
    given = plan_settings or PlanSettings(n_items=1000, n_rows=50_000, prompt_tokens=200)
    defaults = {"training": TrainingSettings(5, 128, 32), "adapter": AdapterSettings(target_modules=["q_proj"])}
    teacher = TeacherSettings(**defaults | settings)
    config = config_of_shape(build(composed(f"llm={llm}").llm, LLMSettings).shape)
    work = workload_of(given, teacher, None, None)
    shape = TeacherShape(config, teacher, precision, "last", work.n_items, work.history_length, 64)
    student = SASRecStudent(training=TrainingSettings(100, 512, 512))
    return Job(shape, student, work, CARDS[card], 0.4, gpus, launch)


def test_hours_by_hand():
    planned = plan(job("llama2_7b"))
    weights = planned["sizes"]["frozen_parameters"] - 32000 * 4096  # the embedding table is looked up
    rate = 0.4 * 312e12
    assert planned["tokens_per_second"] == pytest.approx(rate / (4 * weights))
    epochs, rows, tokens = 5, 50_000, 200
    assert planned["seconds"]["training"] == pytest.approx(epochs * rows * tokens * 4 * weights / rate)
    assert planned["seconds"]["gate_inputs"] == pytest.approx(rows * tokens * 2 * weights / rate)
    assert planned["seconds"]["export"] == pytest.approx(rows * (tokens * 2 * weights + 2 * 1000 * 4096) / rate)
    recomputing = plan(job("llama2_7b", gradient_checkpointing=True))
    assert recomputing["seconds"]["training"] == pytest.approx(1.5 * planned["seconds"]["training"])


def test_advised_changes_make_it_fit():
    planned = plan(job("llama2_7b", card="rtx_4090"))
    assert not planned["fits"]
    (advice,) = planned["advice"]
    rows = int(re.search(r"micro_batch_size=(\d+)$", advice.rstrip("."))[1])
    assert "gradient_checkpointing=true or" in advice
    assert planned["memory"]["with_checkpointing"]["fits"]
    assert plan(job("llama2_7b", card="rtx_4090", training=TrainingSettings(5, 128, rows)))["fits"]


def test_a_model_that_no_micro_batch_makes_fit_gets_advice():
    planned = plan(job("llama2_70b", card="rtx_4090"))
    assert not planned["fits"]
    assert any("plan.launch=fsdp2" in each for each in planned["advice"])


def test_a_catalogue_that_no_card_holds_gets_advice():
    given = PlanSettings(n_items=100_000_000, n_rows=1_000_000_000, prompt_tokens=100)
    planned = plan(job("smollm2_360m", card="l40s", plan_settings=given))
    assert not planned["fits"]
    assert not planned["student"]["memory"]["fits"]
    assert any("100,000,000 titles" in each for each in planned["advice"])
    assert any(
        "student.item_optimizer=rowwise with student.loss.name=sampled_softmax" in each for each in planned["advice"]
    )
    assert planned["disk_bytes"]["gate_inputs"] == 4 * 960 * 1_000_000_000
    remedied = replace(
        job("smollm2_360m", card="l40s", plan_settings=given),
        student=SASRecStudent(item_optimizer="rowwise", loss=LossSettings("sampled_softmax")),
    )
    assert plan(remedied)["student"]["memory"]["fits"]


def test_many_gpus_share_rows_and_weights():
    one, eight = (plan(job("smollm2_360m", gpus=gpus, launch=launch)) for gpus, launch in ((1, "ddp"), (8, "zero3")))
    assert (one["rows_per_micro_batch"], eight["rows_per_micro_batch"]) == (32, 16)
    assert one["seconds"]["training"] / 8 == pytest.approx(eight["seconds"]["training"])
    whole, sharded = (each["memory"]["with_checkpointing"]["parts"] for each in (one, eight))
    assert whole["weights"] == pytest.approx(8 * sharded["weights"], abs=8)
    for part in ("trained", "gradients", "optimizer", "items"):
        assert sharded[part] == whole[part]
    # With sharded weights all GPUs read the same prompts, which takes as long as on one.
    assert eight["seconds"]["export"] == pytest.approx(one["seconds"]["export"])
    assert plan(job("smollm2_360m", gpus=8, launch="zero2"))["seconds"]["export"] == pytest.approx(
        one["seconds"]["export"] / 8
    )
    text = format_plan(eight, "A heading", ["an assumption"])
    assert "ZeRO-3" in text
    assert "an assumption" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("  -"))


def test_estimated_prompts_show_what_fits():
    """Nine characters a title and one a separator are three tokens and one, at three characters a token."""
    settings = PromptSettings(max_tokens=13, max_items=4)
    prompts = EstimatedPrompts(["t" * 9] * 20, settings, "game", 3.0)
    history = np.zeros((4, 6), np.int32)
    lengths = np.array([1, 2, 3, 6], np.int32)
    np.testing.assert_array_equal(prompts.token_counts(history, lengths), [5, 9, 13, 13])
    np.testing.assert_array_equal(prompts.title_token_counts(), [4] * 20)
    wide = EstimatedPrompts(["t" * 9] * 20, PromptSettings(max_tokens=200), "game", 3.0)
    candidates, targets = np.zeros((4, 5), np.int64), np.zeros(4, np.int64)
    listed = wide.question_token_counts(history, lengths, candidates, targets)
    unlisted = wide.question_token_counts(history, lengths, None, targets)
    texts = len("The next game is one of these:")
    np.testing.assert_array_equal(listed - unlisted, [5 * 4 + -(-texts // 3)] * 4)


@pytest.mark.parametrize(
    ("llm", "expected"),
    [
        (["llm=tiny_random", "plan.card=cpu"], "by its tokenizer"),
        (["llm=llama2_7b", "teacher.precision=int8", "gpus=1"], "6,607,343,616 frozen"),
    ],
)
@pytest.mark.slow
def test_the_stage_plans_without_a_network(tmp_path, llm, expected):
    done = run(tmp_path, "plan", *TOY, *llm)
    assert expected in done.stderr
    (folder,) = runs(tmp_path)
    planned = json.loads((folder / "metrics" / "plan.json").read_text())
    assert planned["fits"]
    memory = planned["memory"]["without_checkpointing"]
    assert memory["total"] == sum(memory["parts"].values())
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_an_invalid_combination_is_one_line(tmp_path):
    done = run(tmp_path, "plan", "gpus=8", "plan.launch=zero3", "teacher.precision=int8", check=False)
    assert done.returncode == 1
    assert "use plan.launch=ddp" in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_and_seconds_have_units():
    assert [format_bytes(size) for size in (5, 2048, 3 * 2**30, 5000 * 2**40)] == [
        "5 B",
        "2.0 KiB",
        "3.0 GiB",
        "5,000.0 TiB",
    ]
    assert [format_seconds(each) for each in (5, 600, 36000, 864000, 315576000)] == [
        "5.0 s",
        "10.0 min",
        "10.0 h",
        "10.0 days",
        "10.0 years",
    ]
