"""Changed and damaged files are detected when they are read."""

import json

import pytest

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import check_hashes, read_json, read_object, sha256_of_file, write_hashes, write_json
from llm2rec.core.run import read_record


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.bin").write_bytes(b"abc")
    (tmp_path / "place.json").write_text("{}")
    write_hashes(tmp_path, editable=("place.json",))
    return tmp_path


def test_what_was_written_passes_and_what_may_be_edited_too(folder):
    check_hashes(folder)
    (folder / "place.json").write_text("elsewhere")
    (folder / "more.txt").write_text("beside")
    check_hashes(folder)


def test_a_changed_file_and_a_missing_one_are_named(folder):
    (folder / "part" / "a.bin").write_bytes(b"abd")
    with pytest.raises(DataError, match=r"part/a\.bin has changed since it was written"):
        check_hashes(folder)
    (folder / "part" / "a.bin").unlink()
    with pytest.raises(DataError, match=r"lacks part/a\.bin"):
        check_hashes(folder)


def test_hashing_shows_its_progress(folder, progress_lines):
    (folder / "part" / "a.bin").write_bytes(bytes(3 * 2**20))
    sha256_of_file(folder / "part" / "a.bin")
    assert progress_lines()["hash a.bin"].startswith("3 of 3 MiB, ")


def test_a_folder_of_an_earlier_version_has_no_hashes(tmp_path):
    check_hashes(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "[" * 100_000, b"\xff"])
def test_what_is_not_json_is_named(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"a\.json is not JSON"):
        read_json(file)


def test_missing_file_other_kind_and_missing_key_are_named(tmp_path):
    with pytest.raises(DataError, match=r"b\.json cannot be read"):
        read_json(tmp_path / "b.json")
    write_json(tmp_path / "c.json", [1])
    with pytest.raises(DataError, match=r"c\.json contains a list, expected an object"):
        read_object(tmp_path / "c.json")
    write_json(tmp_path / "d.json", {"a": 1})
    assert read_object(tmp_path / "d.json", "a") == {"a": 1}
    with pytest.raises(DataError, match=r"d\.json lacks 'b'"):
        read_object(tmp_path / "d.json", "a", "b")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"stage": "student"}, "lacks 'status'"),
        (
            {"stage": "student", "status": "finished", "dataset": "toy"},
            "is 'toy', expected a name and a fingerprint",
        ),
        ({"stage": "student", "status": "finished", "dataset": {"name": "toy"}}, "expected a name and a fingerprint"),
        ([], "contains a list"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path, record, message):
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"run\.json .*{message}"):
        read_record(tmp_path, "dataset")
