"""The standard 5-core sets of 2014: their layout, the order of ties, downloads."""

import gzip
import json
import random

import pytest

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.data import Amazon2014, prepare

DAY = 86400
USERS = {  # product and day; the file is in order of products
    "A1": [("0001", 3), ("B002", 1), ("B003", 1), ("B004", 1), ("B005", 2)],
    "A2": [("0001", 1), ("B002", 1), ("B003", 2), ("B004", 1), ("B005", 3)],
    "A3": [("B005", 1), ("B004", 1), ("B003", 1), ("B002", 1), ("0001", 1)],
    "A4": [("0001", 5), ("B002", 4), ("B003", 3), ("B004", 2), ("B005", 1)],
    "A5": [("0001", 1), ("B002", 2), ("B003", 3), ("B004", 4), ("B005", 5)],
}
TITLES = {
    "0001": "A 'quoted' title",
    "B002": "Games &amp; more",
    "B003": "Both ' and \"",
    "B005": "Five",
    "B009": "Rest",
}


def write(folder, zipped=True, seed=None, category="Toys_and_Games"):
    """Write reviews as JSON and metadata as Python literals, as published."""
    rows = [
        {
            "reviewerID": user,
            "asin": item,
            "reviewerName": "N",
            "helpful": [0, 0],
            "reviewText": "Good \u2014 very",
            "overall": 5.0,
            "summary": "ok",
            "unixReviewTime": day * DAY,
            "reviewTime": "01 29, 2014",
        }
        for user, visits in USERS.items()
        for item, day in visits
    ]
    rows.sort(key=lambda row: row["asin"])
    if seed is not None:
        random.Random(seed).shuffle(rows)
    products = [
        {"asin": item, "title": title, "price": 1.5, "salesRank": {"Toys & Games": 7}, "categories": [["Toys & Games"]]}
        for item, title in TITLES.items()
    ]
    products.insert(1, {"asin": "B004", "imUrl": "http://x", "related": {"also_bought": ["0001"]}})
    folder.mkdir(exist_ok=True)
    texts = {f"reviews_{category}_5.json": map(json.dumps, rows), f"meta_{category}.json": map(repr, products)}
    for name, lines in texts.items():
        content = ("\n".join(lines) + "\n").encode()
        path = folder / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def toys(**settings):
    return Amazon2014(**{"name": "amazon_toys", "category": "Toys_and_Games", **settings})


def sequences_of(data):
    codes = data.items["raw_id"][:]
    return {row["user_id"]: [codes[item] for item in row["items"]] for row in data.sequences}


@pytest.mark.parametrize("zipped", [True, False])
def test_the_public_layout_becomes_the_standard_set(tmp_path, zipped):
    data = prepare(toys(raw_dir=str(write(tmp_path / "raw", zipped))), tmp_path / "processed")
    assert dict(zip(data.items["raw_id"], data.titles, strict=True)) == {
        **{code: title for code, title in TITLES.items() if code != "B009"},
        "B002": "Games & more",
        "B004": "B004",  # without a title
    }
    by_day_then_code = {
        user: [code for code, _ in sorted(visits, key=lambda v: (v[1], v[0]))] for user, visits in USERS.items()
    }
    assert sequences_of(data) == by_day_then_code
    assert data.sequences["timestamps"][0] == [DAY, DAY, DAY, 2 * DAY, 3 * DAY]
    assert (data.name, data.domain, data.manifest["settings"]["ties"]) == ("amazon_toys", "product", "item")


def test_ties_ascend_by_product_code_whatever_the_order_of_the_file(tmp_path):
    found = [
        sequences_of(prepare(toys(raw_dir=str(write(tmp_path / f"raw{seed}", seed=seed))), tmp_path / "processed"))
        for seed in (None, 1, 2)
    ]
    assert found[1:] == found[:1] * 2


def test_files_are_downloaded_once(tmp_path):
    published = write(tmp_path / "published")
    spec = toys(url=published.as_uri())
    data = prepare(spec, tmp_path / "processed", tmp_path / "cache")
    for file in published.iterdir():
        file.unlink()
    again = prepare(spec, tmp_path / "elsewhere", tmp_path / "cache")
    assert again.fingerprint == data.fingerprint
    assert data.fingerprint == prepare(toys(raw_dir=str(write(tmp_path / "raw"))), tmp_path / "other").fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"download": False}, r"reviews_Toys_and_Games_5\.json\.gz does not exist and `dataset\.download` is false"),
        ({"url": "http://127.0.0.1:9"}, r"Amazon reviews of Toys_and_Games could not be downloaded from http"),
        ({"raw_dir": "nowhere"}, r"`dataset\.raw_dir` holds no reviews_Toys_and_Games_5\.json\.gz: nowhere"),
    ],
)
def test_missing_files_name_both_ways(tmp_path, settings, message):
    with pytest.raises(DataError, match=message + r".*connect to the network.*dataset\.raw_dir=FOLDER"):
        prepare(toys(**settings), tmp_path / "processed", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*"))


def test_metadata_is_missing_or_of_something_else(tmp_path):
    raw = write(tmp_path / "raw")
    (raw / "meta_Toys_and_Games.json.gz").unlink()
    with pytest.raises(DataError, match=r"holds no meta_Toys_and_Games\.json\.gz"):
        toys(raw_dir=str(raw)).read()
    (raw / "meta_Toys_and_Games.json").write_text("{'asin': 'B777', 'title': 'x'}\n")
    with pytest.raises(DataError, match=r"names none of the 5 products .* same category and year: dataset\.raw_dir="):
        toys(raw_dir=str(raw)).read()
    with pytest.raises(ConfigError, match=r"`dataset\.category` is not set"):
        Amazon2014(name="x")
