"""Items added after training: a reading student ranks them by their titles."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

from llm2rec.core.errors import CheckpointError, ConfigError, DataError
from llm2rec.core.files import read_json, write_hashes, write_json
from llm2rec.recommend import Recommender
from llm2rec.recommend.export import BestItems, export_program
from llm2rec.recommend.settings import EncoderSettings
from llm2rec.student.datamodule import Rows
from llm2rec.student.reading import load_reader
from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.outputs import write_outputs
from llm2rec.teacher.settings import ExportSettings, TinyRandomSettings
from llm2rec.teacher.text_encoder import TextEncoder

TOY = ["dataset.n_users=60", "dataset.n_items=120", "dataset.n_worlds=5", "dataset.history_length=5"]
SETTINGS = ["student.training.epochs=2", "student.model.width=16", "logging.tensorboard=false"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def encoder(data, tmp_path_factory):
    """A tiny language model that encodes titles, and its folder."""
    settings = TinyRandomSettings(name="tiny", pooling="mean", width=32, n_heads=2)
    source = str(make_tiny_random(settings, tmp_path_factory.mktemp("llm"), data.titles))
    return TextEncoder.load(settings, CPU, source=source), source


@pytest.fixture(scope="session")
def outputs(data, encoder, tmp_path_factory):
    """Teacher outputs whose vectors are those of the titles, with a random ranking."""
    folder = tmp_path_factory.mktemp("outputs")
    generator, n_rows = np.random.default_rng(0), len(data.splits["train"])
    items = generator.random((n_rows, data.n_items)).argsort(axis=1)[:, :5].astype(np.int32)
    save_file({"items": items, "log_probs": -np.sort(generator.random(items.shape)).astype(np.float32)}, folder / "b")
    vectors = encoder[0].encode(data.titles)
    part = {"kind": "titles", "width": vectors.shape[1], "text": encoder[0].about()}
    about = {"dataset": data.name, "fingerprint": data.fingerprint, "teacher": "random", "vectors": [part]}
    write_outputs(folder / "teacher", [folder / "b"], vectors, ExportSettings(), about)
    return folder / "teacher"


def distilled_in(folder, command, outputs, *more):
    command(folder, "distill", *TOY, *SETTINGS, f"distill.teacher_outputs={outputs}", "distill=reading", *more)
    (run,) = (folder / "result").iterdir()
    return run


@pytest.fixture(scope="session")
def reading(tmp_path_factory, command, outputs):
    """The run of a student that reads."""
    return distilled_in(tmp_path_factory.mktemp("reading"), command, outputs)


@pytest.fixture(scope="session")
def untrained(data):
    """Items that training does not show."""
    items = torch.nonzero(~Rows.of(data, "train").occurring()).flatten().tolist()
    assert items
    return items


def csv_of(folder, rows, columns=("item_id", "title")):
    pd.DataFrame(rows, columns=columns).to_csv(folder / "new.csv", index=False)
    return folder / "new.csv"


def twins(data, items):
    """New items with the titles of known ones."""
    return [(f"new-{data.items[item]['raw_id']}", data.titles[item]) for item in items]


def scores_of(recommender, history, ids):
    answer = recommender.recommend_one(history, len(recommender.names), mask_seen=False)
    found = {item.item_id: item.score for item in answer}
    return [found[raw_id] for raw_id in ids]


def some_history(data):
    raw_ids = data.items["raw_id"][:]
    return [raw_ids[item] for item in data.sequences[0]["items"][:4]]


@pytest.mark.parametrize("more", [(), ("distill.embedding.fusion=frozen", "distill.embedding.components=6")])
@pytest.mark.parametrize("tie_items", ["true", "false"])
@pytest.mark.slow
def test_a_new_item_scores_as_if_it_had_been_in_the_catalogue(
    tmp_path, command, outputs, data, untrained, tie_items, more
):
    run = distilled_in(tmp_path, command, outputs, f"student.model.tie_items={tie_items}", *more)
    new = twins(data, untrained)
    known = Recommender.load(run)
    recommender = Recommender.load(run, items=csv_of(tmp_path, new))
    history, raw_ids = some_history(data), [data.items[item]["raw_id"] for item in untrained]
    assert scores_of(recommender, history, [raw_id for raw_id, _ in new]) == pytest.approx(
        scores_of(recommender, history, raw_ids), rel=1e-4, abs=1e-5
    )
    assert scores_of(recommender, history, raw_ids) == scores_of(known, history, raw_ids)  # others do not change
    # In a history, too, a new item is what its twin is.
    with_twin, with_new = ([history[0], ids[0]] for ids in (raw_ids, [raw_id for raw_id, _ in new]))
    assert scores_of(recommender, with_new, raw_ids) == pytest.approx(
        scores_of(recommender, with_twin, raw_ids), rel=1e-4, abs=1e-5
    )


def test_new_items_are_recommended_and_stand_in_histories(reading, data, untrained):
    recommender = Recommender.load(reading)
    new = dict(twins(data, [3, *untrained]))
    more = recommender.with_items(new)
    assert (len(more.names), len(recommender.names)) == (data.n_items + len(new), data.n_items)
    history = some_history(data)
    answer = more.recommend_one(history, len(more.names) - len(set(history)))
    assert set(new) <= {item.item_id for item in answer}
    assert {item.item_id: item.title for item in answer}.items() >= new.items()
    first = next(iter(new))
    masked = more.recommend_one([first, history[0]], 20)
    assert first not in {item.item_id for item in masked}
    assert masked != more.recommend_one([history[0]], 20)
    long = more.recommend_one([*history, first, *history], 5)  # longer than the student reads
    assert len(long) == 5
    again = more.with_items({"another": "Quite another title"})
    assert len(again.names) == len(more.names) + 1
    assert scores_of(again, history, list(new)) == scores_of(more, history, list(new))


def test_an_export_holds_new_items(reading, data, untrained, tmp_path):
    more = Recommender.load(reading, items=dict(twins(data, untrained)))
    module = BestItems(more.model, len(more.names), mask_seen=False)
    export_program(module, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    history, max_length = some_history(data), more.model.max_length
    history = [*history[:2], f"new-{data.items[untrained[0]]['raw_id']}"]
    ids = more.names.items(history)
    padded = torch.tensor([ids + [len(more.names)] * (max_length - len(ids))])
    scores, items = program(padded, torch.tensor([len(ids)]))
    expected = more.recommend_one(history, len(more.names), mask_seen=False)
    assert [more.names.raw_ids[i] for i in items[0]] == [item.item_id for item in expected]
    torch.testing.assert_close(scores[0], torch.tensor([item.score for item in expected]))


def test_an_index_grows_by_new_items_and_its_file_does_not(reading, data, untrained, tmp_path):
    pytest.importorskip("faiss", reason="Faiss is not installed (extra `serve`)")
    new = dict(twins(data, untrained))
    options = {"search": "hnsw", "index": tmp_path / "items.faiss"}
    more = Recommender.load(reading, items=new, **options)
    written = (tmp_path / "items.faiss").read_bytes()
    plain = Recommender.load(reading, **options)  # the same file serves without them
    assert (tmp_path / "items.faiss").read_bytes() == written
    assert len(plain.names) == data.n_items
    exact, history = Recommender.load(reading, items=new), some_history(data)
    assert more.recall([history], 10) > 0.9
    n_items = len(more.names)
    assert more.recommend_one(history, n_items, mask_seen=False) == exact.recommend_one(
        history, n_items, mask_seen=False
    )


def test_serving_needs_the_language_model_for_new_items_only(reading, encoder, data, tmp_path):
    copy = tmp_path / "student"
    shutil.copytree(reading / "student", copy)
    assert Recommender.load(copy).recommend_one(some_history(data))
    _, source = encoder
    elsewhere = tmp_path / "moved"
    shutil.copytree(source, elsewhere)
    reader = load_reader(copy)
    moved(copy, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"new items need the language model of training, 'tiny'.*`llm.path=FOLDER`"):
        Recommender.load(copy, items={"new": "A title"})
    found = Recommender.load(copy, items={"new": "A title"}, llm=str(elsewhere))
    expected = Recommender.load(reading, items={"new": "A title"})
    history = some_history(data)
    assert scores_of(found, history, ["new"]) == pytest.approx(scores_of(expected, history, ["new"]), rel=1e-5)
    assert reader.encoders[0]["name"] == "tiny"


def moved(student, source):
    """Record another place of the language model."""
    config = read_json(student / "config.json")
    config["reading"]["encoders"][0]["source"] = source
    write_json(student / "config.json", config)
    (student / "manifest.json").unlink()
    write_hashes(student)


def test_another_language_model_is_refused(reading, data, tmp_path):
    settings = TinyRandomSettings(name="tiny", pooling="mean", width=32, n_heads=2, seed=5)
    other = make_tiny_random(settings, tmp_path, data.titles)
    with pytest.raises(CheckpointError, match="is not the one that encoded the other texts"):
        Recommender.load(reading, items={"new": "A title"}, llm=EncoderSettings(str(other)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "One"), ("a", "Two")], "item id 'a' occurs before"),
        ([("", "One")], "expected an id"),
        ([("a", "")], "item 'a' has no title"),
    ],
)
def test_files_of_new_items_are_checked(reading, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        Recommender.load(reading, items=csv_of(tmp_path, rows))


def test_new_items_that_cannot_be_are_refused(reading, recommender, data, tmp_path):
    with pytest.raises(ConfigError, match="this student does not read texts: it knows items by their ids alone"):
        recommender.with_items({"new": "A title"})
    reader = Recommender.load(reading)
    known = data.items[4]["raw_id"]
    with pytest.raises(DataError, match=f"1 of 2 ids of `items` are items that the student knows, such as '{known}'"):
        reader.with_items({"new": "A title", known: "Another"})
    with pytest.raises(DataError, match=r"there is no column `item_id`.* the columns are item_id and title"):
        reader.with_items(csv_of(tmp_path, [("a", "One")], ("id", "title")))
    with pytest.raises(DataError, match=r"nothing\.csv"):
        reader.with_items(tmp_path / "nothing.csv")
    for new in ({" ": "A title"}, {"new": "  "}):
        with pytest.raises(DataError, match="`items` has an empty id or text"):
            reader.with_items(new)
    with pytest.raises(DataError, match="`items` is empty"):
        reader.with_items({})


def test_a_student_of_plain_vectors_has_no_reader(trained, reading):
    assert load_reader(trained / "student") is None
    reader = load_reader(reading / "student")
    assert set(reader.maps) == {"input_items"}
    assert reader.maps["input_items"].shape == (16, reader.preparation.width)
    with pytest.raises(CheckpointError, match="vectors of texts have 3 numbers, but those of training had 32"):
        reader.vectors(torch.ones(2, 3))


def test_damaged_readers_are_refused(reading, tmp_path):
    copy = tmp_path / "student"
    shutil.copytree(reading / "student", copy)
    config = json.loads((copy / "config.json").read_text())
    del config["reading"]["prepares"]
    write_json(copy / "config.json", config)
    (copy / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="of texts is damaged"):
        Recommender.load(copy)


@pytest.mark.slow
def test_the_command_takes_new_items(command, reading, data, untrained, tmp_path):
    new = twins(data, untrained)
    csv_of(tmp_path, new)
    expected = Recommender.load(reading, items=tmp_path / "new.csv").recommend_one([new[0][0]], 3)
    done = command(tmp_path, "recommend", f"run={reading}", "items=new.csv", f"history=[{new[0][0]}]", "k=3")
    assert [line.split()[2] for line in done.stdout.splitlines()[1:]] == [item.item_id for item in expected]
    assert done.stderr == ""
    refused = command(tmp_path, "recommend", f"run={reading}", "llm.path=x", "history=[a]", check=False)
    assert "`llm.path` is given, but nothing reads it while `items` is null" in refused.stderr
