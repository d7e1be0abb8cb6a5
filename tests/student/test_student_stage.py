"""The student command, in this process: its outputs, and that it never reads the test split."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk
from engine_helpers import assert_same_weights
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from llm2rec.student.__main__ import main
from llm2rec.student.models import load_student

SMALL = [
    *("dataset.n_users=40", "dataset.n_items=60", "dataset.n_worlds=5", "student.model.width=16"),
    *("student.training.epochs=2", "student.training.batch_size=64", "logging.tensorboard=false"),
]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Run the command in ``tmp_path`` and restore the process state that Hydra changes."""
    root, cwd = logging.getLogger(), os.getcwd()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        before = set(runs(tmp_path))
        monkeypatch.setattr(sys, "argv", ["llm2rec.student", *SMALL, *overrides])
        main()
        (folder,) = [run for run in runs(tmp_path) if run not in before] or [None]
        return folder

    yield run
    GlobalHydra.instance().clear()
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    logging.getLogger("llm2rec").setLevel(logging.NOTSET)
    os.chdir(cwd)


def runs(folder):
    return sorted((folder / "result").glob("result_*"))


def test_training_never_reads_the_test_split(tmp_path, launch):
    """A run on the same data with other test targets gives the same weights and metrics."""
    first = launch("metrics.mask_seen=true")
    (prepared,) = (tmp_path / "data" / "processed").iterdir()
    table = load_from_disk(str(prepared / "test"))
    features = table.features
    wrong = table.map(lambda row: {"target": (row["target"] + 1) % 60, "history": [0]}, features=features)
    wrong.save_to_disk(str(tmp_path / "other"))
    for file in prepared.joinpath("test").iterdir():
        file.unlink()
    for file in (tmp_path / "other").iterdir():
        file.rename(prepared / "test" / file.name)
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest["files"]  # hashes, by which other targets would be refused
    (prepared / "manifest.json").write_text(json.dumps(manifest))

    second = launch("metrics.mask_seen=true")
    assert_same_weights(*(load_file(run / "student" / "model.safetensors") for run in (first, second)))
    ours, theirs = (json.loads((run / "metrics" / "validation.json").read_text()) for run in (first, second))
    assert ours == theirs
    assert {name.split("/")[0] for entry in ours["history"] for name in entry} == {"step", "train", "val"}
    assert not list(first.glob("metrics/test*"))


@pytest.mark.parametrize("name", ["gru4rec", "caser"])
def test_files_of_a_finished_run(launch, name):
    run = launch(f"student={name}")
    record = json.loads((run / "run.json").read_text())
    assert (record["stage"], record["status"], record["label"]) == ("student", "finished", name)
    model = load_student(run / "student")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert json.loads((run / "config.json").read_text())["student"]["model"]["width"] == 16
    assert {"data", "train"} <= json.loads((run / "metrics" / "time.json").read_text()).keys()
    assert not (run / "checkpoints").exists()
    assert len(record["dataset"]["fingerprint"]) == 64
    assert {file.suffix for file in run.rglob("*") if file.is_file()} <= {
        ".arrow",
        ".md",  # the model card
        ".json",
        ".safetensors",
        ".txt",
        ".yaml",
    }


@pytest.mark.parametrize(("option", "masked"), [(None, True), ("false", False)])
def test_every_result_says_whether_the_past_is_left_out(launch, option, masked):
    """On data whose users do not come back, the default is to leave it out."""
    run = launch(*([] if option is None else [f"metrics.mask_seen={option}"]))
    files = ("run.json", "metrics/validation.json", "student/config.json")
    assert [json.loads((run / file).read_text())["mask_seen"] for file in files] == [masked] * 3
    assert f"{'items seen before' if masked else 'no items'} excluded" in (run / "student" / "README.md").read_text()
    assert f"rankings {'leave out' if masked else 'keep'} the items of a user's past" in (run / "log.txt").read_text()


def test_the_default_validates_as_what_it_resolves_to(launch):
    default, forced, other = (launch(*each) for each in ([], ["metrics.mask_seen=true"], ["metrics.mask_seen=false"]))
    found = [
        json.loads((run / "metrics" / "validation.json").read_text())["history"] for run in (default, forced, other)
    ]
    assert found[0] == found[1] != found[2]


def test_resuming_with_other_settings_fails_before_training(launch, caplog):
    run = launch()
    weights = (run / "student" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        launch(f"resume={run}", "student.training.learning_rate=0.5")
    assert ended.value.code == 1
    assert r"student.training.learning_rate (was" in (run / "log.txt").read_text()
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == weights
    assert Path.cwd() == run.parent.parent  # Hydra has gone back


def test_a_student_learns_from_sequences(launch):
    run = launch("student.examples=sequences", "student.model.positions=oldest")
    model = load_student(run / "student")
    assert model.counts_from == "oldest"
    losses = [e["train/loss"] for e in json.loads((run / "metrics" / "validation.json").read_text())["history"]]
    assert losses[1] < losses[0]
