"""A teacher whose language model is sharded among processes learns, exports, resumes and scores as one process does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_helpers import (
    OF_ILORA,
    STUDENT,
    TORCHRUN,
    TOY,
    adapter,
    checkpoint_step,
    close_histories,
    equal,
    history,
    outputs_of,
    run,
    run_command,
    run_until,
    runs,
)

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).with_name("stages_in_turn.py"))
# The environment of Accelerate's launcher, which without a GPU starts two processes for DeepSpeed only.
LAUNCHES = {
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
COMMON = [
    *TOY,
    *OF_ILORA,
    "llm.width=128",  # else DeepSpeed keeps all weights whole, being small
    "teacher.training.epochs=1",
    "teacher.training.batch_size=80",
    "teacher.training.micro_batch_size=23",
    "teacher.train_rows=150",
    "teacher.validation_rows=21",
    "teacher.gradient_checkpointing=true",
    "active=random",
    "active.budget=0.1",
    "teacher.export.block_rows=20",
]
ITEM = ["teacher.head=projected"]
TITLE = [
    "teacher=ilora_paper",
    "llm.prompt.max_tokens=512",
    "teacher.export.top_k=4",
    "teacher.training.learning_rate=3e-3",
]


def skip_without_deepspeed(launch):
    if launch == "zero3":
        pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    run(folder, "student", *STUDENT)
    return runs(folder)[0]


def taught(folder, launcher, student, **variables):
    """Train both teachers, and score them, in one launch; returns ``folder``."""
    title = [*TITLE, f"teacher.recommender_run={student}"]
    teachers = (("item", ITEM), ("title", title))
    asked = ["runs=[" + ",".join(str(folder / name / "run") for name, _ in teachers) + "]", "metrics.ks=[1,4]"]
    jobs = [
        [str(folder / name), stage, [*own, f"hydra.run.dir={folder / name / 'run'}"]]
        for name, stage, own in (
            *((name, "teacher", [*COMMON, *own]) for name, own in teachers),
            ("scores", "evaluate", [*TOY, *asked]),
        )
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_command(folder, [*launcher, PROGRAM, str(folder / "jobs.json")], **variables)
    return folder


@pytest.fixture(scope="module")
def one(student, tmp_path_factory):
    return taught(tmp_path_factory.mktemp("one"), [sys.executable], student)


@pytest.fixture(scope="module", params=LAUNCHES)
def sharded(request, student, tmp_path_factory):
    skip_without_deepspeed(request.param)
    return taught(tmp_path_factory.mktemp(request.param), TORCHRUN[:-1], student, **LAUNCHES[request.param])


@pytest.mark.parametrize(("case", "teacher"), [("item", "ilora"), ("title", "ilora_paper")])
def test_a_sharded_teacher_is_the_one_that_one_process_trains(case, teacher, one, sharded):
    whole, parts = (json.loads((folder / case / "held.json").read_text()) for folder in (one, sharded))
    assert max(parts) < 0.7 * min(whole), "each process holds about half"
    norms, norms_two = (json.loads((folder / case / "norms.json").read_text()) for folder in (one, sharded))
    assert len(norms) == 2
    np.testing.assert_allclose(norms_two, norms, rtol=1e-4)
    assert close_histories(history(one / case / "run"), history(sharded / case / "run"), 1e-4)
    assert adapter(one / case / "run").keys() == adapter(sharded / case / "run").keys()
    (items, confidence), (items_two, confidence_two) = (outputs_of(each / case, teacher) for each in (one, sharded))
    assert len(items) == 42
    assert np.array_equal(items, items_two)
    np.testing.assert_allclose(confidence_two, confidence, rtol=1e-4, atol=1e-4)
    records = [json.loads((folder / case / "run" / "run.json").read_text()) for folder in (one, sharded)]
    assert records[0]["parameters"] == records[1]["parameters"]


def test_a_sharded_teacher_is_scored_as_one_process_scores_it(one, sharded):
    scores, scores_two = (
        json.loads((folder / "scores" / "run" / "comparison.json").read_text())["rows_scored"]
        for folder in (one, sharded)
    )
    assert len(scores) == 3  # popularity among them
    for ours, theirs in zip(scores, scores_two, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["metrics"] == theirs["metrics"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_sharded_teacher_that_was_killed_goes_on_to_the_same_end(launch, tmp_path):
    skip_without_deepspeed(launch)
    overrides = [*COMMON, *ITEM, "teacher.training.checkpoint_every_steps=1", "teacher.training.epochs=4"]
    how = {"launcher": TORCHRUN, **LAUNCHES[launch]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, "teacher", *overrides, **how)
    run_until(killed, "teacher", *overrides, reached=lambda: checkpoint_step(killed) >= 3, **how)
    (folder,) = runs(killed)
    run(killed, "teacher", *overrides, f"resume={folder.relative_to(killed)}", **how)
    (expected,), (found,) = runs(whole), runs(killed)
    assert history(found) == history(expected)
    assert equal(adapter(found), adapter(expected))
    for ours, theirs in zip(outputs_of(killed, "ilora"), outputs_of(whole, "ilora"), strict=True):
        assert np.array_equal(ours, theirs)
