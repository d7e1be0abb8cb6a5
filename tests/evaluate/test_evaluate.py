"""Comparison of finished runs: which runs are found or rejected, their scores, and the tables."""

import json

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from evaluate_helpers import student_run
from PIL import Image

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import write_json
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.run import latest_runs
from llm2rec.data import CsvTables, Toy, prepare
from llm2rec.evaluate.__main__ import _each_once, _folders
from llm2rec.evaluate.labels import differences, labels_of, unlike
from llm2rec.evaluate.scoring.scoring import (
    WITH_A_MODEL,
    Protocol,
    Scored,
    popularity,
    popularity_ranks,
    score_popularity,
    score_run,
)
from llm2rec.evaluate.scoring.slices import Slice, slice_metrics, slices
from llm2rec.evaluate.table import format_table, write_comparison

PROTOCOL = Protocol(ks=(1, 5, 10), mask_seen=False)


def plain_ranks(model, data, mask_seen):
    """Rank every test target, user by user, as one would by hand."""
    ranks = []
    for row in data.splits["test"]:
        history = torch.tensor([row["history"]])
        scores = model.score(model(history, torch.tensor([history.shape[1]])))[0].detach()
        seen = set(data.sequences[row["user_index"]]["items"][: row["position"]]) if mask_seen else set()
        own = scores[row["target"]]
        ranks.append(sum(bool(scores[i] >= own) for i in range(data.n_items) if i != row["target"] and i not in seen))
    return torch.tensor(ranks)


@pytest.mark.parametrize("mask_seen", [False, True])
def test_scores_equal_ranking_every_user_by_hand(tmp_path, data, mask_seen):
    folder, model = student_run(tmp_path, data, "result_20260101_000000")
    scored = score_run(folder, data, engine_in(tmp_path / "e"), Protocol((1, 5, 10), mask_seen), tmp_path)
    expected = plain_ranks(model, data, mask_seen)
    assert scored.metrics == pytest.approx(ranking_metrics(expected, (1, 5, 10)))
    assert np.array_equal(np.load(folder / "metrics" / "test_ranks.npy"), expected.numpy())
    assert scored.milliseconds > 0


def test_the_test_split_is_scored_once_per_protocol(tmp_path, data):
    folder, _ = student_run(tmp_path, data, "result_20260101_000000")
    engine = engine_in(tmp_path / "e")
    first = score_run(folder, data, engine, PROTOCOL, tmp_path)
    (folder / "student" / "model.safetensors").unlink()  # a second scoring would need it
    assert score_run(folder, data, engine, PROTOCOL, tmp_path) == first
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        score_run(folder, data, engine, Protocol(PROTOCOL.ks, mask_seen=True), tmp_path)


def test_a_cut_off_beyond_the_catalogue_counts_every_row(tmp_path, data):
    folder, _ = student_run(tmp_path, data, "result_20260101_000000")
    scored = score_run(folder, data, engine_in(tmp_path / "e"), Protocol((data.n_items + 5,), False), tmp_path)
    assert scored.metrics[f"hr@{data.n_items + 5}"] == 1


def test_popularity_counts_all_training_interactions(data):
    counts = np.zeros(data.n_items)
    for row in data.sequences:
        np.add.at(counts, row["items"][:-2], 1)  # leave-one-out: the last two validate and test
    targets = data.splits["test"]["target"][:]
    ranks = torch.tensor([(counts >= counts[target]).sum() - 1 for target in targets])
    assert score_popularity(data, PROTOCOL).metrics == ranking_metrics(ranks, PROTOCOL.ks)
    unseen = []
    for row in data.splits["test"]:
        seen = {*data.sequences[row["user_index"]]["items"][: row["position"]], row["target"]}
        unseen.append(sum(counts[i] >= counts[row["target"]] for i in range(data.n_items) if i not in seen))
    masked = score_popularity(data, Protocol(PROTOCOL.ks, mask_seen=True))
    assert masked.metrics == ranking_metrics(torch.tensor(unseen), PROTOCOL.ks)


def test_targets_that_are_new_to_their_user_are_a_slice_where_others_repeat(tmp_path):
    rng = np.random.default_rng(1)
    visits = [f"u{user},i{item},{time}" for user in range(20) for time, item in enumerate(rng.integers(12, size=9))]
    files = {name: str(tmp_path / f"{name}.csv") for name in ("interactions", "items")}
    titles = [f"i{item},Title {item}" for item in range(12)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *visits, ""]))
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *titles, ""]))
    data = prepare(CsvTables(**files, history_length=3), tmp_path / "processed")
    for split in ("validation", "test"):
        new = [
            number
            for number, row in enumerate(data.splits[split])
            if row["target"] not in data.sequences[row["user_index"]]["items"][: row["position"]]
        ]
        assert 0 < len(new) < 20
        assert {part.name: part.rows.tolist() for part in slices(data, split)}["new"] == new


