import json
import math
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import feather
from safetensors.torch import save_file

from llm2rec.core.errors import CheckpointError, StorageError
from llm2rec.core.files import (
    read_json,
    remove_leftovers,
    replaced_file,
    replaced_folder,
    sha256_of_file,
    without_secrets,
    write_json,
)
from llm2rec.core.paths import conf_folder, from_launch_folder, run_folder
from llm2rec.core.run import Run, discard


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with replaced_file(path) as aside:
            aside.write_text("new, in part")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_is_not_seen_before_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with replaced_file(path) as aside:
        aside.write_text("new")
        assert not path.exists()
        assert aside.parent == path.parent  # a rename works within one file system only
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def write_half():
        with replaced_folder(path) as aside:
            (aside / "new").touch()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_half()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole_and_open_to_the_group(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with replaced_folder(path) as aside:
            (aside / name).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert path.stat().st_mode == plain.stat().st_mode


def numpy_array(file):
    with open(file, "wb") as opened:
        np.save(opened, np.zeros(9000))


WRITERS = {
    "text": lambda file: file.write_text("x" * 9000),
    "safetensors": lambda file: save_file({"x": torch.zeros(9000)}, file),
    "torch": lambda file: torch.save(torch.zeros(9000), file),
    "numpy": numpy_array,
    "arrow": lambda file: feather.write_feather(pa.table({"x": range(9000)}), str(file), compression="uncompressed"),
}


@pytest.fixture
def little_room():
    """No file may grow beyond 5000 bytes: what a full disk does, to this process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_a_full_disk_raises_a_storage_error_and_keeps_what_was_there(tmp_path, little_room, writer, replaced):
    path = tmp_path / "it"
    with replaced(path) as aside:
        (aside if replaced is replaced_file else aside / "file").write_text("old")
    kept = path if replaced is replaced_file else path / "file"

    def write():
        with replaced(path) as aside:
            WRITERS[writer](aside if replaced is replaced_file else aside / "file")

    with pytest.raises(
        StorageError, match=rf"cannot write {re.escape(str(path))} \((File too large|the disk may be full)\)"
    ):
        write()
    assert kept.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def read_only():
    """A folder that holds a file and may not be written to, not even by a test that runs as root."""
    folder = Path(tempfile.mkdtemp())
    (folder / "kept").write_text("old")
    folder.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(was)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("write", [write_json, lambda path, _: replaced_folder(path).__enter__()])
@pytest.mark.parametrize("name", ["kept", "new", "deep/new"])
def test_a_folder_that_may_not_be_written_to_raises_a_storage_error(read_only, write, name):
    with pytest.raises(StorageError, match=r"cannot write .* \(Permission denied\); existing .* make the folder"):
        write(read_only / name, {})
    assert [(file.name, file.read_text()) for file in read_only.iterdir()] == [("kept", "old")]


def test_errors_of_another_kind_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(2, "No such file"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)) as raised, replaced_file(tmp_path / "a"):
            raise error
        assert raised.value is error


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Files, the folders that hold them, and the name itself: each flushed, in this order."""
    done, fsync, replace = [], os.fsync, os.replace

    def flushed(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[-1])
        fsync(handle)

    def named(source, target):
        done.append("named")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", named)
    home = tmp_path / "home"
    write_json(home / "a.json", {})
    assert done == ["partial", "named", "home"]
    done.clear()
    with replaced_folder(home / "b") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
    assert done == ["inner", "file", "partial", "named", "home"]


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path):
    for name in (
        ".a.json.7.partial",
        "deep/.best.7.partial",
        ".hydra/x.yaml",
        "a.partial",
        ".step_1.x.partial/w",
        ".b.7.old/w",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hydra/x.yaml", "a.partial"]


def test_json_takes_paths_and_scalars_and_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"path": Path("x/y"), "n": np.int64(3), "t": torch.tensor(0.5), "語": None})
    assert read_json(path) == {"path": "x/y", "n": 3, "t": 0.5, "語": None}
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"value": value})
    with pytest.raises(TypeError, match="cannot write set as JSON"):
        write_json(path, {1, 2})
    assert read_json(path)["n"] == 3


