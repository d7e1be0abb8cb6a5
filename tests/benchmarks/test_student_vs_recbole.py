"""What the comparison with RecBole stands on, without RecBole: its file, the check of rows, the headline."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import student_vs_recbole as bench

from llm2rec.core.files import read_json
from llm2rec.data import Toy, prepare

LENGTH = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    spec = Toy(n_users=20, n_items=30, n_volumes=3, n_worlds=2, min_length=3, max_length=7, history_length=LENGTH)
    return prepare(spec, tmp_path_factory.mktemp("data") / "processed")


def windows(sequence):
    """A user's rows as RecBole cuts them, one per position but the first: history, 0-padded, its length, target."""
    for position in range(1, len(sequence)):
        history = sequence[max(0, position - LENGTH) : position]
        yield history + [0] * (LENGTH - len(history)), len(history), sequence[position]


def test_the_file_holds_every_interaction_in_order(data, tmp_path):
    file = bench.write_atomic_file(data, tmp_path)
    assert file == tmp_path / "toy" / "toy.inter"
    header, *lines = file.read_text().splitlines()
    assert header.split("\t") == ["user_id:token", "item_id:token", "timestamp:float"]
    assert [[int(field) for field in line.split("\t")] for line in lines] == [
        [user + 1, item + 1, position]
        for user, items in enumerate(data.sequences["items"])
        for position, item in enumerate(items)
    ]


def test_our_rows_are_what_leave_one_out_gives_for_the_file(data, tmp_path):
    users = {}
    for line in bench.write_atomic_file(data, tmp_path).read_text().splitlines()[1:]:
        user, item, _ = map(int, line.split("\t"))
        users.setdefault(user, []).append(item)
    expected = {"train": [], "validation": [], "test": []}
    for user, sequence in users.items():
        *train, validation, test = windows(sequence)
        for name, rows in (("train", train), ("validation", [validation]), ("test", [test])):
            expected[name] += [(user, history, length, target) for history, length, target in rows]
    ours = bench.our_rows(data)
    assert any(length == LENGTH for *_, length, _ in expected["train"]), "some histories must be cut"
    for name, rows in expected.items():
        user, history, length, target = zip(*rows, strict=True)
        for column, values in (("users", user), ("history", history), ("lengths", length), ("targets", target)):
            np.testing.assert_array_equal(ours[f"{name}_{column}"], values)


@pytest.mark.parametrize("column", ["train_history", "validation_users", "test_targets", "train_lengths"])
def test_rows_that_differ_are_refused(data, column):
    ours = bench.our_rows(data)
    theirs = {name: values.copy() for name, values in ours.items()}
    bench.check_rows(ours, theirs)
    theirs[column][3] += 1
    with pytest.raises(SystemExit, match=f"RecBole's {column} differ from ours, first in row 3"):
        bench.check_rows(ours, theirs)
    with pytest.raises(SystemExit, match="have shape"):
        bench.check_rows(ours, {**ours, column: ours[column][:-1]})


def rounds(passes, evaluations):
    return [{"medians": {"pass_seconds": a, "evaluation_seconds": b}} for a, b in zip(passes, evaluations, strict=True)]


def trained(ndcg, best_epochs):
    return [{"test_metrics": {"ndcg@10": a}, "best_epoch": b} for a, b in zip(ndcg, best_epochs, strict=True)]


