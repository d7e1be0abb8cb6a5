"""Students go to the Hub and come back by their id, over HTTP to a stand-in on localhost."""

import json
import logging
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN
from huggingface_hub import ModelCard
from share_helpers import RAW_IDS

import llm2rec
from llm2rec.core.errors import CheckpointError, HubError
from llm2rec.core.files import check_hashes, read_json
from llm2rec.core.hub import is_hub_id
from llm2rec.student.models import GRU4Rec, SASRec, SequentialRecommender, build_model
from llm2rec.student.reading import TextReader, load_reader
from llm2rec.student.store import load_item_table, save_student

HISTORY = RAW_IDS[:3]


def weights_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_pushed_student_answers_by_its_id_as_it_did_in_its_run(hub, make_run):
    run = make_run()
    address = llm2rec.push(run, "ann/shop-sasrec")
    assert address.startswith(f"{hub.url}/ann/shop-sasrec/commit/")
    fetched = llm2rec.Recommender.load("ann/shop-sasrec")
    assert fetched.recommend_one(HISTORY) == llm2rec.Recommender.load(run).recommend_one(HISTORY)
    own = llm2rec.load_student(run / "student")
    assert weights_equal(llm2rec.load_student("ann/shop-sasrec"), own)
    assert weights_equal(SASRec.from_pretrained("ann/shop-sasrec"), own)
    assert isinstance(llm2rec.SequentialRecommender.from_pretrained(run), SASRec)


def test_what_is_pushed_is_the_model_and_a_card_that_knows_its_id(hub, make_run):
    run = make_run()
    llm2rec.push(run / "student", "ann/shop-sasrec")
    files = hub.files("ann/shop-sasrec")
    assert files.keys() == {"README.md", "config.json", "items.arrow", "manifest.json", "model.safetensors"}
    assert hub.repos["ann/shop-sasrec"]["private"] is True
    assert b'Recommender.load("ann/shop-sasrec")' in files["README.md"]
    assert '"FOLDER"' in (run / "student" / "README.md").read_text()  # ours stays as it is
    data = ModelCard(files["README.md"].decode()).data
    assert (data.library_name, data.base_model) == ("llm2rec", None)
    assert {"recommendation", "sasrec"} <= set(data.tags)
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("hr@10", 0.512346),
        ("ndcg@10", 0.25),
    ]
    assert data.eval_results[0].dataset_name == "shop"
    check_hashes(run / "student")


def test_a_reading_student_is_pushed_without_the_place_of_its_language_model(hub, make_run, tmp_path):
    run, mine = make_run(), tmp_path / "secret place" / "minilm"
    mine.mkdir(parents=True)
    arguments = read_json(run / "student" / "config.json")["arguments"]
    encoders = [{"name": "minilm", "source": str(mine)}, {"source": "org/other"}]
    reader = TextReader({"input_items": torch.ones(8, 3)}, None, encoders)
    items = load_item_table(run / "student")
    save_student(run / "student", build_model("sasrec", **arguments), "sasrec", arguments, items, reader=reader)
    llm2rec.push(run, "ann/shop-reader")
    files = hub.files("ann/shop-reader")
    pushed = json.loads(files["config.json"])["reading"]["encoders"]
    assert [each["source"] for each in pushed] == ["minilm", "org/other"]
    assert not any(b"secret place" in content for content in files.values())
    assert llm2rec.Recommender.load("ann/shop-reader").recommend_one(HISTORY)
    assert load_reader(run / "student").encoders[0]["source"] == str(mine)  # ours stays as it is


def test_a_public_repository_is_asked_for(hub, make_run):
    llm2rec.push(make_run(), "ann/open", private=False)
    assert hub.repos["ann/open"]["private"] is False


def test_a_revision_is_the_one_asked_for(hub, make_run):
    first, second = make_run(), make_run("result_20260101_000001", seed=2)
    llm2rec.push(first, "ann/shop-sasrec")
    llm2rec.push(second, "ann/shop-sasrec")
    sha = hub.repos["ann/shop-sasrec"]["commits"][0][0]
    assert weights_equal(SASRec.from_pretrained("ann/shop-sasrec", revision=sha), SASRec.from_pretrained(first))
    assert weights_equal(SASRec.from_pretrained("ann/shop-sasrec"), SASRec.from_pretrained(second))
    answers = llm2rec.Recommender.load("ann/shop-sasrec", revision=sha).recommend_one(HISTORY)
    assert answers == llm2rec.Recommender.load(first).recommend_one(HISTORY)


