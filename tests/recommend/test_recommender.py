"""A student that its command has trained answers in ids and titles, from its folder alone."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from llm2rec.core.errors import CheckpointError, ConfigError, DataError, UnknownItemError
from llm2rec.core.files import read_json, write_json
from llm2rec.recommend import Recommendation, Recommender
from llm2rec.recommend.names import ItemNames
from llm2rec.recommend.search import HnswSearch
from llm2rec.student.models import build_model, load_student
from llm2rec.student.store import load_item_table, save_student


def histories_of(data):
    """Each user's whole sequence in raw ids; all are longer than what the model reads."""
    raw_ids = data.items["raw_id"][:]
    return [[raw_ids[item] for item in row["items"]] for row in data.sequences]


def plain_answer(data, model, items, k, mask_seen=True):
    """Score every item for one user and sort."""
    read = torch.tensor([items[-model.max_length :]])
    scores = model.score(model(read, torch.tensor([read.shape[1]])))[0].tolist()
    left = [item for item in range(data.n_items) if not (mask_seen and item in items)]
    best = sorted(left, key=lambda item: -scores[item])[:k]
    return [(data.items[item]["raw_id"], data.items[item]["title"], scores[item]) for item in best]


def assert_answer(answer, expected):
    assert [(item.item_id, item.title) for item in answer] == [(raw_id, title) for raw_id, title, _ in expected]
    assert [item.score for item in answer] == pytest.approx([score for *_, score in expected], abs=1e-5)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_answers_are_what_scoring_every_item_gives(trained, recommender, data, mask_seen):
    model, histories = load_student(trained / "student"), histories_of(data)
    assert model.max_length == 5 < min(map(len, histories))
    answers = recommender.recommend(histories, 7, mask_seen=mask_seen)
    for row, answer in zip(data.sequences, answers, strict=True):
        assert_answer(answer, plain_answer(data, model, row["items"], 7, mask_seen))
    assert len({item.item_id for answer in answers for item in answer}) > 20  # not the same for everybody


@pytest.mark.parametrize(("recorded", "masks"), [(True, True), (False, False), (None, True)])
def test_the_past_is_left_out_by_default_as_in_validation(trained, data, tmp_path, recorded, masks):
    model, config = load_student(trained / "student"), read_json(trained / "student" / "config.json")
    about = (config["model"], config["arguments"], load_item_table(trained / "student"))
    save_student(tmp_path / "student", model, *about, mask_seen=recorded)
    history = histories_of(data)[0]
    loaded = Recommender.load(tmp_path / "student")
    assert loaded.recommend_one(history, 20) == loaded.recommend_one(history, 20, mask_seen=masks)
    assert loaded.recommend_one(history, 20) != loaded.recommend_one(history, 20, mask_seen=not masks)
    assert config["mask_seen"] is True  # what the stage has recorded on data without repeats


def test_a_record_of_masking_that_is_no_truth_value_is_refused(trained, tmp_path):
    shutil.copytree(trained / "student", tmp_path / "student")
    write_json(tmp_path / "student" / "config.json", read_json(tmp_path / "student" / "config.json") | {"mask_seen": 1})
    with pytest.raises(CheckpointError):
        Recommender.load(tmp_path / "student")


def test_one_history_is_answered_as_among_many_and_by_title_as_by_id(recommender, data):
    histories = histories_of(data)
    titles = dict(zip(data.items["raw_id"][:], data.items["title"][:], strict=True))
    together = recommender.recommend(histories[:9], 4)
    for history, expected in zip(histories, together, strict=False):
        for answer in (
            recommender.recommend_one(history, 4),
            recommender.recommend_one([titles[raw_id] for raw_id in history], 4, by="title"),
        ):
            assert_answer(answer, [(item.item_id, item.title, item.score) for item in expected])
    assert recommender.recommend([]) == []


def test_histories_of_any_length_share_a_batch(recommender, data):
    history = histories_of(data)[0]
    parts = [history[-length:] for length in (1, 3, 2, 8, 5)]
    for part, answer in zip(parts, recommender.recommend(parts, 5), strict=True):
        assert_answer(answer, [(item.item_id, item.title, item.score) for item in recommender.recommend_one(part, 5)])


