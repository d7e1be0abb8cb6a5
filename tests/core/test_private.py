"""Records of runs hold neither secrets nor the place of somebody's home."""

import json

import pytest

from llm2rec.core.errors import CheckpointError
from llm2rec.core.files import without_secrets
from llm2rec.core.run import Run


@pytest.fixture(autouse=True)
def _home(monkeypatch):
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
def test_what_is_masked(value, expected):
    assert without_secrets(value) == expected


def test_a_root_without_home_is_no_prefix(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert without_secrets("/data/x") == "/data/x"


def test_a_run_keeps_them_to_itself_and_can_be_resumed(tmp_path):
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