def test_hash_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert sha256_of_file(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = [run_folder("result", None, str(tmp_path)) for _ in range(2)]
    assert folders[0] != folders[1]
    for folder in folders:
        assert re.fullmatch(r"result_\d{8}_\d{6}", Path(folder).name)
        assert Path(folder).is_dir()
        assert Path(folder).parent == tmp_path / "result"


@pytest.mark.parametrize("resume", ["result/missing", "."])
def test_resuming_what_is_no_run_is_refused(tmp_path, resume):
    with pytest.raises(CheckpointError, match=rf"`resume` is '{re.escape(resume)}', which has no run.json"):
        run_folder("result", resume, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_resuming_finds_the_folder_from_where_it_was_typed(tmp_path):
    Run.start(tmp_path / "result" / "mine", "student", {})
    assert run_folder("elsewhere", "result/mine", str(tmp_path)) == str(tmp_path / "result" / "mine")


def test_a_run_killed_before_it_had_written_anything_begins_anew_in_its_folder(tmp_path):
    folder = tmp_path / "result" / "result_20260102_030405"
    folder.mkdir(parents=True)
    assert run_folder("result", "result/result_20260102_030405", str(tmp_path)) == str(folder)
    write_json(folder / "config.json", {"half": "way"})
    assert Run.start(folder, "student", CONFIG).record["status"] == "running"
    assert read_json(folder / "config.json") == CONFIG


def test_a_resumed_run_clears_what_its_killed_writers_left(tmp_path):
    Run.start(tmp_path, "student", CONFIG)
    (tmp_path / ".best.safetensors.77.partial").write_bytes(b"half")
    Run.start(tmp_path, "student", CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]


def test_a_run_may_be_resumed_with_smaller_micro_batches(tmp_path):
    for size in (8, 4):
        Run.start(tmp_path, "student", {**CONFIG, "student": {"training": {"epochs": 3, "micro_batch_size": size}}})


def test_paths_count_from_the_launch_folder(tmp_path):
    assert from_launch_folder("a/../b", tmp_path) == tmp_path.resolve() / "b"
    assert from_launch_folder("/abs/x", tmp_path) == Path("/abs/x")
    assert from_launch_folder("~/x", tmp_path) == Path.home().resolve() / "x"


def test_the_configuration_of_a_checkout_is_found():
    assert conf_folder() == Path(__file__).resolve().parents[2] / "conf"
    assert (conf_folder() / "config.yaml").is_file()


CONFIG = {
    "seed": 1,
    "resume": None,
    "student": {"training": {"epochs": 3}, "name": "sasrec"},
    "logging": {"progress": True},
}


def test_a_new_run_writes_what_it_is(tmp_path):
    run = Run.start(tmp_path / "run", "student", CONFIG)
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG
    record = run.record
    assert (record["stage"], record["status"], record["seed"]) == ("student", "running", 1)
    assert {"python", "torch"} <= record["versions"].keys()
    commit, dirty = record["git"]["commit"], record["git"]["dirty"]
    assert (commit is None and dirty is None) or re.fullmatch(r"[0-9a-f]{40}", commit)  # None in a copy without .git
    run.note(status="finished", label="x")
    assert run.record == {**record, "status": "finished", "label": "x"}


def test_the_same_configuration_may_be_resumed_and_the_record_is_kept(tmp_path):
    first = Run.start(tmp_path, "student", CONFIG)
    first.note(label="kept")
    again = {**CONFIG, "resume": "somewhere", "logging": {"progress": False}}
    assert Run.start(tmp_path, "student", again).record["label"] == "kept"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 2}, r"seed \(was 1, now 2\)"),
        ({"student": {"training": {"epochs": 4}, "name": "sasrec"}}, r"student\.training\.epochs \(was 3, now 4\)"),
        ({"student": {"training": {"epochs": 3}}}, r"student\.name \(was 'sasrec', now None\)"),
        ({"extra": 1}, r"extra \(was None, now 1\)"),
    ],
)
def test_a_resume_with_another_configuration_is_refused(tmp_path, changed, message):
    Run.start(tmp_path, "student", CONFIG)
    with pytest.raises(CheckpointError, match=rf"{message}.*Resume with the same overrides, or start a new run"):
        Run.start(tmp_path, "student", {**CONFIG, **changed})


def test_what_a_run_keeps_must_be_the_same_when_it_is_resumed(tmp_path):
    run = Run.start(tmp_path / "r", "distill", {"resume": None})
    run.keep(selection_source="abc", other=None)
    assert run.record["selection_source"] == "abc"
    again = Run.start(tmp_path / "r", "distill", {"resume": str(tmp_path / "r")})
    again.keep(selection_source="abc", other=None, new=1)
    for changed in ({"selection_source": "xyz"}, {"selection_source": None}, {"other": 1}):
        with pytest.raises(CheckpointError, match=f"r was started with another value of `{next(iter(changed))}` "):
            again.keep(**changed)
    assert again.record["selection_source"] == "abc"


