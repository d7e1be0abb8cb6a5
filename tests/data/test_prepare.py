"""Filters, splits, examples, and the prepared folder."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_files import csv_pair, movielens_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.data import (
    CsvTables,
    MovieLens100K,
    RawData,
    RecData,
    Toy,
    doubts,
    format_statistics,
    load,
    prepare,
    tie_doubt,
)
from llm2rec.data.filtering import check_titles
from llm2rec.data.spec import DatasetSpec


@dataclasses.dataclass
class InMemory(DatasetSpec):
    """Interactions given as a list of (user, item, time), with a title for every item."""

    name: str = "memory"
    rows: list = dataclasses.field(default_factory=list)

    def raw_files(self):
        return []

    def read(self):
        frame = pd.DataFrame(self.rows, columns=["user_id", "item_id", "timestamp"])
        frame = frame.astype({"user_id": "str", "item_id": "str", "timestamp": "int64"})
        ids = pd.Series(sorted(set(frame.item_id)), dtype="str")
        return RawData(frame, pd.DataFrame({"item_id": ids, "title": "Title of " + ids}))


def sequences_of(data: RecData):
    return {row["user_id"]: row["items"] for row in data.sequences}


def rows(data: RecData, split: str):
    return data.splits[split].to_list()


def test_leave_one_out_by_hand(tmp_path):
    visits = [("a", "x", 3), ("b", "z", 1), ("a", "y", 1), ("a", "z", 2), ("a", "w", 9), ("b", "x", 2), ("b", "y", 3)]
    data = prepare(InMemory(rows=visits, history_length=2), tmp_path)
    w, x, y, z = range(4)
    assert data.items["raw_id"][:] == ["w", "x", "y", "z"]
    assert sequences_of(data) == {"a": [y, z, x, w], "b": [z, x, y]}
    assert rows(data, "train") == [
        {"example_id": 0, "user_id": "a", "user_index": 0, "position": 1, "history": [y], "target": z, "timestamp": 2}
    ]
    assert [(r["example_id"], r["history"], r["target"]) for r in rows(data, "validation")] == [
        (1, [y, z], x),
        (2, [z], x),
    ]
    assert [(r["example_id"], r["history"], r["target"]) for r in rows(data, "test")] == [
        (3, [z, x], w),
        (4, [z, x], y),
    ]
    assert data.statistics["items_unseen_in_train"] == 2
    assert data.statistics["cold_targets"] == {"validation": 2, "test": 1}


def test_global_time_by_hand(tmp_path):
    visits = [(user, f"i{(k + t) % 6}", 10 * t + k) for k, user in enumerate("abc") for t in range(6)]
    visits += [("new", f"i{t}", 50 + t) for t in range(3)]
    spec = InMemory(rows=visits, split="global_time", validation_fraction=0.2, test_fraction=0.2)
    data = prepare(spec, tmp_path)
    times = sorted(time for _, _, time in visits)
    validation_cut, test_cut = times[-8], times[-4]
    removed = data.statistics["removed"]
    assert (removed["validation_cut"], removed["test_cut"], removed["users_new_after_cut"]) == (
        validation_cut,
        test_cut,
        1,
    )
    assert max(r["timestamp"] for r in rows(data, "train")) < validation_cut
    assert {r["timestamp"] for r in rows(data, "validation")} <= set(range(validation_cut, test_cut))
    assert min(r["timestamp"] for r in rows(data, "test")) >= test_cut
    # All but each user's first interaction are targets of exactly one split.
    assert sum(map(len, data.splits.values())) == len(visits) - 4


def test_global_time_without_differing_times_is_refused(tmp_path):
    visits = [(user, item, 5) for user in "ab" for item in "xyz"]
    with pytest.raises(DataError, match=r"no example for train and validation .* timestamps that differ"):
        prepare(InMemory(rows=visits, split="global_time"), tmp_path)


POSITIONS = [(user, f"i{(k + t) % 6}", t) for k, user in enumerate("abc") for t in range(6 - k)]


@pytest.mark.parametrize("start", [0, 1, -(2**62)])
def test_global_time_on_positions_is_refused(tmp_path, start):
    visits = [(user, item, start + time) for user, item, time in POSITIONS]
    message = rf"times that can be compared between users, .* \({start} to {start + 5}\).*timestamp_column"
    for more in ({}, {"k_core": 2}):
        with pytest.raises(DataError, match=message):
            prepare(InMemory(rows=visits, split="global_time", **more), tmp_path)
    prepare(InMemory(rows=visits), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda user, time: time + (user == "b"),  # who came later
        lambda user, time: time * 2,
        lambda user, time: time // 2,
        lambda user, time: time + (user == "a" and time == 5),
    ],
)
def test_global_time_takes_few_times_that_are_no_positions(tmp_path, change):
    visits = [(user, item, change(user, time)) for user, item, time in POSITIONS]
    prepare(InMemory(rows=visits, split="global_time", validation_fraction=0.2, test_fraction=0.2), tmp_path)


def test_equal_times_keep_the_order_of_the_source(tmp_path):
    data = prepare(InMemory(rows=[("a", item, 7) for item in "dbca"]), tmp_path)
    assert sequences_of(data) == {"a": [3, 1, 2, 0]}


TIED = [(user, item, 7 + (item == "e")) for user in ("ann", "bob", "cy", "dan") for item in "dbcae"]


def test_equal_times_ascend_by_item_id(tmp_path):
    data = prepare(InMemory(rows=TIED, ties="item"), tmp_path)
    assert list(sequences_of(data).values()) == [[0, 1, 2, 3, 4]] * 4
    assert data.manifest["settings"]["ties"] == "item"


def test_equal_times_are_shuffled_whatever_the_order_of_the_file(tmp_path):
    shuffled = [sequences_of(prepare(InMemory(rows=TIED, ties="shuffle", ties_seed=n), tmp_path)) for n in range(3)]
    again = sequences_of(prepare(InMemory(rows=sorted(TIED), ties="shuffle"), tmp_path))
    assert again == shuffled[0]
    orders = {tuple(each) for seed in shuffled for each in seed.values()}
    assert len(orders) > 6  # of 24, drawn 12 times: neither one order for all users nor one for all seeds
    assert all(sorted(each[:4]) == [0, 1, 2, 3] and each[4] == 4 for each in orders)


def test_the_default_order_of_ties_leaves_the_settings_as_they_were(tmp_path):
    assert InMemory().settings().keys().isdisjoint({"ties", "ties_seed"})
    fingerprints = [prepare(InMemory(rows=TIED, ties=ties), tmp_path).fingerprint for ties in ("source", "item")]
    assert fingerprints[0] != fingerprints[1]


def test_many_tied_targets_are_reported(tmp_path):
    tied = [(user, item, 7 - (item == "d")) for user, item, _ in TIED if item != "e"]
    data = prepare(InMemory(rows=[*tied, *(("eve", item, time) for time, item in enumerate("abcd"))]), tmp_path)
    assert tie_doubt(data).startswith("80% of the users have their validation and test items at the same time: the or")
    assert tie_doubt(prepare(InMemory(rows=TIED), tmp_path)) is None
    assert "item ids decide" in tie_doubt(prepare(InMemory(rows=tied, ties="item"), tmp_path))
    timed = [(user, item, 2 * time) for user, item, time in POSITIONS]
    spec = InMemory(rows=timed, split="global_time", validation_fraction=0.2, test_fraction=0.2)
    assert tie_doubt(prepare(spec, tmp_path)) is None


def test_duplicates_are_dropped_and_counted(tmp_path):
    visits = [("a", item, t) for t, item in enumerate("wxyz")]
    data = prepare(InMemory(rows=[*visits, visits[1], visits[1], ("a", "x", 9)]), tmp_path)
    assert data.statistics["interactions"] == 5  # the same item at another time stays
    assert data.statistics["removed"]["duplicate_rows"] == 2
    assert "duplicate rows" in format_statistics(data.statistics)


def test_short_users_are_counted_and_left_out(tmp_path):
    visits = [("a", item, t) for t, item in enumerate("wxyz")]
    data = prepare(InMemory(rows=[*visits, ("b", "w", 1), ("b", "only", 2)]), tmp_path)
    assert set(data.sequences["user_id"]) == {"a"}
    assert data.n_items == 4
    removed = data.statistics["removed"]
    assert (removed["users_too_short"], removed["rows_of_short_users"]) == (1, 2)
    with pytest.raises(DataError, match=r"no interaction is left of 2 \(2 of users with fewer than 3 interactions\)"):
        prepare(InMemory(rows=[("b", "w", 1), ("b", "x", 2)]), tmp_path)


def test_users_of_three_alone_leave_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"no example for train .* at least 4 interactions"):
        prepare(InMemory(rows=[("a", item, t) for t, item in enumerate("xyz")]), tmp_path)


def test_rating_threshold_keeps_what_is_rated_enough(tmp_path):
    spec = MovieLens100K(raw_dir=str(movielens_folder(tmp_path / "raw")), min_rating=2)
    data = prepare(spec, tmp_path)
    assert data.statistics["removed"]["rows_below_min_rating"] == 4
    assert data.statistics["interactions"] == 16
    with pytest.raises(ConfigError, match=r"`dataset\.min_rating` is set but .* no ratings.*rating_column"):
        prepare(CsvTables(**csv_pair(tmp_path), min_rating=2), tmp_path)


def test_duplicate_item_id_is_refused():
    raw = InMemory(rows=[("a", item, t) for t, item in enumerate("wxyz")]).read()
    doubled = RawData(raw.interactions, pd.concat([raw.items, raw.items.tail(1)], ignore_index=True))
    with pytest.raises(DataError, match="item id 'z' occurs more than once"):
        check_titles(doubled.items, InMemory())


def test_raw_ids_and_titles_are_kept(tmp_path):
    rows_ = [f"{user},{item},{t}" for user in ("007", "7") for t, item in enumerate(("01", "1", "ü", "d"))]
    data = prepare(CsvTables(**csv_pair(tmp_path, rows_, ["1,a", "ü,日本", "d,d", "01,b"])), tmp_path / "processed")
    assert data.items["raw_id"][:] == ["1", "ü", "d", "01"]
    assert data.titles == ["a", "日本", "d", "b"]
    assert data.sequences["user_id"][:] == ["007", "7"]


interactions = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 12)), min_size=8, max_size=60
).map(lambda triples: [(f"u{u}", f"i{i}", t) for u, i, t in triples])


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(visits=interactions, length=st.integers(1, 4), k_core=st.integers(0, 3))
def test_examples_never_see_their_future(tmp_path_factory, split, visits, length, k_core):
    spec = InMemory(rows=visits, history_length=length, k_core=k_core, split=split)
    spec.validation_fraction = spec.test_fraction = 0.25
    try:
        data = prepare(spec, tmp_path_factory.mktemp("processed"))
    except DataError as error:
        if not re.search("no interaction is left|no example for", str(error)):
            raise
        return
    sequences = data.sequences.to_list()
    next_id = 0
    targets = set()
    for name in ("train", "validation", "test"):
        for row in rows(data, name):
            items, times = (sequences[row["user_index"]][key] for key in ("items", "timestamps"))
            position = row["position"]
            assert row["example_id"] == next_id
            assert (row["target"], row["timestamp"]) == (items[position], times[position])
            assert row["history"] == items[max(0, position - length) : position]
            assert 1 <= len(row["history"]) <= length
            assert row["user_id"] == sequences[row["user_index"]]["user_id"]
            targets.add((row["user_index"], position, name))
            next_id += 1
    # Every position but the first is the target of one split, and training positions come before the others.
    assert len({(user, position) for user, position, _ in targets}) == len(targets)
    lengths = [len(sequence["items"]) for sequence in sequences]
    assert len(targets) == sum(lengths) - len(lengths)
    for user, length_ in enumerate(lengths):
        names = [dict(((u, p), n) for u, p, n in targets)[user, position] for position in range(1, length_)]
        assert names == sorted(names, key=["train", "validation", "test"].index)
        if split == "leave_one_out":
            assert names == ["train"] * (length_ - 3) + ["validation", "test"]
        assert sequences[user]["timestamps"] == sorted(sequences[user]["timestamps"])
    if split == "global_time":
        held_out = [row["timestamp"] for name in ("validation", "test") for row in rows(data, name)]
        assert max(row["timestamp"] for row in rows(data, "train")) < min(held_out)
    if k_core:
        assert min(lengths) >= k_core
        assert min(Counter(item for sequence in sequences for item in sequence["items"]).values()) >= k_core
    removed = data.statistics["removed"]
    lost = ("rows_without_title", "duplicate_rows", "rows_below_k_core", "rows_of_short_users")
    assert len(visits) == sum(lengths) + sum(removed[key] for key in lost)
    data.verify()


def test_prepared_data_is_found_again_by_content(tmp_path):
    paths = csv_pair(tmp_path / "raw")
    first = prepare(CsvTables(**paths), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "raw"] == [first.folder.name]
    written = first.folder.stat().st_mtime_ns
    started = time.perf_counter()
    again = prepare(CsvTables(**paths, num_proc=2), tmp_path)
    assert time.perf_counter() - started < 1
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert first.folder.stat().st_mtime_ns == written
    moved = prepare(CsvTables(**csv_pair(tmp_path / "elsewhere")), tmp_path / "other")
    assert (moved.folder.name, moved.fingerprint) == (first.folder.name, first.fingerprint)


def test_another_setting_title_or_row_is_another_fingerprint(tmp_path):
    paths = csv_pair(tmp_path / "raw")
    fingerprints = [prepare(CsvTables(**paths, **more), tmp_path).fingerprint for more in ({}, {"history_length": 3})]
    items = [f"i{n},Title {n}" for n in range(1, 5)]
    paths = csv_pair(tmp_path / "raw", items=[*items, "i5,Changed"])
    fingerprints.append(prepare(CsvTables(**paths), tmp_path).fingerprint)
    swapped = [f"{u},i{n},{t}" for u in "abc" for t, n in enumerate((2, 1, 3, 4, 5))]
    paths = csv_pair(tmp_path / "raw", interactions=swapped)
    fingerprints.append(prepare(CsvTables(**paths), tmp_path).fingerprint)
    assert len(set(fingerprints)) == 4


def test_two_processes_build_what_one_builds(tmp_path):
    one = prepare(Toy(n_users=1500, n_items=60, n_volumes=3, n_worlds=5), tmp_path / "one")
    two = prepare(Toy(n_users=1500, n_items=60, n_volumes=3, n_worlds=5, num_proc=2), tmp_path / "two")
    assert one.manifest == two.manifest
    assert one.statistics == two.statistics
    assert two.splits["train"]["example_id"][:] == list(range(len(two.splits["train"])))


def test_recdata_says_what_it_is(tmp_path):
    data = prepare(
        CsvTables(**csv_pair(tmp_path), name="mine", domain="book", history_length=3), tmp_path / "processed"
    )
    assert data.folder.name.startswith("mine-")
    assert (data.name, data.domain, data.history_length, data.n_items) == ("mine", "book", 3, 5)
    assert data.titles == [f"Title {n}" for n in range(1, 6)]
    assert data.splits["train"].cache_files  # memory-mapped, not held
    manifest = json.loads((data.folder / "manifest.json").read_text())
    assert manifest["fingerprint"] == data.fingerprint
    assert str(tmp_path) not in (data.folder / "manifest.json").read_text()
    assert load(data.folder).fingerprint == data.fingerprint


def test_statistics_are_printed_as_a_small_table(tmp_path):
    data = prepare(CsvTables(**csv_pair(tmp_path)), tmp_path / "processed")
    text = format_statistics(data.statistics)
    assert text.splitlines()[:3] == [
        "users                3",
        "items                5",
        "interactions         15   density 100.000%",
    ]
    assert "rows                 train 6   validation 3   test 3" in text
    assert data.statistics["sequence_length"] == {"min": 5, "median": 5.0, "mean": 5.0, "max": 5}
    assert "too short" not in text


def test_folder_without_data_of_another_format_or_damaged_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no prepared dataset"):
        load(tmp_path)
    data = prepare(CsvTables(**csv_pair(tmp_path / "raw")), tmp_path)
    manifest = dict(data.manifest)
    (data.folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 0}))
    with pytest.raises(DataError, match=r"has format version 0, expected .*Delete"):
        load(data.folder)
    sizes = manifest["sizes"] | {"train": 99}
    (data.folder / "manifest.json").write_text(json.dumps(manifest | {"sizes": sizes}))
    with pytest.raises(DataError, match=r"train holds 6 rows, expected 99"):
        load(data.folder)
    (data.folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load(data.folder)
    (data.folder / "manifest.json").write_text(json.dumps(manifest))
    arrow = next((data.folder / "train").glob("*.arrow"))
    content = arrow.read_bytes()
    arrow.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"is damaged|holds"):
        load(data.folder)


def test_changed_content_is_found_by_verify(tmp_path):
    data = prepare(CsvTables(**csv_pair(tmp_path / "raw")), tmp_path)
    other = prepare(CsvTables(**csv_pair(tmp_path / "raw"), history_length=1), tmp_path)
    os.replace(next((other.folder / "test").glob("*.arrow")), next((data.folder / "test").glob("*.arrow")))
    with pytest.raises(DataError, match="is not what was written"):
        load(data.folder).verify()


def test_killed_half_way_leaves_nothing_that_is_read(tmp_path):
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from importlib import import_module\n"
        "from llm2rec.data import Toy\n"
        "prepare_module = import_module('llm2rec.data.prepare')\n"
        "prepare_module.compute_statistics = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"prepare_module.prepare(Toy(n_users=50), Path({str(tmp_path)!r}))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    leftover = list(tmp_path.iterdir())
    assert len(leftover) == 1
    assert leftover[0].name.startswith(".toy-")
    data = prepare(Toy(n_users=50), tmp_path)
    data.verify()
    assert len(data.sequences) == 50


def test_failure_leaves_no_folder_behind(tmp_path, monkeypatch):
    # The package's function of the same name hides the module from dotted paths.
    monkeypatch.setattr(import_module("llm2rec.data.prepare"), "compute_statistics", lambda *_: {"a": object()})
    with pytest.raises(TypeError):
        prepare(Toy(n_users=50), tmp_path)
    assert not list(tmp_path.iterdir())


def test_toy_is_a_function_of_its_seed_and_its_titles_tell():
    raws = [Toy(seed=seed).read() for seed in (1, 1, 2)]
    assert raws[0].interactions.equals(raws[1].interactions)
    assert not raws[0].interactions.equals(raws[2].interactions)
    titles = raws[0].items.set_index("item_id").title
    assert titles.is_unique
    assert raws[0].items.item_id.is_unique
    visits = raws[0].interactions
    assert not visits.duplicated(["user_id", "item_id"]).any()
    words = visits.item_id.map(titles).str.split()
    same_user = (visits.user_id == visits.user_id.shift()).to_numpy()
    same_world = np.array([a[0] == b[0] for a, b in zip(words[1:], words[:-1], strict=True)])[same_user[1:]]
    assert 0.85 < same_world.mean() < 0.97


def statistics_of(median=9, longest=10, n_test=5000, cold=0):
    spread = {"min": 3, "mean": 9.0}
    return {
        "sequence_length": {**spread, "median": median, "max": 60},
        "history_length": {**spread, "median": 5, "max": longest},
        "rows": {"train": 9, "validation": n_test, "test": n_test},
        "cold_targets": {"validation": 0, "test": cold},
    }


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({}, None),
        ({"cold": 50, "median": 11}, None),
        ({"median": 4.5}, "half of the users have 4.5 interactions or fewer"),
        ({"median": 12}, "most histories are cut at 10 items"),
        ({"cold": 51}, "1.0% of the test targets are items without training interactions"),
        ({"n_test": 400}, r"with 400 test rows an HR@10 of 10 % is known to ± 2\.9 points"),
        ({"n_test": 0}, None),
    ],
)
def test_warnings_about_a_dataset(changes, warning):
    found = doubts(statistics_of(**changes))
    assert len(found) == (warning is not None)
    assert warning is None or re.match(warning, found[0])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_step_of_a_preparation_shows_its_progress(suffix, tmp_path, progress_lines):
    visits = pd.DataFrame([(f"u{u}", f"i{i}", u + i) for u in range(9) for i in range(9)])
    visits.columns = ["user_id", "item_id", "timestamp"]
    items = pd.DataFrame({"item_id": visits.item_id.unique(), "title": "Title of " + visits.item_id.unique()})
    write = {
        "csv": lambda table, file: table.to_csv(file, index=False),
        "jsonl": lambda table, file: table.to_json(file, orient="records", lines=True),
        "parquet": lambda table, file: table.to_parquet(file),
    }[suffix]
    for name, table in (("visits", visits), ("items", items)):
        write(table, tmp_path / f"{name}.{suffix}")
    prepare(CsvTables(interactions=f"{tmp_path}/visits.{suffix}", items=f"{tmp_path}/items.{suffix}"), tmp_path / "out")
    phases = progress_lines().keys()
    assert phases >= {f"hash visits.{suffix}", f"read visits.{suffix}", f"read items.{suffix}"}
    assert phases >= {"sort interactions into buckets", "count interactions", "filter interactions", "write examples"}
    assert {"read train/data-00000-of-00001.arrow", "hash data-00000-of-00001.arrow"} <= phases
