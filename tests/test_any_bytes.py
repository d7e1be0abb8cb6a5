"""Whatever bytes come in, a reader gives a typed error or what the bytes say."""

import contextlib
import copy
import csv
import functools
import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm2rec.config import register
from llm2rec.core.errors import ConfigError, DataError, TeacherOutputsError
from llm2rec.data import AmazonReviews, CsvTables, MovieLens100K
from llm2rec.distill.data_bridge import read_outputs
from llm2rec.distill.settings import DistillSettings
from llm2rec.stage import build
from llm2rec.student.settings import StudentSettings

CONF = Path(__file__).parents[1] / "conf"
often = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

ITEMS = "item_id,title\ni1,One\ni2,Two\n"
CSV = b"user_id,item_id,timestamp\na,i1,1\na,i2,2\nb,i1,3\n"
JSON = b'{"user_id": "a", "item_id": "i1", "timestamp": 1}\n{"user_id": 7, "item_id": "i2", "timestamp": 2.5}\n'
REVIEWS = b'{"reviewerID": "u", "asin": "i1", "overall": 5, "unixReviewTime": 1}\n'
META = b"{'asin': 'i1', 'title': 'One'}\n"


def spoilt(whole):
    """Bytes near those of a good file: some replaced, taken out or put in; now and then any bytes at all."""
    places = st.integers(0, len(whole))
    pieces = st.binary(max_size=4) | st.sampled_from(
        [b",", b"\n", b'"', b"\0", b"\xff", b"nan", b"inf", b"-", b"1e999", b"[[[[", b"null", b"\r", b"9" * 30]
    )

    def applied(changes):
        content = bytearray(whole)
        for place, length, piece in changes:
            content[place : place + length] = piece
        return bytes(content)

    near = st.lists(st.tuples(places, st.integers(0, 6), pieces), min_size=1, max_size=3).map(applied)
    return near | st.binary(max_size=60)


def check_named(error, name):
    """An error names the file that it is about."""
    assert name in str(error)


def read_csv(folder, name, content):
    (folder / "items.csv").write_text(ITEMS)
    (folder / name).write_bytes(content)
    return CsvTables(interactions=str(folder / name), items=str(folder / "items.csv")).read()


@often
@given(content=spoilt(CSV), packed=st.booleans())
def test_csv(tmp_path_factory, content, packed):
    folder = tmp_path_factory.mktemp("csv")
    try:
        raw = read_csv(folder, "a.csv.gz" if packed else "a.csv", gzip.compress(content) if packed else content)
    except DataError as error:
        check_named(error, "a.csv")
        return
    header, *rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if row]
    at = {name: header.index(name) for name in ("user_id", "item_id")}
    for name, column in at.items():
        assert raw.interactions[name].tolist() == [row[column] for row in rows]


@often
@given(content=spoilt(JSON))
def test_json_lines(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("json")
    try:
        raw = read_csv(folder, "a.jsonl", content)
    except DataError as error:
        check_named(error, "a.jsonl")
        return
    rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    assert raw.interactions.item_id.tolist() == [str(row["item_id"]) for row in rows]


@often
@given(content=spoilt(gzip.compress(CSV, mtime=0)))
def test_gzip(tmp_path_factory, content):
    with contextlib.suppress(DataError):
        assert len(read_csv(tmp_path_factory.mktemp("gzip"), "a.csv.gz", content).interactions)


@often
@given(reviews=spoilt(REVIEWS), meta=spoilt(META), which=st.integers(0, 2))
def test_reviews_and_products(tmp_path_factory, reviews, meta, which):
    folder = tmp_path_factory.mktemp("amazon")
    (folder / "r.json").write_bytes(REVIEWS if which == 1 else reviews)
    (folder / "m.json").write_bytes(META if which == 0 else meta)
    with contextlib.suppress(DataError):
        raw = AmazonReviews(reviews=str(folder / "r.json"), metadata=str(folder / "m.json")).read()
        assert set(raw.interactions.item_id) <= set(raw.items.item_id)
        assert np.isfinite(raw.interactions.rating).all()


@often
@given(data=st.data())
def test_zip(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("zip")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo("ml-100k/u.data"), "1\t1\t3\t10\n1\t2\t4\t11\n")
        archive.writestr(zipfile.ZipInfo("ml-100k/u.item"), "1|One\n2|Two\n")
    (folder / "ml.zip").write_bytes(data.draw(spoilt(packed.getvalue())))
    with contextlib.suppress(DataError):
        raw = MovieLens100K(raw_dir=str(folder / "ml.zip")).read()
        assert raw.interactions.rating.between(1, 5).all()


TABLES = {"myrank_train.txt": b"0 1 2\n2 1 0\n", "confidence_train.txt": b"0.5 1.5 2\n1e-3 2 3\n"}


@functools.cache
def embeddings():
    stream = io.BytesIO()
    torch.save(torch.eye(3), stream)
    return stream.getvalue()


@often
@given(name=st.sampled_from([*TABLES, "all_embeddings.pt"]), data=st.data())
def test_teacher_outputs(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("outputs")
    files = TABLES | {"all_embeddings.pt": embeddings()}
    files[name] = data.draw(spoilt(files[name]))
    for each, content in files.items():
        (folder / each).write_bytes(content)
    try:
        outputs = read_outputs(folder, n_rows=2, n_items=3, fingerprint="f", top_k=2)
    except TeacherOutputsError as error:
        check_named(error, str(folder))
        return
    assert outputs.ranking.shape == outputs.distance.shape
    assert ((outputs.ranking >= 0) & (outputs.ranking < 3)).all()
    assert np.isfinite(outputs.distance).all()
    assert torch.isfinite(outputs.embeddings).all()
    assert outputs.embeddings.shape[0] == 3


@pytest.fixture(scope="module")
def composed():
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield compose("config", overrides=["paths.root=/somewhere"])
    GlobalHydra.instance().clear()


values = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.just([1]), st.just({})
)
KEYS = {
    "student": (StudentSettings, ["training.epochs", "training.learning_rate", "model.width", "loss.name", "examples"]),
    "distill": (DistillSettings, ["ranking.weight", "ranking.top_k", "ranking.loss", "embedding.fusion_scale"]),
}


@often
@given(group=st.sampled_from(sorted(KEYS)), data=st.data())
def test_settings(composed, group, data):
    kind, keys = KEYS[group]
    key, value = data.draw(st.sampled_from(keys)), data.draw(values)
    cfg = copy.deepcopy(composed)
    try:
        OmegaConf.update(cfg[group], key, value)
        settings_ = build(cfg[group], kind)
    except (HydraException, OmegaConfBaseException, ConfigError):
        return
    found = functools.reduce(getattr, key.split("."), settings_)
    assert not isinstance(found, float) or np.isfinite(found)
