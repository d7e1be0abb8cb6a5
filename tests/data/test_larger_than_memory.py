"""Preparation from file to file gives what preparation in memory gives, whatever the parts and processes."""

import dataclasses
import gzip
import json
import re
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from data_files import csv_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_preparation import prepare_plainly

from llm2rec.core.errors import DataError
from llm2rec.data import AmazonReviews, CsvTables, RawData, Toy, prepare
from llm2rec.data.spec import DatasetSpec, RawParts


@dataclasses.dataclass
class InParts(DatasetSpec):
    """Interactions given as a list of (user, item, time, rating), some rows at a time."""

    name: str = "memory"
    rows: list = dataclasses.field(default_factory=list)
    part: int = 7

    def settings(self):
        return {name: value for name, value in super().settings().items() if name != "part"}

    def raw_files(self):
        return []

    def read_parts(self, work=None):
        frame = pd.DataFrame(self.rows, columns=["user_id", "item_id", "timestamp", "rating"])
        frame = frame.astype({"user_id": "str", "item_id": "str", "timestamp": "int64", "rating": "float64"})
        lacking = {"i6"} if self.missing_items == "drop" else set()
        ids = pd.Series(sorted(set(frame.item_id) - lacking), dtype="str")
        titles = ids.where(ids != "i0", "")
        parts = [frame[start : start + self.part] for start in range(0, max(1, len(frame)), self.part)]
        return RawParts(lambda: iter(parts), pd.DataFrame({"item_id": ids, "title": titles}), {"seen": 3})


@pytest.fixture
def small_buckets(monkeypatch):
    """Several users a bucket, several buckets a dataset, several batches a bucket."""
    monkeypatch.setattr(import_module("llm2rec.data._buckets"), "ROWS_PER_BUCKET", 9)
    monkeypatch.setattr(import_module("llm2rec.data._buckets"), "_ROWS_PER_BLOCK", 5)
    monkeypatch.setattr(import_module("llm2rec.data.writing"), "_ROWS_PER_BATCH", 4)
    monkeypatch.setattr(import_module("llm2rec.data.writing"), "_MOST_SHARDS", 6)
    monkeypatch.setattr(import_module("llm2rec.data.splitting"), "_BINS", 3)


def check_equal(spec, folder):
    """Compare with the plain way, if that has anything to give."""
    try:
        data = prepare(spec, folder)
    except DataError as error:
        if not re.search("no interaction is left|no example for", str(error)):
            raise
        return None
    fingerprint, hashes, statistics = prepare_plainly(spec)
    assert data.fingerprint == fingerprint
    assert data.manifest["hashes"] == hashes
    assert data.statistics == statistics
    data.verify()
    return data


visits = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(-3, 9), st.integers(1, 5)), min_size=15, max_size=90
).map(lambda rows: [(f"u{u}", f"i{i}", t * 2**59, r) for u, i, t, r in rows])


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=visits,
    part=st.integers(1, 40),
    k_core=st.integers(0, 4),
    length=st.integers(1, 4),
    switches=st.integers(0, 11),
)
def test_any_interactions_give_what_the_plain_way_gives(
    small_buckets, tmp_path_factory, split, rows, part, k_core, length, switches
):
    rated, missing_items = bool(switches & 1), "drop" if switches & 2 else "error"
    ties, ties_seed = ("source", "item", "shuffle")[switches // 4], part
    spec = InParts(rows=rows, part=part, split=split, k_core=k_core, history_length=length, missing_title="drop")
    spec.missing_items, spec.ties, spec.ties_seed = missing_items, ties, ties_seed
    spec.min_rating = 3 if rated else None
    spec.validation_fraction = spec.test_fraction = 0.25
    check_equal(spec, tmp_path_factory.mktemp("processed"))


def test_global_time_on_positions_is_refused_whatever_ratings_leave_out(small_buckets, tmp_path):
    rows = [(f"u{u}", f"i{1 + (u + t) % 7}", t, 1 + (u + t) % 5) for u in range(9) for t in range(8 - u % 3)]
    spec = InParts(rows=rows, split="global_time", min_rating=2, missing_title="drop")
    with pytest.raises(DataError, match=r"`timestamp` counts each user's own interactions \(0 to 7\)"):
        prepare(spec, tmp_path)


class TimedToy(Toy):
    """The toy with a clock for all users."""

    def read(self):
        raw = super().read()
        days = raw.interactions["user_id"].str[1:].astype("int64") % 7
        return dataclasses.replace(raw, interactions=raw.interactions.assign(timestamp=lambda d: d["timestamp"] + days))


@pytest.mark.parametrize("split", ["leave_one_out", "global_time"])
def test_processes_write_the_same_files(small_buckets, tmp_path, split):
    spec = TimedToy(n_users=40, n_items=60, n_volumes=3, n_worlds=5, split=split)
    one = check_equal(spec, tmp_path / "one")
    two = check_equal(dataclasses.replace(spec, num_proc=2), tmp_path / "two")
    assert len(list((one.folder / "train").glob("*.arrow"))) > 5
    assert one.manifest == two.manifest
    assert two.splits["train"]["example_id"][:] == list(range(len(two.splits["train"])))


def test_prepared_before_and_now_is_the_same_dataset(tmp_path):
    """The fingerprint that the toy had before preparation went from file to file."""
    data = prepare(Toy(n_users=60, n_items=60, n_worlds=5, history_length=4), tmp_path)
    assert data.fingerprint == "dcda9a4c359742d1eed239246092c0fe94ae4cd4462ef234429f6b44eae641a2"


TIMES = {
    "integers": lambda n: [str(10**15 + 7 * (i % 11)) for i in range(n)],
    "decimals at last": lambda n: [*(str(i % 5) for i in range(n - 1)), "2.5"],
    "whole decimals": lambda n: [f"{i % 5}.0" for i in range(n)],
    "dates": lambda n: [f"2024-01-{1 + i % 9:02d}T00:00:0{i % 5}" for i in range(n)],
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".jsonl", ".parquet"])
@pytest.mark.parametrize("times", TIMES)
def test_every_format_is_read_in_parts(small_buckets, monkeypatch, tmp_path, suffix, times):
    frame = pd.DataFrame([(f"u{i % 6}", f"i{i * 5 % 7}") for i in range(48)], columns=["user_id", "item_id"])
    frame["timestamp"] = TIMES[times](len(frame))
    if suffix in (".jsonl", ".parquet") and times != "dates":
        frame["timestamp"] = pd.to_numeric(frame["timestamp"])
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        text = frame.to_csv(index=False, sep="\t" if "tsv" in suffix else ",").encode()
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},Title {n}\n" for n in range(7)))
    spec = CsvTables(interactions=str(path), items=str(tmp_path / "items.csv"))
    whole = check_equal(spec, tmp_path / "whole")
    monkeypatch.setattr(import_module("llm2rec.data._table_reader"), "_ROWS_PER_PART", 5)
    assert check_equal(spec, tmp_path / "parts").manifest == whole.manifest


