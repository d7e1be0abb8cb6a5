"""Two processes train and export what one does."""

import json

import numpy as np
import pytest
from command_helpers import (
    STUDENT,
    TEACHER,
    TORCHRUN,
    accelerate_on_cpu,
    adapter,
    checkpoint_step,
    close_histories,
    equal,
    history,
    outputs,
    run,
    run_until,
    runs,
    student,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow
N_ROWS = 424
CHECKPOINTS = ["teacher.training.checkpoint_every_steps=1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The chain in one process."""
    folder = tmp_path_factory.mktemp("one")
    for stage, overrides in (("teacher", TEACHER), ("student", STUDENT), ("distill", STUDENT)):
        run(folder, stage, *overrides)
    return folder, dict(zip(("teacher", "student", "distill"), runs(folder), strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The chain in two processes; each stage ran once and may have made one run folder."""
    folder = tmp_path_factory.mktemp("two")
    found = {}
    for stage, overrides in (("teacher", TEACHER), ("student", STUDENT), ("distill", STUDENT)):
        before = runs(folder)
        done = run(folder, stage, *overrides, launcher=TORCHRUN)
        (found[stage],) = set(runs(folder)) - set(before)
        assert done.stderr.count(f"{stage}: done") == 1, done.stderr
    return folder, found


@pytest.mark.parametrize("stage", ["teacher", "student", "distill"])
def test_losses_and_metrics_are_those_of_one_process(stage, one, two):
    assert close_histories(history(one[1][stage]), history(two[1][stage]), 1e-4)
    records = [json.loads((each[1][stage] / "run.json").read_text()) for each in (one, two)]
    assert records[0]["dataset"] == records[1]["dataset"]
    assert records[0]["parameters"] == records[1]["parameters"]


def test_weights_are_those_of_one_process(one, two):
    pairs = [(adapter(one[1]["teacher"]), adapter(two[1]["teacher"]))]
    pairs += [(student(one[1][stage]), student(two[1][stage])) for stage in ("student", "distill")]
    for first, second in pairs:
        assert first.keys() == second.keys()
        close = [np.isclose(first[name], second[name], rtol=1e-2, atol=2e-4).ravel() for name in first]
        # Not all: where the true gradient is 0, such as of a key's bias, Adam makes steps of rounding errors.
        assert np.concatenate(close).mean() > 0.995


def test_trained_teachers_export_the_same_rows(one, two):
    (ranking, confidence), (ranking_two, confidence_two) = outputs(one[0]), outputs(two[0])
    assert ranking.shape == ranking_two.shape == (N_ROWS, 20)
    np.testing.assert_allclose(confidence, confidence_two, rtol=1e-4, atol=1e-4)
    # A swap of two items that are this close is rounding.
    swapped = ranking != ranking_two
    gaps = np.diff(confidence, axis=1, append=np.inf)
    near = np.minimum(gaps, np.roll(gaps, 1, axis=1))
    assert swapped.mean() < 0.01
    assert (near[swapped] < 1e-4).all()


def test_the_untrained_teacher_exports_the_same_files(tmp_path):
    untrained = [*TEACHER, "teacher.training.epochs=0"]
    found = []
    for name, launcher in (("one", {}), ("two", {"launcher": TORCHRUN})):
        run(tmp_path / name, "teacher", *untrained, **launcher)
        assert len(runs(tmp_path / name)) == 1
        found.append(outputs(tmp_path / name))
        assert len(found[-1][0]) == N_ROWS
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_an_error_of_all_processes_is_reported_once(tmp_path):
    done = run(tmp_path, "teacher", *TEACHER, "teacher.adapter.r=6", launcher=TORCHRUN, check=False)
    assert done.returncode != 0
    assert done.stderr.count("use r=8") == 1


def test_a_killed_launch_goes_on_in_one_process(one, tmp_path):
    """Checkpoints hold whole tensors, so the number of processes may change."""
    options = [*TEACHER, *CHECKPOINTS, f"paths.llm_dir={one[0] / 'data' / 'llm'}"]
    run_until(tmp_path, "teacher", *options, reached=lambda: checkpoint_step(tmp_path) >= 5, launcher=TORCHRUN)
    (killed,) = runs(tmp_path)
    done = run(tmp_path, "teacher", *options, f"resume={killed.relative_to(tmp_path)}")
    assert "resuming at step_" in done.stderr
    assert runs(tmp_path) == [killed]
    assert close_histories(history(one[1]["teacher"]), history(killed), 1e-4)


# ---- DeepSpeed ZeRO-2 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    """`accelerate launch` with our multi-GPU configuration, for two processes without a GPU, in float32."""
    pytest.importorskip("deepspeed")
    return [*accelerate_on_cpu("multi_gpu_zero2", tmp_path_factory.mktemp("zero2")), "-m"]


def test_zero2_trains_as_one_process_and_resumes(zero2, one, tmp_path):
    options = [*TEACHER, *CHECKPOINTS]
    run(tmp_path / "whole", "teacher", *options, launcher=zero2)
    (whole,) = runs(tmp_path / "whole")
    assert close_histories(history(one[1]["teacher"]), history(whole), 1e-4)
    (_, confidence), (ranking, confidence_two) = outputs(one[0]), outputs(tmp_path / "whole")
    assert len(ranking) == N_ROWS
    np.testing.assert_allclose(confidence, confidence_two, rtol=1e-4, atol=1e-4)

    folder = tmp_path / "killed"
    folder.mkdir()
    run_until(folder, "teacher", *options, reached=lambda: checkpoint_step(folder) >= 5, launcher=zero2)
    (killed,) = runs(folder)
    done = run(folder, "teacher", *options, f"resume={killed.relative_to(folder)}", launcher=zero2)
    assert "resuming at step_" in done.stderr
    assert runs(folder) == [killed]
    assert history(killed) == history(whole)
    assert equal(adapter(killed), adapter(whole))
    assert np.array_equal(outputs(folder)[0], outputs(tmp_path / "whole")[0])


def test_adapters_that_no_pass_uses_are_refused_in_one_sentence(tmp_path):
    """DDP would wait for their gradients, and report a reduction that did not finish."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "bert")
    BertModel(BertConfig(vocab_size=4, **sizes)).save_pretrained(tmp_path / "bert")
    overrides = [each for each in TEACHER if not each.startswith("llm")]
    overrides += ["llm=minilm", f"llm.path={tmp_path / 'bert'}", "teacher.adapter.target_modules=all-linear"]
    done = run(tmp_path, "teacher", *overrides, launcher=TORCHRUN, check=False)
    assert done.returncode
    assert "uses the adapters of pooler.dense" in done.stderr
    assert "exclude_modules='pooler.*'" in done.stderr
    assert "finished reduction" not in done.stderr