def test_a_resume_by_another_stage_is_refused(tmp_path):
    Run.start(tmp_path / "mine", "student", CONFIG)
    with pytest.raises(
        CheckpointError, match=r"mine is a run of stage 'student', not of 'teacher'.*-m llm2rec.student"
    ):
        Run.start(tmp_path / "mine", "teacher", CONFIG)


def test_seconds_add_up_over_phases_and_errors(tmp_path):
    run = Run.start(tmp_path, "student", CONFIG)
    write_json(tmp_path / "metrics" / "time.json", {"train": 100.0})
    with pytest.raises(RuntimeError), run.phase("train"):
        raise RuntimeError
    with run.phase("other"):
        pass
    seconds = read_json(tmp_path / "metrics" / "time.json")
    assert 100 <= seconds["train"] < 101
    assert seconds["other"] < 1


# Secrets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ann_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/runs/x", "~/runs/x"),
        ("/home/ann", "~"),
        ("a: /home/ann/x\nb: '/home/ann'", "a: ~/x\nb: '~'"),
        ("/home/anna/x", "/home/anna/x"),
        ("/mnt/home/ann/x", "/mnt/home/ann/x"),
        ("hf_ABCDEFGHIJKLMNOP", "***"),
        ("with hf_ABCDEFGHIJKLMNOP.", "with ***."),
        ("https://ann:pass@example.org/a", "https://***@example.org/a"),
        ("https://example.org/a:b@c", "https://example.org/a:b@c"),
        ("hf_dataset", "hf_dataset"),
        (
            {"hf_token": "anything", "max_tokens": 5, "n": [1, "/home/ann"]},
            {"hf_token": "***", "max_tokens": 5, "n": [1, "~"]},
        ),
        ({"separator_token": ""}, {"separator_token": ""}),
        (None, None),
    ],
)
@pytest.mark.usefixtures("ann_at_home")
def test_secrets_and_the_home_folder_are_masked(value, expected):
    assert without_secrets(value) == expected


def test_a_root_without_home_is_no_prefix(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert without_secrets("/data/x") == "/data/x"


@pytest.mark.usefixtures("ann_at_home")
def test_records_of_a_run_hold_no_secrets_and_it_can_be_resumed(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("- dataset.url=https://ann:pass@host/ml.zip\n- a=/home/ann/b\n")
    config = {"seed": 1, "paths": {"root": "/home/ann/project"}, "dataset": {"url": "https://ann:pass@host/ml.zip"}}
    Run.start(tmp_path, "student", config)
    written = {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert written.keys() == {"config.json", "run.json", "overrides.yaml"}
    assert not [name for name, text in written.items() if "ann" in text]
    assert written["overrides.yaml"] == "- dataset.url=https://***@host/ml.zip\n- a=~/b\n"
    assert json.loads(written["config.json"])["paths"]["root"] == "~/project"
    Run.start(tmp_path, "student", config)
    with pytest.raises(CheckpointError, match=r"dataset\.url"):
        Run.start(tmp_path, "student", {**config, "dataset": {"url": "https://other/ml.zip"}})


def test_a_run_that_ended_early_says_so_until_it_is_resumed(tmp_path):
    run = Run.start(tmp_path, "student", CONFIG)
    run.stop("failed", error="ConfigError: no")
    assert (run.record["status"], run.record["error"]) == ("failed", "ConfigError: no")
    run.stop("interrupted", **{"continue": "command"})  # of the launcher, after one process has failed
    assert run.record["status"] == "failed"
    again = Run.start(tmp_path, "student", CONFIG).record
    assert again["status"] == "running"
    assert "error" not in again
    run.note(status="finished")
    run.stop("failed", error="late")
    assert run.record["status"] == Run.start(tmp_path, "student", CONFIG).record["status"] == "finished"


@pytest.mark.parametrize(("made", "stays"), [("", False), ("tensorboard/events", False), ("checkpoints/x", True)])
def test_only_a_run_that_made_nothing_is_removed(tmp_path, made, stays):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError), Run.start(folder, "student", CONFIG).phase("data"):
        raise RuntimeError
    for name in (".hydra/config.yaml", "log.txt", *([made] if made else [])):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    discard(folder)
    assert (folder / "run.json").is_file() == folder.exists() == stays


def test_a_run_may_be_resumed_for_fewer_epochs_and_is_marked(tmp_path):
    Run.start(tmp_path, "student", CONFIG)
    assert "ended_early" not in Run.start(tmp_path, "student", {**CONFIG, "finish": True}).record
    fewer = {**CONFIG, "student": {"training": {"epochs": 2}, "name": "sasrec"}}
    assert Run.start(tmp_path, "student", fewer).record["ended_early"] is True