def test_the_headline_joins_seconds_and_quality():
    timing = {
        "recbole": rounds([8.0, 40.0, 9.0], [3.0, 6.0, 3.0]),
        "sequences": rounds([2.0, 4.0, 3.0], [1.0, 1.0, 1.0]),
        "windows": rounds([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    }
    quality = {"recbole": trained([0.1, 0.3], [10, 20]), "sequences": trained([0.3, 0.3], [4, 6])}
    assert bench.case_headline(timing, quality) == {
        ("sequences", "pass_speedup"): 4.0,  # of 4, 10 and 3
        ("sequences", "evaluation_speedup"): 3.0,
        ("sequences", "ndcg10_ours"): 0.3,
        ("sequences", "ndcg10_recbole"): 0.2,
        ("sequences", "epochs_to_best_ours"): 5,
        ("sequences", "epochs_to_best_recbole"): 15,
        ("sequences", "seconds_to_best_ours"): 5 * (3.0 + 1.0),
        ("sequences", "seconds_to_best_recbole"): 15 * (9.0 + 3.0),
        ("sequences", "time_to_best_speedup"): 9.0,
        ("windows", "pass_speedup"): 9.0,
        ("windows", "evaluation_speedup"): 3.0,
    }
    assert bench.case_headline({}, {}) == {}
    assert ("sequences", "time_to_best_speedup") not in bench.case_headline({}, quality)


@pytest.fixture
def comparison(data, tmp_path):
    """A case whose two sides are run by ``run``, given in place of their processes."""
    case = bench.case("toy sasrec", (), "sasrec", seeds=(1, 2), timed_epochs=2)
    options = types.SimpleNamespace(work=tmp_path, recbole_python=sys.executable, threads=1)
    return bench.Bench(case, options, data)


def test_what_has_been_trained_is_not_trained_again(comparison, monkeypatch):
    jobs = []

    def run(job, out):
        jobs.append((job["side"], job["seed"]))
        history = [{"ndcg@10": 0.1}] * 3
        return {"history": history, "best_epoch": 2, "test_ranks": [0, 1, 50], "n_items": 30}

    monkeypatch.setattr(comparison, "run", run)
    assert comparison.quality(train=False) == {}
    found = comparison.quality(train=True)
    assert jobs == [(side, seed) for side in ("recbole", "sequences", "windows") for seed in (1, 2)]
    assert comparison.quality(train=False) == comparison.quality(train=True) == found
    assert len(jobs) == 6
    assert found["recbole"][1]["test_metrics"]["hr@1"] == pytest.approx(1 / 3)
    assert (found["sequences"][0]["epochs"], found["sequences"][0]["best_epoch"]) == (3, 2)


def test_sides_take_turns(comparison, monkeypatch):
    sides = []

    def run(job, out):
        sides.append(job["side"])
        timed = dict.fromkeys((*bench.MEASURED, "pass_processor_seconds"), float(len(sides)))
        return {"history": [timed, timed]}

    monkeypatch.setattr(comparison, "run", run)
    timing = comparison.timing(3)
    recbole, ours, other = comparison.sides
    assert sides == [recbole, ours, other, ours, other, recbole, other, recbole, ours]
    assert [each["pass_seconds"] for each in timing["recbole"]] == [[1.0, 1.0], [6.0, 6.0], [8.0, 8.0]]


@pytest.mark.slow
def test_our_side_gives_what_the_stage_gives(tmp_path):
    overrides = ("dataset=toy", "dataset.n_users=60", "dataset.n_items=60", f"dataset.history_length={LENGTH}")
    case = bench.case("toy gru4rec", overrides, "gru4rec", seeds=(), timed_epochs=3)
    data = bench.prepared(overrides, tmp_path)
    options = types.SimpleNamespace(work=tmp_path, recbole_python=sys.executable, threads=1)
    comparison = bench.Bench(case, options, data)
    result = comparison.run(comparison.job("sequences", 1, 3, 3), tmp_path / "out")
    (run,) = (tmp_path / "out" / "result").iterdir()
    validation = read_json(run / "metrics" / "validation.json")
    assert [each["ndcg@10"] for each in result["history"]] == [each["val/ndcg@10"] for each in validation["history"]]
    assert validation["history"][result["best_epoch"] - 1]["step"] == validation["best_step"]
    seconds = sum(each[name] for each in result["history"] for name in bench.MEASURED)
    assert 0 < seconds <= read_json(run / "metrics" / "time.json")["train"]
    # RecBole ranks the items of a history too, and so does our side.
    students = [f"runs=[{run}]", "metrics.mask_seen=false", f"paths.processed_dir={tmp_path / 'processed'}", *overrides]
    launch = [sys.executable, "-m", "llm2rec.evaluate", *students]
    subprocess.run(launch, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(bench.ROOT)}, check=True)
    np.testing.assert_array_equal(np.load(run / "metrics" / "test_ranks.npy"), result["test_ranks"])