def test_it_is_fetched_once_and_read_without_network_afterwards(hub, make_run, believe_in):
    run = make_run()
    llm2rec.push(run, "ann/shop-sasrec")
    llm2rec.load_student("ann/shop-sasrec")
    before = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(before) == 5
    llm2rec.load_student("ann/shop-sasrec")
    assert [path for method, path in hub.requests if method == "GET" and "/resolve/" in path] == before
    believe_in("http://127.0.0.1:9")  # nobody listens there
    assert weights_equal(llm2rec.load_student("ann/shop-sasrec"), llm2rec.load_student(run))


def test_a_card_that_somebody_edited_is_kept(hub, make_run):
    run = make_run()
    card = run / "student" / "README.md"
    card.write_text(card.read_text().replace("## Limitations", "Mine.\n\n## Limitations"))
    llm2rec.push(run, "ann/shop-sasrec")
    assert b"Mine." in hub.files("ann/shop-sasrec")["README.md"]


def test_the_token_is_nowhere_but_in_requests(hub, make_run, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    llm2rec.push(make_run(), "ann/shop-sasrec")
    llm2rec.load_student("ann/shop-sasrec")
    with pytest.raises(HubError) as error:
        llm2rec.push(make_run(), "bob/not-mine")
    assert TOKEN not in caplog.text + str(error.value)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert not [name for name, content in hub.files("ann/shop-sasrec").items() if TOKEN.encode() in content]


def test_a_secret_or_a_home_that_got_into_the_card_stays_here(hub, make_run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    run = make_run()
    card = run / "student" / "README.md"
    card.write_text(card.read_text() + f"\nSee /home/ann/notes, {TOKEN}.\n")
    llm2rec.push(run, "ann/shop-sasrec")
    assert b"See ~/notes, ***." in hub.files("ann/shop-sasrec")["README.md"]


class Planted:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def archive(file):
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("archive/data.pkl", pickle.dumps(Planted()))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("extra.pkl", lambda file: file.write_bytes(b"anything")),
        ("pytorch_model.bin", archive),
        ("notes.txt", lambda file: file.write_bytes(pickle.dumps(Planted()))),
        ("vocab.json", archive),
        ("more.safetensors", lambda file: file.write_bytes(pickle.dumps(Planted()))),
        ("without_an_end", lambda file: file.write_bytes(pickle.dumps(Planted(), protocol=4))),
    ],
)
def test_a_folder_with_a_pickle_is_refused_whatever_it_is_called(hub, make_run, name, write):
    run = make_run()
    write(run / "student" / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        llm2rec.push(run, "ann/shop-sasrec")
    assert not hub.repos


def test_other_files_are_left_out_and_named(hub, make_run, caplog):
    run = make_run()
    (run / "student" / "plot.png").write_bytes(b"\x89PNG")
    (run / "student" / ".hidden.json").write_text("{}")
    llm2rec.push(run, "ann/shop-sasrec")
    assert "plot.png" in caplog.text
    assert not {"plot.png", ".hidden.json"} & hub.files("ann/shop-sasrec").keys()


def test_a_pickle_on_the_hub_stays_there(hub, make_run, tmp_path):
    llm2rec.push(make_run(), "ann/shop-sasrec")
    hub.add("ann/shop-sasrec", {"evil.pkl": pickle.dumps(Planted()), "code.py": b"raise SystemExit"})
    llm2rec.load_student("ann/shop-sasrec")
    fetched = {path.name for path in (tmp_path / "hub_cache").rglob("*")}
    assert "model.safetensors" in fetched
    assert not {"evil.pkl", "code.py"} & fetched


def test_a_file_that_changed_on_the_hub_is_found(hub, make_run):
    llm2rec.push(make_run(), "ann/shop-sasrec")
    config = json.loads(hub.files("ann/shop-sasrec")["config.json"])
    hub.add("ann/shop-sasrec", {"config.json": json.dumps(config | {"model": "gru4rec"}).encode()})
    with pytest.raises(CheckpointError, match=r"config\.json has changed since it was written"):
        llm2rec.load_student("ann/shop-sasrec")


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_missing_and_private_ids_have_a_remedy(hub, make_run, believe_in):
    with pytest.raises(
        HubError, match=r"cannot download 'ann/nothing': the Hub knows no such id, and there is no folder"
    ):
        llm2rec.Recommender.load("ann/nothing")
    llm2rec.push(make_run(), "ann/secret")
    believe_in(hub.url, token=None)
    with pytest.raises(HubError, match=r"log in if it is private \(`hf auth login`, or HF_TOKEN\)"):
        llm2rec.Recommender.load("ann/secret")
    with pytest.raises(HubError, match="'ann/new' needs a login"):
        llm2rec.push(make_run(), "ann/new")


def test_a_token_that_may_not_and_one_that_is_wrong_are_refused(hub, make_run, believe_in):
    with pytest.raises(HubError, match=r"cannot upload to 'bob/shop' \(.*403.*\)"):
        llm2rec.push(make_run(), "bob/shop")
    believe_in(hub.url, token="hf_anotherToken99")
    with pytest.raises(HubError, match=r"cannot upload to 'ann/shop' \(.*401.*\)"):
        llm2rec.push(make_run(), "ann/shop")


def test_missing_network_and_revision_are_reported(hub, make_run, believe_in):
    llm2rec.push(make_run(), "ann/shop-sasrec")
    with pytest.raises(HubError, match="`revision` does not exist"):
        llm2rec.load_student("ann/shop-sasrec", revision="v9")
    believe_in("http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot download 'ann/other' \(.*\); connect to the network"):
        llm2rec.load_student("ann/other")
    with pytest.raises(HubError, match=r"cannot upload to 'ann/shop' \(.*\); connect to the network"):
        llm2rec.push(make_run(), "ann/shop")


def test_what_is_no_finished_model_is_refused_before_anything_is_sent(hub, make_run, tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        llm2rec.push(tmp_path / "nothing", "ann/shop")
    with pytest.raises(CheckpointError, match="is a running run of stage 'student'"):
        llm2rec.push(make_run(status="running"), "ann/shop")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(CheckpointError, match="is that of no student and no teacher"):
        llm2rec.push(tmp_path / "other", "ann/shop")
    changed = make_run()
    (changed / "student" / "items.arrow").write_bytes(b"ARROW1")
    with pytest.raises(CheckpointError, match=r"items\.arrow has changed"):
        llm2rec.push(changed, "ann/shop")
    with pytest.raises(HubError, match=r"`base_model` is 'org/llm', but .* holds a student"):
        llm2rec.push(make_run(), "ann/shop", base_model="org/llm")
    for repo in ("shop", "ann/shop/more", "../shop", "ann/"):
        with pytest.raises(HubError, match="expected an id on the Hub such as 'user/name'"):
            llm2rec.push(make_run(), repo)
    assert not hub.requests


def test_a_student_of_another_kind_is_refused(make_run):
    with pytest.raises(CheckpointError, match=r"is a SASRec, expected a GRU4Rec; use `SASRec\.from_pretrained`"):
        GRU4Rec.from_pretrained(make_run())
    assert isinstance(SequentialRecommender.from_pretrained(make_run()), SASRec)


def test_only_what_cannot_lie_here_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_hub_id("ann/shop-sasrec")
    for place in (
        "result/result_20260101_000000",
        "elsewhere/result_20260101_000000",
        "result_20260101_000000/3",
        "mine/teacher",
        "./ann/shop",
        "/ann/shop",
        "ann",
        "ann/shop/student",
        Path("ann/shop"),
    ):
        assert not is_hub_id(place)
    with pytest.raises(HubError, match="`revision` is 'v1', but 'result/x' is a local folder"):
        llm2rec.load_student("result/x", revision="v1")