def test_slices_are_those_of_plain_loops(data, tmp_path):
    shown = {item for row in data.splits["train"] for item in (*row["history"], row["target"])}
    rows = [number for number, row in enumerate(data.splits["test"]) if row["target"] not in shown]
    assert {part.name: part.rows.tolist() for part in slices(data)} == ({"untrained": rows} if rows else {})
    ordered = prepare(Toy(n_users=40, n_items=60, n_worlds=5, ties="item"), tmp_path)
    codes, halves = ordered.items["raw_id"][:], {"ascending": [], "descending": []}
    for number, row in enumerate(ordered.splits["test"]):
        halves["ascending" if codes[row["target"]] > codes[row["history"][-1]] else "descending"].append(number)
    parts = {part.name: part for part in slices(ordered)}
    assert {name: parts[name].rows.tolist() for name in halves} == halves
    scored = score_popularity(ordered, PROTOCOL)
    ranks = popularity_ranks(ordered, popularity(ordered), mask_seen=False)
    assert scored.slices == slice_metrics(ranks, list(parts.values()), PROTOCOL.ks)
    shares = [len(each) / len(ranks) for each in halves.values()]
    of_halves = [scored.slices[name]["hr@10"] for name in halves]
    assert np.dot(shares, of_halves) == pytest.approx(scored.metrics["hr@10"])


def test_latest_is_the_newest_finished_run_of_each_label_and_seed(tmp_path, data):
    student_run(tmp_path, data, "result_20260101_000000")
    newer, _ = student_run(tmp_path, data, "result_20260102_000000")
    other_seed, _ = student_run(tmp_path, data, "result_20260101_000001", seed=2)
    of_multirun, _ = student_run(tmp_path, data, "result_20260101_000002/0", seed=3)
    student_run(tmp_path, data, "result_20260103_000000", status="running")
    student_run(tmp_path, data, "result_20260103_000001", dataset={"name": "x", "fingerprint": "other"})
    student_run(tmp_path, data, "result_20260103_000002", stage="evaluate")
    (tmp_path / "result_20260104_000000").mkdir()
    assert latest_runs(tmp_path, data.fingerprint, WITH_A_MODEL) == [other_seed, of_multirun, newer]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "running"}, "is a running run of stage 'student'"),
        ({"stage": "data"}, "is a finished run of stage 'data'"),
        ({"dataset": {"name": "games", "fingerprint": "0" * 64}}, "was trained on dataset 'games'"),
    ],
)
def test_runs_that_cannot_be_compared_raise(tmp_path, data, changes, message):
    folder, _ = student_run(tmp_path, data, "result_20260101_000000", **changes)
    with pytest.raises(CheckpointError, match=message):
        score_run(folder, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)


def test_a_folder_without_run_and_a_student_of_another_shape_raise(tmp_path, data):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        score_run(tmp_path, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)
    folder, _ = student_run(tmp_path, data, "result_20260101_000000")
    config = json.loads((folder / "student" / "config.json").read_text())
    config["arguments"]["n_blocks"] = 5
    write_json(folder / "student" / "config.json", config)
    with pytest.raises(CheckpointError, match=r"config\.json has changed since it was written"):
        score_run(folder, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)
    (folder / "student" / "manifest.json").unlink()  # as in earlier versions
    with pytest.raises(CheckpointError, match="do not match a sasrec"):
        score_run(folder, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)


def test_what_to_evaluate(tmp_path, data):
    folder, _ = student_run(tmp_path / "result", data, "result_20260101_000000")
    result = tmp_path / "result"
    assert _folders("latest", tmp_path, result, data.fingerprint) == [folder]
    assert _folders(["result/result_20260101_000000"], tmp_path, result, data.fingerprint) == [folder]
    with pytest.raises(ConfigError, match="no finished run on this dataset"):
        _folders("latest", tmp_path, result, "another")
    with pytest.raises(ConfigError, match="expected `latest` or a list"):
        _folders("newest", tmp_path, result, data.fingerprint)
    assert _each_once([folder, tmp_path]) == [folder, tmp_path]
    with pytest.raises(ConfigError, match=r"names .*result_20260101_000000 twice, and would count it as two seeds"):
        _each_once([folder, tmp_path / "result" / ".." / "result" / folder.name])