def test_more_histories_than_a_batch_holds(recommender, data):
    histories = histories_of(data)[:3] * 200
    answers = recommender.recommend(histories, 3)
    assert len(answers) == 600
    assert [item.item_id for item in answers[599]] == [item.item_id for item in answers[2]]


def test_a_history_of_everything_but_two_items_leaves_two(recommender, data):
    raw_ids = data.items["raw_id"][:]
    answer = recommender.recommend_one(raw_ids[2:], 10)
    assert {item.item_id for item in answer} == set(raw_ids[:2])


def test_the_folder_alone_is_enough(trained, recommender, data, tmp_path):
    for name in ("run.json", "student"):
        source = trained / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    history = histories_of(data)[0]
    assert Recommender.load(str(tmp_path)).recommend_one(history) == recommender.recommend_one(history)


# ---- what cannot be answered -----------------------------------------------------------------------------------------


def test_unknown_ids_are_refused_or_dropped(recommender, data):
    history = histories_of(data)[0]
    with pytest.raises(UnknownItemError, match=r"^the model knows no item with id 'nix', which was not in the"):
        recommender.recommend_one([*history, "nix"])
    with pytest.raises(UnknownItemError, match=r"^history 1: the model knows no item with id 'nix'"):
        recommender.recommend([history, ["nix"]])
    kept = recommender.recommend_one(["nix", *history, "nix"], unknown="drop")
    assert kept == recommender.recommend_one(history)
    with pytest.raises(DataError, match=r"knows none of the 2 items of the history, such as 'nax'"):
        recommender.recommend_one(["nix", "nax"], unknown="drop")


def test_unknown_titles_come_with_those_most_like_them(recommender, data):
    title = data.items["title"][7]
    with pytest.raises(UnknownItemError) as told:
        recommender.recommend_one([title.upper() + "!"], by="title")
    assert repr(title) in str(told.value)
    with pytest.raises(UnknownItemError, match="no item has the title 'qqqqqqqq'"):
        recommender.recommend_one(["qqqqqqqq"], by="title")


def test_mixed_up_ids_and_titles_are_reported(recommender, data):
    row = data.items[3]
    with pytest.raises(UnknownItemError, match="`by=title`"):
        recommender.recommend_one([row["title"]])
    with pytest.raises(UnknownItemError, match="`by=id`"):
        recommender.recommend_one([row["raw_id"]], by="title")


def test_a_title_of_several_items_is_refused_even_where_unknown_ones_are_dropped():
    names = ItemNames(pa.table({"raw_id": ["a", "b", "c"], "title": ["It", "Heat", "It"]}))
    assert names.items(["Heat"], by="title") == [1]
    with pytest.raises(UnknownItemError, match="2 items have the title 'It': 'a', 'c'"):
        names.items(["Heat", "It"], by="title", unknown="drop")


def test_in_large_catalogues_titles_of_a_similar_length_are_compared(monkeypatch):
    monkeypatch.setattr("llm2rec.recommend.names._COMPARED", 3)
    titles = ["Alien", "Alien 3", "The Alien Who Came From Far Away", "Aliens", "Up"]
    names = ItemNames(pa.table({"raw_id": list("abcde"), "title": titles}))
    with pytest.raises(UnknownItemError, match="did you mean 'Aliens' or 'Alien 3' or 'Alien'"):
        names.items(["aliens "], by="title")


