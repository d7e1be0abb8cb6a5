"""A user's own tables: formats, exact ids, timestamps, and every way a file can be wrong."""

import gzip
import json
import logging
import re
import shlex

import pandas as pd
import pytest
from data_files import csv_pair
from hydra.core.override_parser.overrides_parser import OverridesParser

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.data import CsvTables, load, prepare

ROWS = [("007", "i,1", 10), ("007", "7", 30), ("007", "i1", 20), ("u 2", "7", 5)]
ITEMS = [("i,1", 'The "One", really'), ("7", "Seven"), ("i1", "line\nbreak  twice")]


def write(folder, suffix):
    """Write the same two tables in some format."""
    interactions = pd.DataFrame(ROWS, columns=["user_id", "item_id", "timestamp"])
    items = pd.DataFrame(ITEMS, columns=["item_id", "title"])
    paths = {}
    for name, frame in (("interactions", interactions), ("items", items)):
        path = folder / f"{name}{suffix}"
        paths[name] = str(path)
        if suffix == ".parquet":
            frame.to_parquet(path)
        elif "jsonl" in suffix:
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False, sep="\t" if "tsv" in suffix else ",")
    return paths


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_formats_read_the_same(tmp_path, suffix):
    raw = CsvTables(**write(tmp_path, suffix)).read()
    assert list(raw.interactions.itertuples(index=False, name=None)) == ROWS
    assert raw.items.title.tolist() == ['The "One", really', "Seven", "line break twice"]


def test_columns_are_named_by_options_and_rating_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("who,what,when,stars,extra\nu,i,1,4.5,x\n")
    (tmp_path / "b.csv").write_text("extra,id,name\nx,i,Item\n")
    spec = CsvTables(
        interactions=str(tmp_path / "a.csv"),
        items=str(tmp_path / "b.csv"),
        user_column="who",
        item_column="what",
        timestamp_column="when",
        rating_column="stars",
        item_id_column="id",
        title_column="name",
    )
    assert spec.read().interactions.iloc[0].to_dict() == {"user_id": "u", "item_id": "i", "timestamp": 1, "rating": 4.5}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("3", "1", "2"), [3, 1, 2]),
        (("3.0", "1e3", "2"), [3, 1000, 2]),
        (("0.5", "0.25", "2"), [500000, 250000, 2000000]),
        (("2024-01-02", "2024-01-01T00:00:01", "2024-01-01T02:00:00.5+02:00"),
         [1704153600000000, 1704067201000000, 1704067200500000]),
        (("1700000000123456789", "1", "2"), [1700000000123456789, 1, 2]),
    ],
)  # fmt: skip
def test_timestamps_of_every_kind(tmp_path, texts, expected):
    paths = csv_pair(tmp_path, interactions=[f"u,i1,{text}" for text in texts])
    assert CsvTables(**paths).read().interactions.timestamp.tolist() == expected


def test_parquet_dates_are_timestamps(tmp_path):
    paths = csv_pair(tmp_path)
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": ["i1", "i2"]})
    for times in (pd.to_datetime(["1970-01-02", "1970-01-01"]), pd.to_datetime(["1970-01-02", "1970-01-01"]).date):
        frame.assign(timestamp=times).to_parquet(tmp_path / "a.parquet")
        raw = CsvTables(interactions=str(tmp_path / "a.parquet"), items=paths["items"]).read()
        assert raw.interactions.timestamp.tolist() == [86400000000, 0]
        assert raw.interactions.user_id.tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("u,i1", r"interactions\.csv, line 4: 2 fields, expected 3"),
        ("u,i1,4,5", r"interactions\.csv, line 4: 4 fields, expected 3"),
        ("u,i1,noon", r"interactions\.csv, line 4: column `timestamp` holds 'noon', expected a number"),
        ("u,i1,", r"interactions\.csv, line 4: column `timestamp` holds ''"),
        ("u,i1,nan", r"interactions\.csv, line 4: column `timestamp` holds 'nan'"),
        (",i1,4", r"interactions\.csv, line 4: column `user_id` holds '', expected an id"),
        ("u,  ,4", r"interactions\.csv, line 4: column `item_id` holds"),
        ('u,"i1,4', r"interactions\.csv, line 4: the row that starts here cannot be read"),
        ('u,"i1,4\nu,"i2",5', r"interactions\.csv, line 4: the row that starts here cannot be read"),
        ("u,i\udcff,4", r"interactions\.csv, line 4: not utf-8 text"),
    ],
)
def test_malformed_row_names_file_and_line(tmp_path, row, message):
    paths = csv_pair(tmp_path)
    content = f"user_id,item_id,timestamp\nu,i1,1\nu,i2,2\n{row}\n"
    (tmp_path / "interactions.csv").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        CsvTables(**paths).read()


