import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import read_json, replaced_file, replaced_folder, sha256_of_file, write_json
from llm2rec.core.paths import conf_folder, from_launch_folder, run_folder
from llm2rec.core.run import Run


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
    with pytest.raises(CheckpointError, match=rf"`resume` is '{re.escape(resume)}', which holds no run.json"):
        run_folder("result", resume, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_resuming_finds_the_folder_from_where_it_was_typed(tmp_path):
    Run.start(tmp_path / "result" / "mine", "student", {})
    assert run_folder("elsewhere", "result/mine", str(tmp_path)) == str(tmp_path / "result" / "mine")


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