def test_the_comparison_is_a_table_a_json_file_and_a_chart(tmp_path):
    metrics = ranking_metrics(torch.tensor([0, 3, 30]), (1, 5))
    rows = [Scored("popularity", "", metrics, 7, None), Scored("sasrec", "result_x", metrics, 12345, 0.25, 3)]
    about = {"dataset": "toy", "fingerprint": "f", "n_items": 50, "rows": 3, "mask_seen": False, "n_candidates": 0}
    table = write_comparison(tmp_path, rows, (1, 5), about)
    assert table == (tmp_path / "comparison.txt").read_text()
    header, _, first, second = format_table(rows, (1, 5)).splitlines()
    assert header.split() == ["run", "HR@1", "HR@5", "NDCG@5", "MRR@5", "parameters", "ms/user"]
    assert first.split()[:3] == ["popularity", "33.33", "66.67"]
    assert second.split() == ["sasrec", "[3]", "33.33", "66.67", "47.69", "41.67", "12,345", "0.25"]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows_scored"][1]["metrics"] == metrics
    assert "full ranking of 50 items, items in the user's past included" in table
    masked = write_comparison(tmp_path, rows, (1, 5), about | {"mask_seen": True, "unlike": ["Runs a and b differ."]})
    assert "full ranking of 50 items except items in the user's past" in masked
    assert masked.endswith("\n\nRuns a and b differ.\n")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # bars and text, not a blank page


def test_runs_of_another_masking_are_named(tmp_path):
    def run(name, of_run=None, **files):
        write_json(tmp_path / name / "run.json", {"stage": "student", "status": "finished"} | (of_run or {}))
        for file, content in files.items():
            write_json(tmp_path / name / file.replace("_", "/") / "config.json", content)
        return tmp_path / name

    masked, kept = run("masked", {"mask_seen": True}), run("kept", {"mask_seen": False})
    earlier = run("earlier", **{".": {"metrics": {"mask_seen": False}}})
    unknown = run("unknown", **{".": {"metrics": {"mask_seen": None}}})
    teacher = run("teacher", {"mask_seen": False}, teacher={"exclude_history": True})
    (sentence,) = unlike([masked, kept, earlier, unknown, teacher], True)
    assert sentence.startswith("Validation of kept, earlier, teacher kept the items of a user's past")
    first, second = unlike([masked, kept, earlier, unknown, teacher], False)
    assert first.startswith("Validation of masked left out the items of a user's past, which this evaluation keeps")
    assert second.startswith("The teachers of teacher leave out the history that they read")
    assert unlike([masked], True) == unlike([kept, unknown], False) == []


def test_a_slice_has_a_table(tmp_path):
    ranks, part = torch.tensor([0, 3, 30, 1]), Slice("untrained", "targets of some kind", "A note.", np.array([1, 3]))
    metrics = ranking_metrics(ranks, (1, 5))
    row = Scored("sasrec", "r", metrics, 1, None, 3, slices=slice_metrics(ranks, [part], (1, 5)))
    expected = ranking_metrics(ranks[part.rows], (1, 5)).items()
    assert row.slices == {"untrained": {name: value for name, value in expected if not name.startswith("mrr")}}
    about = {"dataset": "toy", "n_items": 50, "rows": 4, "mask_seen": False, "n_candidates": 0}
    assert "targets of" not in write_comparison(tmp_path, [Scored("x", "r", metrics, 1, None)], (1, 5), about)
    about["slices"] = {part.name: {"title": part.title, "rows": 2}}
    table = write_comparison(tmp_path, [row], (1, 5), about)
    title, header, _, line = table.splitlines()[-4:]
    assert title == "targets of some kind, 2 rows (50.0 %)"
    assert header.split() == ["run", "HR@1", "HR@5", "NDCG@5"]
    assert line.split() == ["sasrec", "[3]", "0.00", "100.00", "53.08"]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows_scored"][0]["slices"] == row.slices


def test_labels_show_what_differs(tmp_path):
    def run(name, label, **student):
        write_json(tmp_path / name / "run.json", {"stage": "student", "status": "finished", "label": label})
        settings = {"name": label, "loss": {"kind": "softmax"}, "training": {"batch_size": 8, "micro_batch_size": 8}}
        write_json(tmp_path / name / "config.json", {"seed": 1, "metrics": {}, "student": settings | student})
        return tmp_path / name

    runs = [
        run("a", "sasrec"),
        run("b", "sasrec", training={"batch_size": 9, "micro_batch_size": 4}),
        run("c", "sasrec", training={"batch_size": 9, "micro_batch_size": 8}, loss={"kind": "bpr", "negatives": None}),
        run("d", "gru4rec"),
        run("e", "gru4rec", training={"batch_size": 8, "micro_batch_size": 1}),
    ]
    assert labels_of(runs) == [
        "sasrec (kind=softmax, batch_size=8)",
        "sasrec (kind=softmax, batch_size=9)",
        "sasrec (kind=bpr, batch_size=9)",
        "gru4rec",
        "gru4rec",
    ]
    assert labels_of(runs[:2]) == ["sasrec (batch_size=8)", "sasrec (batch_size=9)"]


def test_keys_in_labels_are_as_long_as_they_must_be():
    first, second = {"a.rate": 1, "b.rate": 2, "on": True}, {"a.rate": 3, "b.rate": 4, "on": None}
    assert differences([first, second]) == [["a.rate=1", "b.rate=2", "on=true"], ["a.rate=3", "b.rate=4", "on=null"]]