@pytest.mark.parametrize(
    ("histories", "options", "error", "message"),
    [
        ([[]], {}, DataError, "the history is empty; give at least one item"),
        ([["t00001"], []], {}, DataError, "history 1: the history is empty"),
        ([[7]], {}, DataError, r"a history is a list of ids, each a string; got \[7\]"),
        (["t00001"], {}, DataError, "for one, `recommend_one`"),
        ("t00001", {}, DataError, "for one, `recommend_one`"),
        ([["t00001"]], {"k": 0}, ConfigError, "`k` is 0, expected 1 to the 120 items"),
        ([["t00001"]], {"k": 121}, ConfigError, "`k` is 121"),
        ([["t00001"]], {"k": 3.0}, ConfigError, "`k` is 3.0, .* a whole number"),
        ([["t00001"]], {"k": True}, ConfigError, "`k` is True, .* a whole number"),
        (None, {}, DataError, "for one, `recommend_one`; got NoneType"),
        ([None], {}, DataError, "a history is a list of ids, each a string; got NoneType"),
        ([{"t00001": 1}], {}, DataError, "a history is a list of ids, each a string; got dict"),
        ([{"t00001"}], {}, DataError, "a history is a list of ids, each a string; got set"),
        ([np.array([1, 2])], {}, DataError, "a history is a list of ids, each a string; got "),
        ([np.array([["t00001"]])], {}, DataError, "a history is a list of ids, each a string; got ndarray"),
        ([pd.Series(["t00001", None])], {}, DataError, "each a string; got "),
        (pd.DataFrame({"id": ["t00001"]}), {}, DataError, "for one, `recommend_one`; got DataFrame"),
        ([["t00001"]], {"by": "name"}, ConfigError, "`by` is 'name', expected one of id, title"),
        ([["t00001"]], {"unknown": "ignore"}, ConfigError, "`unknown` is 'ignore', expected one of error, drop"),
    ],
)
def test_questions_without_sense_are_refused(recommender, histories, options, error, message):
    with pytest.raises(error, match=message):
        recommender.recommend(histories, **options)


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, lambda ids: pd.Series(ids, index=range(len(ids), 0, -1))])
def test_arrays_and_series_are_histories_too(recommender, data, kind):
    history = histories_of(data)[0]
    expected = recommender.recommend_one(history, 3)
    assert recommender.recommend_one(kind(history), np.int64(3)) == expected
    assert recommender.recommend(kind([kind(history[-4:])]), 3) == recommender.recommend([history[-4:]], 3)


def copied(trained, folder, **changes):
    shutil.copytree(trained / "student", folder / "student")
    write_json(folder / "run.json", {**read_json(trained / "run.json"), **changes})
    return folder


def test_folders_that_cannot_answer_are_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        Recommender.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a running run of stage 'student'"):
        Recommender.load(copied(trained, tmp_path / "a", status="running"))
    with pytest.raises(CheckpointError, match="is a finished run of stage 'teacher'"):
        Recommender.load(copied(trained, tmp_path / "b", stage="teacher"))
    old = copied(trained, tmp_path / "c")
    (old / "student" / "items.arrow").unlink()
    with pytest.raises(CheckpointError, match=r"lacks items.arrow.*earlier versions.*train the student again"):
        Recommender.load(old)
    for name in ("items.arrow", "model.safetensors"):
        damaged = copied(trained, tmp_path / f"damaged {name}")
        whole = (damaged / "student" / name).read_bytes()
        (damaged / "student" / name).write_bytes(whole[:100])
        with pytest.raises(CheckpointError, match=r"(cannot be read|has changed) .*copy"):
            Recommender.load(damaged)
    with pytest.raises(ConfigError, match="`search` is 'fast', expected one of exact, hnsw"):
        Recommender.load(trained, search="fast")
    with pytest.raises(ConfigError, match="search=hnsw"):
        Recommender.load(trained, index=tmp_path / "i")


def test_names_of_another_catalogue_are_refused(recommender):
    model = build_model("sasrec", n_items=3, width=4)
    with pytest.raises(CheckpointError, match=r"3 items, .* 120"):
        Recommender(model.eval(), recommender.names)


# ---- an index --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(trained, tmp_path_factory):
    pytest.importorskip("faiss", reason="Faiss is not installed (extra `serve`)")
    file = tmp_path_factory.mktemp("index") / "items.faiss"
    return Recommender.load(trained, search="hnsw", index=file), file


def test_an_index_finds_what_an_exact_search_finds_here(recommender, indexed, data):
    found, _ = indexed
    histories = histories_of(data)
    assert found.recall(histories, 10) > 0.95
    assert recommender.recall(histories, 10) == 1
    exact = {item.item_id: item.score for item in recommender.recommend_one(histories[0], 120)}
    answer = found.recommend_one(histories[0], 5)
    assert len(answer) == 5
    assert not {item.item_id for item in answer} & set(histories[0])
    assert {item.item_id: item.score for item in answer}.items() <= exact.items()  # the very same scores


