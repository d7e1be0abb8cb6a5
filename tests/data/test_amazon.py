"""Amazon reviews: three generations of files, titles, and what is refused."""

import gzip
import json

import pytest

from llm2rec.core.errors import DataError
from llm2rec.data import AmazonReviews, prepare

ITEMS = ["B001", "B002", "B003", "B004", "B005"]
TITLES = ["Mario &amp; Luigi", "  Two\twords ", "Three", "Four", "Five"]


def old_review(user, item, time):
    return {"reviewerID": user, "asin": item, "overall": 4.0, "unixReviewTime": time, "reviewText": "ok"}


def new_review(user, item, time):
    return {"user_id": user, "asin": "variant", "parent_asin": item, "rating": 4.0, "timestamp": time * 1000}


def write(folder, year, zipped=False, titles=TITLES, extra=()):
    """Write reviews and metadata of one generation."""
    review, key = (new_review, "parent_asin") if year == 2023 else (old_review, "asin")
    reviews = [json.dumps(review(user, item, time)) for user in "uvw" for time, item in enumerate(ITEMS)]
    metadata = [{key: item, "title": title} for item, title in zip(ITEMS, titles, strict=False)]
    metadata = [{k: v for k, v in row.items() if v is not None} for row in metadata]
    lines = [repr(row) if year == 2014 else json.dumps(row) for row in metadata] + list(extra)
    paths = {}
    for name, rows in (("reviews", reviews), ("metadata", lines)):
        content = ("\n".join(rows) + "\n").encode()
        path = folder / (f"{name}.json.gz" if zipped else f"{name}.jsonl")
        path.write_bytes(gzip.compress(content) if zipped else content)
        paths[name] = str(path)
    return paths


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_three_generations_read_the_same(tmp_path, year, zipped):
    raw = AmazonReviews(**write(tmp_path, year, zipped)).read()
    assert raw.items.title.tolist() == ["Mario & Luigi", "Two words", "Three", "Four", "Five"]
    assert raw.interactions.item_id.tolist() == ITEMS * 3
    assert raw.interactions.timestamp.tolist()[:3] == ([0, 1000, 2000] if year == 2023 else [0, 1, 2])
    assert raw.interactions.rating.tolist() == [4.0] * 15


def test_repeated_metadata_keeps_the_first_title_and_is_counted(tmp_path):
    again = [json.dumps({"asin": "B001", "title": "Another"}), json.dumps({"asin": "unreviewed", "title": "x"})]
    data = prepare(AmazonReviews(**write(tmp_path, 2018, extra=again)), tmp_path / "processed")
    assert data.titles[0] == "Mario & Luigi"
    assert data.n_items == 5
    assert data.statistics["removed"]["metadata_rows_repeated"] == 1


@pytest.mark.parametrize(
    "lost", [["One"], ["One", None], ["One", ""], ["One", "<script>new Date().getTime()</script>"]]
)
def test_reviewed_product_without_title_follows_the_policy(tmp_path, lost):
    titles = lost + TITLES[len(lost) :] if len(lost) > 1 else [*TITLES[:4]]
    without = "B002" if len(lost) > 1 else "B005"
    paths = write(tmp_path, 2018, titles=titles)
    with pytest.raises(DataError, match=rf"1 of 5 items have no title \('{without}'\).*missing_title=drop"):
        prepare(AmazonReviews(**paths), tmp_path)
    assert prepare(AmazonReviews(**paths, missing_title="drop"), tmp_path).n_items == 4
    assert without in prepare(AmazonReviews(**paths, missing_title="id"), tmp_path).titles


def test_descriptions_follow_the_title(tmp_path):
    paths = write(tmp_path, 2014)
    products = [
        {"asin": "B001", "title": "One", "description": "A <b>game</b> &amp; more", "brand": "Acme"},
        {"asin": "B002", "title": "Two", "description": ["First.", "Second"], "categories": [["Games", "Old"]]},
        {"asin": "B003", "title": "Three"},
        {"asin": "B003", "title": "Again", "brand": "Later"},
        {"asin": "B004", "title": "Four", "brand": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(repr, products)))
    columns = ["brand", "description", "categories"]
    data = prepare(AmazonReviews(**paths, text_columns=columns, missing_title="id"), tmp_path)
    assert data.texts == ["One. Acme. A game & more", "Two. First. Second. Games Old", "Three. Later", "Four", "B005"]
    assert data.titles == ["One", "Two", "Three", "Four", "B005"]
    message = r"no reviewed product has `descriptio`; their keys are asin, brand, categories, description, title\."
    with pytest.raises(DataError, match=message):
        AmazonReviews(**paths, text_columns=["brand", "descriptio"]).read()


def test_reviewed_product_without_metadata_is_dropped_on_request(tmp_path):
    paths = write(tmp_path, 2018, titles=["One", "", *TITLES[2:4]])
    data = prepare(AmazonReviews(**paths, missing_items="drop", missing_title="id"), tmp_path)
    assert data.titles == ["One", "B002", "Three", "Four"]
    assert data.statistics["removed"]["rows_with_missing_items"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "u", ', "line 16: .* is neither a JSON object"),
        ('"text"', "line 16: .* is not an object"),
        ('{"reviewerID": "u", "asin": "B001", "overall": 5}', "line 16: not a review of the 2014 and 2018 layout"),
        (json.dumps(old_review(None, "B001", 1)), "line 16: not a review"),
        (json.dumps(old_review("u", "B001", "noon")), "line 16: not a review"),
    ],
)
def test_malformed_review_names_file_and_line(tmp_path, line, message):
    paths = write(tmp_path, 2018)
    with open(paths["reviews"], "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(DataError, match=rf"reviews\.jsonl, {message}"):
        AmazonReviews(**paths).read()


def test_files_given_the_wrong_way_round_are_refused(tmp_path):
    paths = write(tmp_path, 2018)
    with pytest.raises(DataError, match=r"not a review of a known layout, its keys are asin, title"):
        AmazonReviews(reviews=paths["metadata"], metadata=paths["reviews"]).read()


def test_metadata_of_something_else_is_refused(tmp_path):
    paths = write(tmp_path, 2018)
    other = tmp_path / "other.json"
    other.write_text('{"asin": "X", "title": "x"}\n')
    with pytest.raises(DataError, match=r"names none of the 5 products"):
        AmazonReviews(reviews=paths["reviews"], metadata=str(other)).read()
    other.write_text('{"sku": "X", "title": "x"}\n')
    with pytest.raises(DataError, match=r"other\.json, line 1: not a product, its keys are sku, title"):
        AmazonReviews(reviews=paths["reviews"], metadata=str(other)).read()


def test_missing_and_empty_files_are_refused(tmp_path):
    paths = write(tmp_path, 2018)
    with pytest.raises(DataError, match=r"`dataset\.reviews` does not exist"):
        AmazonReviews(reviews=str(tmp_path / "none"), metadata=paths["metadata"]).read()
    (tmp_path / "empty").write_text("")
    with pytest.raises(DataError, match="is empty; expected one review per line"):
        AmazonReviews(reviews=str(tmp_path / "empty"), metadata=paths["metadata"]).read()
