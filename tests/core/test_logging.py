"""What is told of a phase while it runs: a bar on a terminal, a line now and then in a file."""

import io
import logging
import sys

import pytest
from engine_helpers import time_goes_by

from llm2rec.core.logging import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_with_rate_and_time_left_every_half_minute(monkeypatch, caplog):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    for _ in progress(range(20), "student", 40, "step", initial=20):
        clock.wait(10)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "student: 23 of 40 steps, 0.1 a second, 170 s left"
    assert len(lines) == 6


def test_a_short_phase_tells_nothing_in_a_file(monkeypatch, caplog):
    clock = time_goes_by(monkeypatch, "llm2rec.core.logging")
    caplog.set_level(logging.INFO)
    for _ in progress(range(20), "student", 20, "step"):
        clock.wait(1)
    assert not caplog.records


def test_log_lines_stand_above_the_bar_of_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    root, handler = logging.getLogger(), logging.StreamHandler(terminal)
    monkeypatch.setattr(root, "handlers", [handler])
    for number in progress(range(3), "student", 3, "step"):
        logging.getLogger("llm2rec").warning("step %d is done", number)
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