def test_recall_is_the_share_that_is_found(recommender, data):
    class HalfBlind:
        """Finds the even items only."""

        def top_k(self, users, k, seen):
            odd = torch.arange(1, data.n_items, 2)
            rows = torch.arange(len(users)).repeat_interleave(len(odd))
            more = torch.cat([seen[0], rows]), torch.cat([seen[1], odd.repeat(len(users))])
            return recommender._search.top_k(users, k, more)

    histories, raw_ids = histories_of(data), data.items["raw_id"][:]
    even = set(raw_ids[::2])
    best = [item.item_id for answer in recommender.recommend(histories, 6) for item in answer]
    expected = np.mean([raw_id in even for raw_id in best])
    assert 0 < expected < 1
    assert Recommender(recommender.model, recommender.names, HalfBlind()).recall(histories, 6) == expected


def test_building_an_index_shows_its_progress(recommender, progress_lines):
    pytest.importorskip("faiss", reason="Faiss is not installed (extra `serve`)")
    HnswSearch.build(recommender._search._catalogue)
    assert progress_lines()["build index"].startswith("120 of 120 items, ")


def test_an_index_is_kept_and_only_its_own_model_takes_it(indexed, trained, data, tmp_path):
    found, file = indexed
    written = file.stat().st_mtime_ns
    again = Recommender.load(trained, search="hnsw", index=file)
    assert file.stat().st_mtime_ns == written
    history = histories_of(data)[0]
    assert again.recommend_one(history) == found.recommend_one(history)
    other = copied(trained, tmp_path / "other")
    config = read_json(trained / "student" / "config.json")
    model = build_model(config["model"], **config["arguments"])
    save_student(other / "student", model, config["model"], config["arguments"], load_item_table(trained / "student"))
    with pytest.raises(CheckpointError, match="are not those of this model's 120 items"):
        Recommender.load(other, search="hnsw", index=file)
    (tmp_path / "broken").write_text("no index")
    with pytest.raises(CheckpointError, match="is not an index that Faiss can read"):
        Recommender.load(trained, search="hnsw", index=tmp_path / "broken")


def test_an_index_gives_all_that_is_left_where_that_is_little(indexed, data):
    raw_ids = data.items["raw_id"][:]
    answer = indexed[0].recommend_one(raw_ids[2:], 10)
    assert {item.item_id for item in answer} == set(raw_ids[:2])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_answers_one_history_with_a_table(command, trained, recommender, data, tmp_path):
    history = histories_of(data)[0]
    done = command(tmp_path, "recommend", f"run={trained}", f"history=[{','.join(history)}]", "k=3")
    header, *lines = done.stdout.splitlines()
    assert header.split() == ["score", "id", "title"]
    for place, (line, item) in enumerate(zip(lines, recommender.recommend_one(history, 3), strict=True), start=1):
        assert line.split(maxsplit=3) == [str(place), f"{item.score:.4f}", item.item_id, item.title]
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # a question leaves nothing behind


@pytest.mark.slow
def test_the_command_answers_a_file_line_by_line(command, trained, recommender, data, tmp_path):
    histories = histories_of(data)[:3]
    questions = [histories[0], {"user": "ü", "history": histories[1]}, {"history": histories[2]}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(question) for question in questions) + "\n\n")
    told = command(tmp_path, "recommend", f"run={trained}", "histories=in.jsonl", "k=2")
    command(tmp_path, "recommend", f"run={trained}", "histories=in.jsonl", "output=out.jsonl", "k=2")
    assert (tmp_path / "out.jsonl").read_text() == told.stdout
    answers = [json.loads(line) for line in told.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [
        {"history", "recommendations"},
        {"user", "history", "recommendations"},
        {"history", "recommendations"},
    ]
    assert answers[1]["user"] == "ü"
    for answer, expected in zip(answers, recommender.recommend(histories, 2), strict=True):
        assert_answer(
            [Recommendation(**item) for item in answer["recommendations"]],
            [(item.item_id, item.title, item.score) for item in expected],
        )


@pytest.mark.slow
def test_the_command_tells_what_is_wrong_in_one_line(command, trained, tmp_path):
    (tmp_path / "in.jsonl").write_text('["t00001"]\n\n{"history": []}\n')
    for overrides, message in (
        ([f"run={trained}", "histories=in.jsonl", "output=out.jsonl"], "in.jsonl, line 3: the history is empty"),
        ([f"run={trained}"], "nothing is given, expected one of"),
    ):
        done = command(tmp_path, "recommend", *overrides, check=False)
        assert done.returncode == 1
        assert len([line for line in done.stderr.splitlines() if message in line]) == 1
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()
