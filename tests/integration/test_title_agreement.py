"""Titles that belong to other items are reported before anything reads them."""

import random

import pytest
from command_helpers import TEACHER, run

QUICK = [each for each in TEACHER if not each.startswith("dataset")]


@pytest.mark.slow
def test_data_and_teacher_report_mixed_up_titles(tmp_path):
    generator = random.Random(0)
    rows = [f"u{user},i{generator.randrange(60) * 4 + user % 4},{time}" for user in range(250) for time in range(10)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    for name, kind in (("right", lambda item: item % 4), ("wrong", lambda item: generator.randrange(4))):
        titles = [
            f"i{item},{('Racing', 'Puzzle', 'Soccer', 'Sudoku')[kind(item)]} number {item}" for item in range(240)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["item_id,title", *titles]))
        tables = [f"dataset.interactions={tmp_path}/interactions.csv", f"dataset.items={tmp_path}/{name}.csv"]
        for stage, extra in (
            ("data", []),
            ("teacher", [*QUICK, "teacher.train_rows=20", "teacher.export.enabled=false"]),
        ):
            done = run(tmp_path, stage, "dataset=csv", *tables, *extra)
            assert ("do the titles belong to these item ids?" in done.stderr) == (name == "wrong"), done.stderr