def test_reviews_are_read_in_parts(small_buckets, monkeypatch, tmp_path):
    rows = [{"reviewerID": f"u{i % 5}", "asin": f"a{i * 3 % 8}", "overall": 4, "unixReviewTime": i} for i in range(60)]
    (tmp_path / "reviews.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    products = [{"asin": f"a{n}", "title": f"A {n}"} for n in (3, 1, 2, 7, 5, 4)]
    (tmp_path / "meta.json").write_text("".join(json.dumps(row) + "\n" for row in products))
    paths = {"reviews": str(tmp_path / "reviews.json"), "metadata": str(tmp_path / "meta.json")}
    spec = AmazonReviews(**paths, missing_title="id", k_core=2)
    whole = check_equal(spec, tmp_path / "whole")
    monkeypatch.setattr(import_module("llm2rec.data.amazon"), "_ROWS_PER_PART", 7)
    assert check_equal(spec, tmp_path / "parts").manifest == whole.manifest


def test_ties_ordered_by_a_column_are_what_the_plain_way_gives(small_buckets, tmp_path):
    visits = [f"{user},i{(user * 3 + n) % 7},{n // 3}" for user in range(9) for n in range(7)]
    items = pd.DataFrame({"item_id": [f"i{n}" for n in range(7)], "title": "T", "code": list("CAAXbBA")})
    paths = csv_pair(tmp_path, visits)
    items.to_csv(paths["items"], index=False)
    for more in ({}, {"text_columns": ["code"]}):
        check_equal(CsvTables(**paths, ties="item", tie_column="code", **more), tmp_path / "processed")


def test_items_with_texts_are_what_the_plain_way_gives(tmp_path):
    paths = csv_pair(tmp_path, items=[f"i{n},Title {n}" for n in range(5, 0, -1)])
    check_equal(CsvTables(**paths, text_columns=["item_id", "title"], text_length=9), tmp_path / "processed")


def test_bad_rows_are_counted_over_all_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(import_module("llm2rec.data._table_reader"), "_ROWS_PER_PART", 3)
    rows = [f"a,i1,{time}" for time in (1, 2, 3, 4, "noon", 6, 7, "nan", 9)]
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (tmp_path / "items.csv").write_text("item_id,title\ni1,One\n")
    spec = CsvTables(interactions=str(tmp_path / "a.csv"), items=str(tmp_path / "items.csv"))
    with pytest.raises(DataError, match=r"a\.csv, line 6: column `timestamp` holds 'noon'.*\(2 of 9 rows"):
        prepare(spec, tmp_path / "processed")
    assert not list((tmp_path / "processed").iterdir())


def test_read_is_the_parts_put_together():
    spec = InParts(rows=[("a", f"i{n}", n, 1.0) for n in range(20)])
    raw = spec.read()
    assert isinstance(raw, RawData)
    assert np.array_equal(raw.interactions.timestamp, np.arange(20))
    assert raw.notes == {"seen": 3}


def test_changed_files_are_refused_when_they_are_loaded(tmp_path):
    data = prepare(Toy(n_users=40), tmp_path)
    file = next((data.folder / "test").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"test.* is not what was written"):
        prepare(Toy(n_users=40), tmp_path)
