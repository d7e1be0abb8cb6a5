"""Progress of a phase: a bar on a terminal, a line every half minute in a file."""

import io
import logging
import sys

import pytest
from engine_helpers import time_goes_by

from llm2rec.core.logging import Progress, duration, progress, progress_shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("at_most", "left"), [(False, "2:50 min left"), (True, "at most 2:50 min left")])
def test_a_file_gets_a_line_with_rate_and_time_left_every_half_minute(monkeypatch, caplog, at_most, left):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    for _ in progress(range(20), "student", 40, "step", initial=20, at_most=at_most):
        clock.wait(10)
    lines = [record.message for record in caplog.records]
    assert lines[0] == f"student: 23 of 40 steps, 10 s/step, {left}"
    assert len(lines) == 6


def test_rows_are_shown_with_rows_and_tokens_per_second(monkeypatch, caplog):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    with Progress("export", 1000, "row") as progress_of_export:
        for _ in range(4):
            clock.wait(10)
            progress_of_export.advance(100, tokens=2000)
    assert [record.message for record in caplog.records] == [
        "export: 300 of 1000 rows, 10 rows/s, 200 tokens/s, 1:10 min left"
    ]


def test_bytes_are_shown_in_mib(monkeypatch, caplog):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    with Progress("hash model.safetensors", 2**32, "byte") as bar:
        clock.wait(32)
        bar.advance(2**30)
    assert [record.message for record in caplog.records] == [
        "hash model.safetensors: 1024 of 4096 MiB, 32 MiB/s, 1:36 min left"
    ]


def test_a_run_may_switch_progress_off(progress_lines):
    for shown in (False, True):
        with progress_shown(shown):
            list(progress(range(2), f"phase {shown}", 2, "step"))
    assert list(progress_lines()) == ["phase True"]


def test_a_short_phase_logs_nothing_in_a_file(monkeypatch, caplog):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    for _ in progress(range(20), "student", 20, "step"):
        clock.wait(1)
    assert not caplog.records


def test_log_lines_stand_above_the_bar_of_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("llm2rec.core.logging._SECONDS_BEFORE_BAR", 0.0)
    root, handler = logging.getLogger(), logging.StreamHandler(terminal)
    monkeypatch.setattr(root, "handlers", [handler])
    for number in progress(range(3), "student", 3, "step", at_most=True):
        logging.getLogger("llm2rec").warning("step %d is done", number)
    assert "at most" in terminal.getvalue()
    shown = terminal.getvalue()
    assert "student:" in shown
    for number in range(3):
        before = shown.split(f"step {number} is done\n")[0]
        # The bar, if it had been drawn, was wiped out before: nothing else is on the line.
        assert before.rpartition("\n")[2].rpartition("\r")[2].strip() == ""
    assert handler.stream is terminal


@pytest.mark.parametrize("shown", [True, False])
def test_all_items_come_in_order(shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(iter("abc"), "student", 3, "step", shown=shown)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.7, "9 s"), (750, "12:30 min"), (3599.4, "59:59 min"), (3599.6, "1:00 h"), (11100, "3:05 h")],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text