def test_line_numbers_count_quoted_breaks_and_blank_lines(tmp_path):
    paths = csv_pair(tmp_path)
    (tmp_path / "items.csv").write_text('item_id,title\ni1,"two\nlines"\n\ni2,x\ni1,again\n')
    with pytest.raises(DataError, match=r"items\.csv, line 6: item id 'i1' occurs before \(.*items\.csv, line 3\)"):
        CsvTables(**paths).read()


def test_unknown_column_lists_those_that_are_there(tmp_path):
    paths = csv_pair(tmp_path)
    with pytest.raises(DataError, match=r"no column `user`; the columns are user_id, item_id, timestamp.*user_column="):
        CsvTables(**paths, user_column="user").read()
    with pytest.raises(DataError, match=r"no column `name`; the columns are item_id, title.*dataset\.title_column="):
        CsvTables(**paths, title_column="name").read()


def test_missing_file_folder_and_unknown_format_are_refused(tmp_path):
    paths = csv_pair(tmp_path)
    with pytest.raises(DataError, match=r"`dataset\.items` does not exist: .*nothing\.csv"):
        CsvTables(interactions=paths["interactions"], items=str(tmp_path / "nothing.csv")).read()
    with pytest.raises(DataError, match=r"`dataset\.items` is a folder"):
        CsvTables(interactions=paths["interactions"], items=str(tmp_path)).read()
    (tmp_path / "items.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"unknown format '\.xlsx'; expected \.csv"):
        CsvTables(interactions=paths["interactions"], items=str(tmp_path / "items.xlsx")).read()


@pytest.mark.parametrize(("suffix", "usual"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_another_separator_is_recognised_by_the_columns(tmp_path, caplog, suffix, usual, separator):
    caplog.set_level(logging.INFO, "llm2rec.data")
    paths = {}
    for name, rows, columns in (
        ("interactions", ROWS, ["user_id", "item_id", "timestamp"]),
        ("items", ITEMS, ["item_id", "title"]),
    ):
        paths[name] = str(tmp_path / f"{name}{suffix}")
        frame = pd.DataFrame(rows, columns=columns).assign(**{"note, or ; like this": "a"})
        frame.to_csv(paths[name], index=False, sep=separator, quoting=1)
    raw = CsvTables(**paths).read()
    assert list(raw.interactions.itertuples(index=False, name=None)) == ROWS
    assert raw.items.item_id.tolist() == [item for item, _ in ITEMS]
    assert (f"columns are separated by {separator!r}, not by {usual!r}" in caplog.text) == (separator != usual)
    with pytest.raises(DataError, match=r"no column `who`; the columns are user_id, item_id"):
        CsvTables(**paths, user_column="who").read()


def test_a_separator_that_is_not_known_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("user_id::item_id::timestamp\nu::i::1\n")
    with pytest.raises(DataError, match=r"are user_id::item_id::timestamp \(a separator must be a comma, a semicolon"):
        CsvTables(interactions=str(tmp_path / "a.csv"), items=csv_pair(tmp_path)["items"]).read()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz"])
@pytest.mark.parametrize("given", ["utf-8", "cp1252"])
def test_a_byte_order_mark_goes_before_the_option(tmp_path, encoding, suffix, given):
    items, visits = "item_id,title\ni1,Pok\u00e9mon \u4eba\n", "user_id,item_id,timestamp\nu,i1,1\n"
    if "jsonl" in suffix:
        items = '{"item_id": "i1", "title": "Pok\u00e9mon \u4eba"}\n'
        visits = '{"user_id": "u", "item_id": "i1", "timestamp": 1}\n'
    paths = {}
    for name, text in (("items", items), ("interactions", visits)):
        content = ("\ufeff" + text).encode(encoding)
        paths[name] = str(tmp_path / f"{name}{suffix}")
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    raw = CsvTables(**paths, encoding=given).read()
    assert raw.items.title.tolist() == ["Pok\u00e9mon \u4eba"]
    assert raw.interactions.values.tolist() == [["u", "i1", 1]]


def test_utf_16_without_a_mark_is_named(tmp_path):
    paths = csv_pair(tmp_path)
    (tmp_path / "items.csv").write_bytes("item_id,title\ni1,One\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"are 'i\\x00t.* \(UTF-16 without a byte-order mark\? Then dataset\.encoding="):
        CsvTables(**paths).read()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", [" title", "Title", " Title\xa0(en)"])
def test_a_column_name_with_spaces_or_capitals_is_quoted_with_the_fix(tmp_path, suffix, name):
    frame = pd.DataFrame({"item_id": [f"i{n}" for n in range(1, 6)], name: "One"})
    path = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    paths = {"interactions": csv_pair(tmp_path / "raw")["interactions"], "items": str(path)}
    wanted = "title\xa0(EN) " if "en" in name else "title"
    shown = re.escape(repr(name)) if name != "Title" else "Title"
    with pytest.raises(DataError, match=rf"no column `.*`; the columns are item_id, {shown}\.") as refused:
        CsvTables(**paths, title_column=wanted).read()
    fix = str(refused.value).split("Name the right one: ")[1].split(", or remove the spaces")[0]
    override = OverridesParser.create().parse_override(shlex.split(fix)[0])
    assert override.key_or_group == "dataset.title_column"
    assert CsvTables(**paths, title_column=override.value()).read().items.title.tolist() == ["One"] * 5


@pytest.mark.parametrize("content", ["", "\n\n"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_empty_file_is_refused(tmp_path, content, suffix):
    (tmp_path / f"a{suffix}").write_text(content)
    with pytest.raises(DataError, match="is empty"):
        CsvTables(interactions=str(tmp_path / f"a{suffix}"), items=csv_pair(tmp_path)["items"]).read()


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "utf-16", "UTF-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_text_may_be_in_any_encoding(tmp_path, encoding, suffix):
    """Titles as each encoding can write them, in lines that end as Windows ends them."""
    titles = ["Pok\u00e9mon", "B\u00fccher"] if encoding == "cp1252" else ["\u4eba\u751f\u30b2", "\u8868\u3010\u65b0"]
    rows = [("i1", titles[0]), ("i2", titles[1])]
    if suffix == ".tsv":
        items = "\r\n".join(["item_id\ttitle", *("\t".join(row) for row in rows), ""])
        visits = "user_id\titem_id\ttimestamp\r\nu\ti1\t1\r\nu\ti2\t2\r\n"
    else:
        items = "".join(json.dumps({"item_id": i, "title": t}, ensure_ascii=False) + "\r\n" for i, t in rows)
        visits = "".join(json.dumps({"user_id": "u", "item_id": i, "timestamp": 1}) + "\r\n" for i, _ in rows)
    for name, content in (("items", items), ("interactions", visits)):
        (tmp_path / f"{name}{suffix}").write_bytes(content.encode(encoding))
    paths = {name: str(tmp_path / f"{name}{suffix}") for name in ("items", "interactions")}
    raw = CsvTables(**paths, encoding=encoding).read()
    assert raw.items["title"].tolist() == titles
    assert raw.interactions["item_id"].tolist() == ["i1", "i2"]


def test_another_encoding_is_named_and_an_unknown_one_refused(tmp_path):
    paths = csv_pair(tmp_path)
    (tmp_path / "items.csv").write_bytes("item_id,title\ni1,Pok\u00e9mon\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"items\.csv, line 2: not utf-8 text .* dataset\.encoding=cp1252"):
        CsvTables(**paths).read()
    for encoding in ("klingon", "base64"):
        with pytest.raises(ConfigError, match=rf"`encoding` must be the name of a text encoding .* got '{encoding}'"):
            CsvTables(**paths, encoding=encoding)


def test_header_alone_leaves_nothing(tmp_path):
    paths = csv_pair(tmp_path)
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match="no interaction is left of 0"):
        prepare(CsvTables(**paths), tmp_path / "processed")


def test_item_without_title_is_an_error_dropped_or_named_by_its_id(tmp_path):
    paths = csv_pair(tmp_path / "raw", items=["i1,One", "i2,  ", "i3,Three", "i4,Four", "i5,Five"])
    with pytest.raises(DataError, match=r"items\.csv, line 3: item 'i2' has no title.*missing_title=drop"):
        CsvTables(**paths).read()
    dropped = prepare(CsvTables(**paths, missing_title="drop"), tmp_path)
    assert dropped.titles == ["One", "Three", "Four", "Five"]
    assert dropped.statistics["removed"]["rows_without_title"] == 3
    assert prepare(CsvTables(**paths, missing_title="id"), tmp_path).titles == ["One", "i2", "Three", "Four", "Five"]


def test_interactions_with_items_that_the_table_lacks_are_dropped_on_request(tmp_path, caplog):
    rows = [f"{user},{item},{time}" for user in "abc" for time, item in enumerate(("i1", "x", "i3", "i4", "i5", "y"))]
    data = prepare(CsvTables(**csv_pair(tmp_path, rows), missing_items="drop"), tmp_path / "processed")
    assert data.items["raw_id"][:] == ["i1", "i3", "i4", "i5"]
    assert data.sequences["items"][:] == [[0, 1, 2, 3]] * 3
    removed = data.statistics["removed"]
    assert (removed["rows_with_missing_items"], removed["missing_items"], removed["rows_without_title"]) == (6, 2, 0)
    assert "6 interactions name 2 items that are not among the 5 items ('x', 'y'); dropped" in caplog.text
    with pytest.raises(DataError, match=r"left of 2 \(2 with items that are not in the item table\)"):
        prepare(CsvTables(**csv_pair(tmp_path, ["a,x,1", "a,y,2"]), missing_items="drop"), tmp_path / "processed")


def test_an_option_at_its_default_leaves_the_settings_as_they_were(tmp_path):
    paths = csv_pair(tmp_path)
    assert "missing_items" not in CsvTables(**paths).settings()
    assert CsvTables(**paths, missing_items="drop").settings()["missing_items"] == "drop"
    with pytest.raises(ConfigError, match="`missing_items` must be one of error, drop, got 'skip'"):
        CsvTables(**paths, missing_items="skip")


def test_interaction_with_an_unknown_item_names_it_and_how_many(tmp_path):
    rows = ["a,i1,1", "a,07,2", "a,i2,3", "b,07,1", "b,x,2"]
    message = r"3 interactions name 2 items that are not among the 5 items \('07', 'x'\).* dataset\.missing_items=drop"
    with pytest.raises(DataError, match=message):
        prepare(CsvTables(**csv_pair(tmp_path, interactions=rows)), tmp_path / "processed")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user_id": "u", "item_id": "i1"', "line 2: .* is not JSON"),
        ("[1, 2]", "line 2: .* is not an object"),
        ('{"user_id": "u", "item_id": "i1"}', "line 2: `timestamp` is None"),
        ('{"user_id": null, "item_id": "i1", "timestamp": 1}', "line 2: `user_id` is None"),
        ('{"user_id": ["u"], "item_id": "i1", "timestamp": 1}', "line 2: `user_id` is "),
        ('{"user_id": "u", "item_id": "i1", "timestamp": "noon"}', "line 2: column `timestamp` holds 'noon'"),
    ],
)
def test_malformed_json_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"user_id": "u", "item_id": "i1", "timestamp": 1}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        CsvTables(interactions=str(path), items=csv_pair(tmp_path)["items"]).read()


TEXTS = {
    "note": ["<p>Cars &amp;amp; <b>tracks</b></p>", None, "Old", "x" * 50, "End."],
    "brand": ["Acme", "Acme", "Title 3", "", 7],
}


def with_texts(folder, suffix, texts=TEXTS):
    frame = pd.DataFrame({"item_id": [f"i{n}" for n in range(1, 6)], "title": [f"Title {n}" for n in range(1, 6)]})
    frame = frame.assign(**texts)
    path = folder / f"items{suffix}"
    if suffix == ".parquet":
        frame.astype({"brand": "str"}).to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep=";")
    return {"interactions": csv_pair(folder / "raw")["interactions"], "items": str(path)}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_further_texts_follow_the_title(tmp_path, suffix):
    paths = with_texts(tmp_path, suffix)
    spec = CsvTables(**paths, text_columns=["note", "brand"], text_length=30)
    data = prepare(spec, tmp_path / "processed")
    assert data.texts == [
        "Title 1. Cars & tracks. Acme",
        "Title 2. Acme",
        "Title 3. Old",  # each text once
        "Title 4.",  # cut after a whole word
        "Title 5. End.. 7",
    ]
    assert data.titles == [f"Title {n}" for n in range(1, 6)]
    assert load(data.folder).texts == data.texts
    data.verify()
    with pytest.raises(DataError, match=r"no column `notes`; .*dataset\.text_columns=\[COLUMN\]"):
        CsvTables(**paths, text_columns=["notes"]).read()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_texts_may_be_lists(tmp_path, suffix):
    notes = [["One", "<br>two"], [], None, ["x"], ["y", None]]
    paths = with_texts(tmp_path, suffix, {"note": notes, "brand": "B"})
    spec = CsvTables(**paths, text_columns=["brand", "note"])
    assert spec.read().items["text"].tolist() == [
        "Title 1. B. One two",
        "Title 2. B",
        "Title 3. B",
        "Title 4. B. x",
        "Title 5. B. y",
    ]
    with pytest.raises(DataError, match=r"`note` (holds|is) .*expected text or"):
        CsvTables(**paths, title_column="note").read()


def test_without_further_texts_the_title_is_the_text_and_the_fingerprint_stays(tmp_path):
    paths = with_texts(tmp_path, ".csv")
    data = prepare(CsvTables(**paths), tmp_path / "processed")
    assert data.texts == data.titles
    assert data.items.column_names == ["item_id", "raw_id", "title"]
    assert data.manifest["settings"].keys().isdisjoint({"text_columns", "text_length"})
    more = [{"text_columns": ["note"]}, {"text_columns": ["brand"]}, {"text_columns": ["note"], "text_length": 9}]
    fingerprints = {prepare(CsvTables(**paths, **each), tmp_path / "processed").fingerprint for each in more}
    assert len(fingerprints | {data.fingerprint}) == 4
    with pytest.raises(ConfigError, match=r"`text_length` must be at least 1.*`text_columns` names a column twice"):
        CsvTables(**paths, text_columns=["a", "a"], text_length=0)


@pytest.mark.parametrize(("suffix", "expected"), [(".csv", [0, 1, 3, 0, 2]), (".jsonl", [1, 2, 0, 1, 3])])
def test_a_column_gives_the_order_of_ties(tmp_path, suffix, expected):
    """Text ascends by code point, numbers by size; equal values keep the order of the file."""
    paths = with_texts(
        tmp_path, suffix, {"code": [10, 100, 9, 10, 11000] if suffix == ".jsonl" else [10, 100, 9, 10, 11]}
    )
    visits = [f"{user},i{n},7" for user in "ab" for n in (5, 4, 3, 2, 1)]
    spec = CsvTables(**csv_pair(tmp_path / "raw", visits) | {"items": paths["items"]}, tie_column="code", ties="item")
    data = prepare(spec, tmp_path / "processed")
    assert data.tie_order.tolist() == expected
    assert data.sequences["items"][0] == sorted([4, 3, 2, 1, 0], key=lambda item: expected[item])
    data.verify()
    with pytest.raises(DataError, match=r"no column `asin`; .*dataset\.tie_column=COLUMN"):
        CsvTables(**paths, tie_column="asin").read()


def test_the_item_ids_are_the_order_of_ties_only_if_they_decide(tmp_path):
    paths = csv_pair(tmp_path, items=[f"i{n},Title {n}" for n in (2, 1, 4, 3, 5)])
    assert prepare(CsvTables(**paths), tmp_path / "processed").tie_order is None
    assert prepare(CsvTables(**paths, ties="item"), tmp_path / "processed").tie_order.tolist() == [1, 0, 3, 2, 4]


def test_a_text_without_a_title_begins_with_the_id(tmp_path):
    paths = csv_pair(tmp_path, items=["i1,One", "i2,", "i3,Three", "i4,Four", "i5,Five"])
    spec = CsvTables(**paths, missing_title="id", text_columns=["title"])
    assert prepare(spec, tmp_path / "processed").texts == ["One", "i2", "Three", "Four", "Five"]


def test_damaged_gzip_and_parquet_are_refused(tmp_path):
    items = csv_pair(tmp_path)["items"]
    whole = gzip.compress(b"user_id,item_id,timestamp\n" + b"u,i1,1\n" * 1000)
    for name, content in (("a.csv.gz", whole[:-20]), ("b.csv.gz", b"no gzip"), ("a.parquet", b"PAR1 no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            CsvTables(interactions=str(tmp_path / name), items=items).read()


def test_parquet_hole_and_decimal_ids_are_refused(tmp_path):
    items = csv_pair(tmp_path)["items"]
    path = tmp_path / "a.parquet"
    pd.DataFrame({"user_id": ["u", None], "item_id": ["i1", "i1"], "timestamp": [1, 2]}).to_parquet(path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: `user_id` is empty"):
        CsvTables(interactions=str(path), items=items).read()
    pd.DataFrame({"user_id": [1.0, 2.0], "item_id": ["i1", "i1"], "timestamp": [1, 2]}).to_parquet(path)
    with pytest.raises(DataError, match=r"`user_id` holds float64 values, expected text or integers"):
        CsvTables(interactions=str(path), items=items).read()


@pytest.mark.parametrize(
    ("titles", "kind"),
    [
        ([["One", "Two"]] * 5, "list<"),
        ([{"en": "One"}] * 5, "struct<"),
        ([True] * 5, "bool"),
        ([b"One"] * 5, "binary"),
        (pd.to_datetime(["2024-01-01"] * 5), "timestamp"),
    ],
)
def test_parquet_titles_that_are_no_text_are_refused_as_in_json_lines(tmp_path, titles, kind):
    paths = csv_pair(tmp_path)
    pd.DataFrame({"item_id": [f"i{n}" for n in range(1, 6)], "title": titles}).to_parquet(tmp_path / "items.parquet")
    spec = CsvTables(interactions=paths["interactions"], items=str(tmp_path / "items.parquet"))
    with pytest.raises(DataError, match=rf"`title` holds values of type {kind}.* expected text or numbers\. .*title_c"):
        spec.read()


def test_parquet_text_and_numbers_are_taken(tmp_path):
    titles = ["1984", None, "Up", "Up", "Up"]
    for column in (pd.Series(titles, dtype="category"), pd.Series([None] * 5), pd.Series([7] * 5)):
        frame = pd.DataFrame({"item_id": pd.Series([1, 2, 3, 4, 5]), "title": column})
        frame.to_parquet(tmp_path / "items.parquet")
        paths = csv_pair(tmp_path, interactions=["a,1,1"])
        spec = CsvTables(interactions=paths["interactions"], items=str(tmp_path / "items.parquet"), missing_title="id")
        assert spec.read().items.item_id.tolist() == list("12345")
