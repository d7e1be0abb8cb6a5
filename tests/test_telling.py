"""What a process tells of an error that the first one may tell too."""

import logging
import time
from pathlib import Path

import pytest
import yaml

from llm2rec import telling

LINE = "ConfigError: `seed` is -1, expected 0 or more."
FORMATS = yaml.safe_load((Path(__file__).parents[1] / "conf" / "hydra" / "default.yaml").read_text())


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Writes to a log as a run's handler does, here with a time of writing."""
    monkeypatch.setattr(telling, "_SECONDS_FOR_FIRST_PROCESS", 0.3)
    log = tmp_path / "log.txt"
    form = logging.Formatter(FORMATS["hydra"]["job_logging"]["formatters"]["full"]["format"])

    def write(line, *, level=logging.ERROR, after=0.0):
        record = logging.LogRecord(telling.logger.name, level, "telling.py", 1, line, None, None)
        record.created = time.mktime(time.strptime(telling._BEGAN, "%Y-%m-%d %H:%M:%S")) + after
        with log.open("a") as file:
            file.write(form.format(record) + "\n")
        return log

    return write


def test_what_the_first_process_tells_the_others_do_not(told):
    told("student: result/result_20260101_000000", level=logging.INFO)
    assert telling._first_process_tells(LINE, told(LINE))


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("ConfigError: `seed` is -2, expected 0 or more.", {}),  # it tells something else
        (LINE, {"after": -60.0}),  # what an earlier launch told, of the run that is resumed
        (LINE, {"level": logging.DEBUG}),
    ],
)
def test_an_error_of_one_process_alone_is_told(line, options, told):
    assert not telling._first_process_tells(LINE, told(line, **options))


def test_an_error_before_there_is_a_log_is_told(tmp_path, told):
    assert not telling._first_process_tells(LINE, tmp_path / "log.txt")


def test_the_first_process_may_take_its_time(tmp_path, told, monkeypatch):
    monkeypatch.setattr(telling, "_SECONDS_FOR_FIRST_PROCESS", 60.0)
    monkeypatch.setattr(telling.time, "sleep", lambda seconds: told(LINE))
    assert telling._first_process_tells(LINE, tmp_path / "log.txt")
