"""Whether rankings leave out the items of a user's past: counted on training and validation targets."""

import json

import numpy as np
import pytest
from data_files import csv_pair

from llm2rec.data import CsvTables, Toy, format_statistics, load, masks_seen, prepare
from llm2rec.data.masking import RETURNING, repeat_share, repeated_targets


def visits(rng, chance, times):
    """Visits of 40 users, who come back to an item with some chance; times of their own, or common ones."""
    rows = []
    for user in range(40):
        seen = [int(rng.integers(9))]
        while len(seen) < 9:
            fresh = [item for item in range(30) if item not in seen]
            seen.append(int(rng.choice(seen if rng.random() < chance else fresh)))
        moments = range(9) if times == "positions" else np.sort(rng.choice(10**6, 9, replace=False))
        rows += [f"u{user},i{item},{moment}" for item, moment in zip(seen, moments, strict=True)]
    return rows


def counted(data):
    """Repeated targets and all targets of training and validation, row by row."""
    repeated = total = 0
    for name in ("train", "validation"):
        for row in data.splits[name]:
            past = data.sequences[row["user_index"]]["items"][: row["position"]]
            repeated, total = repeated + (row["target"] in past), total + 1
    return repeated, total


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
@pytest.mark.parametrize("chance", [0.0, 0.3])
def test_repeated_targets_are_counted_row_by_row(tmp_path, split, chance):
    rows = visits(np.random.default_rng(1), chance, "positions" if split == "leave_one_out" else "times")
    files = csv_pair(tmp_path, rows, [f"i{item},Title {item}" for item in range(30)])
    data = prepare(CsvTables(**files, split=split, history_length=3), tmp_path / "processed")
    repeated, total = counted(data)
    assert data.statistics["repeated_targets"] == repeated
    assert repeat_share(data.statistics) == pytest.approx(repeated / total)
    assert (repeated > RETURNING * total) == (chance > 0)
    assert masks_seen(data, None) == (chance == 0)
    assert (masks_seen(data, True), masks_seen(data, False)) == (True, False)
    (line,) = (line for line in format_statistics(data.statistics).splitlines() if "seen before" in line)
    assert f"{repeated / total:.1%}" in line
    assert ("leave out" in line) == (chance == 0)


def test_the_test_split_decides_nothing(tmp_path):
    """Every user comes back with the last visit, which is the target of the test split."""
    rows = [f"u{user},i{item},{time}" for user in range(20) for time, item in enumerate((0, 1, 2, 3, 4, 0))]
    data = prepare(
        CsvTables(**csv_pair(tmp_path, rows, [f"i{item},Title {item}" for item in range(5)])), tmp_path / "processed"
    )
    assert data.statistics["repeated_targets"] == 0


def test_data_prepared_earlier_is_counted_when_it_is_used(tmp_path):
    rows = visits(np.random.default_rng(2), 0.3, "positions")
    files = csv_pair(tmp_path, rows, [f"i{item},Title {item}" for item in range(30)])
    data = prepare(CsvTables(**files), tmp_path / "processed")
    expected = data.statistics["repeated_targets"]
    file = data.folder / "statistics.json"
    file.write_text(json.dumps({k: v for k, v in data.statistics.items() if k != "repeated_targets"}))
    again = load(data.folder)
    assert "repeated_targets" not in again.statistics
    assert repeated_targets(again) == expected > 0
    assert not masks_seen(again, None)


def test_users_of_the_toy_data_do_not_come_back(tmp_path):
    data = prepare(Toy(n_users=40, n_items=60, n_worlds=5), tmp_path)
    assert data.statistics["repeated_targets"] == 0
    assert masks_seen(data, None)
