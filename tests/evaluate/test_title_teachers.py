"""Title teachers on the test split: scores equal plain loops over rows."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from evaluate_helpers import student_run, title_run

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, write_json
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.statistics import bootstrap_interval
from llm2rec.evaluate.scoring import teachers
from llm2rec.evaluate.scoring.candidates import CANDIDATES_HR, GENERATED_HR, GENERATED_HR_VALID, VALID_RATIO
from llm2rec.evaluate.scoring.scoring import Protocol, score_run
from llm2rec.evaluate.scoring.teachers import FinishedTitleTeacher, title_scores
from llm2rec.evaluate.table import write_comparison
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.title.matching import TitleMatches
from llm2rec.teacher.title.model import TitleRecommender

PROTOCOL = Protocol(ks=(1, 5), mask_seen=False, candidates_seed=3)


def rows_of(data, n_candidates):
    test = Rows.of(data, "test")
    drawn = CandidateSampler(test, 3, n_candidates, split="test").draw(np.arange(len(test)))
    for row, candidates in enumerate(drawn):
        history, length = test.histories(np.array([row]))
        yield history[:, : length[0]], length, candidates[None], int(test.targets[row])


def score(folder, data, tmp_path, protocol=PROTOCOL):
    return score_run(folder, data, engine_in(tmp_path / "e"), protocol, tmp_path / "gates")


@pytest.mark.parametrize("n_candidates", [0, 9])
def test_the_likeliest_candidate_is_found_row_by_row(tmp_path, data, n_candidates):
    """Among the teacher's own number of candidates, or the protocol's, which applies to every run."""
    folder, model = title_run(tmp_path, data, "result_1")
    scored = score(folder, data, tmp_path, Protocol((1, 5), False, n_candidates, 3))
    ranks = []
    for history, length, candidates, target in rows_of(data, n_candidates or 6):
        scores = model.candidate_log_probs(history, length, candidates)[0]
        ranks.append(int((scores >= scores[candidates[0].tolist().index(target)]).sum()) - 1)
    ranks, hits = torch.tensor(ranks), np.array(ranks) == 0
    assert scored.n_titles == (n_candidates or 6)
    for name, value in ranking_metrics(ranks, (1, 5)).items():
        assert scored.metrics[f"candidates_{name}"] == pytest.approx(value)
    assert scored.intervals[CANDIDATES_HR] == bootstrap_interval(hits.astype(float))
    stored = np.load(folder / "metrics" / "test_titles_ranks.npy")
    assert np.array_equal(stored[:, 0], ranks)
    assert stored.shape == (len(data.splits["test"]), 3)


def test_generated_titles_are_matched_over_all_rows_and_over_valid_ones(tmp_path, data, monkeypatch):
    """Replaces `generate` by titles that name the target, another candidate, two, or none, in turn."""
    folder, model = title_run(tmp_path, data, "result_1")
    asked = list(rows_of(data, 6))
    titles = model.prompts.decoded(model.prompts.answer_tokens())
    said = {}
    for row, (history, length, candidates, target) in enumerate(asked):
        other = next(item for item in candidates[0].tolist() if item != target)
        texts = [titles[target].upper(), f"  {titles[other]}", f"{titles[target]} {titles[other]}", "nothing known"]
        said[tuple(history[0, : length[0]]), tuple(candidates[0])] = texts[row % 4]
    monkeypatch.setattr(
        TitleRecommender,
        "generate",
        lambda self, history, lengths, candidates, gates: [
            said[tuple(own[:n]), tuple(shown)] for own, n, shown in zip(history, lengths, candidates, strict=True)
        ],
    )
    scored = score(folder, data, tmp_path)
    n_rows = len(asked)
    correct, valid = np.arange(n_rows) % 4 == 0, np.arange(n_rows) % 4 < 2
    assert scored.metrics[GENERATED_HR] == correct.mean()
    assert scored.metrics[GENERATED_HR_VALID] == correct.sum() / valid.sum()
    assert scored.metrics[VALID_RATIO] == valid.mean()
    assert scored.intervals[VALID_RATIO] == bootstrap_interval(valid.astype(float))
    assert scored.intervals[GENERATED_HR_VALID] == bootstrap_interval(
        correct.astype(float), weights=valid.astype(float)
    )
    stored = np.load(folder / "metrics" / "test_titles_ranks.npy")
    assert np.array_equal(stored[:, 1:], np.stack([valid, correct], axis=1))


def test_real_generated_titles_are_matched(tmp_path, data):
    folder, _ = title_run(tmp_path, data, "result_1")
    scored = score(folder, data, tmp_path)
    assert 0 <= scored.metrics[GENERATED_HR] <= scored.metrics[VALID_RATIO] <= 1
    folder, _ = title_run(tmp_path, data, "result_2", n_candidates=0)
    unlisted = score(folder, data, tmp_path)
    assert unlisted.n_titles == 20
    assert CANDIDATES_HR in unlisted.metrics
    assert VALID_RATIO not in unlisted.metrics  # no candidates are listed


@pytest.mark.parametrize("ranking", ["search", "grounding"])
@pytest.mark.parametrize(("mask_seen", "exclude_history"), [(False, True), (True, True), (True, False)])
def test_the_catalogue_is_ranked_as_row_by_row(tmp_path, data, ranking, mask_seen, exclude_history):
    # As many beams as items, so that nothing is cut off, whatever k.
    title = {"search": {"search_beams": data.n_items}, "grounding": {"ranking": "grounding"}}[ranking]
    folder, model = title_run(tmp_path, data, "result_1", title=title, exclude_history=exclude_history)
    scored = score(folder, data, tmp_path, Protocol((1, 5, 20), mask_seen, 0, 3))
    expected = []
    for number, (history, length, _, target) in enumerate(rows_of(data, 6)):
        row = data.splits["test"][number]
        seen = set(data.sequences[row["user_index"]]["items"][: row["position"]]) - {target} if mask_seen else set()
        items, _ = model.best_items(history, length, data.n_items - (len(set(history[0])) if exclude_history else 0))
        left = [item for item in items[0].tolist() if item not in seen][:20]
        expected.append(left.index(target) if target in left else data.n_items)
    assert np.array_equal(np.load(folder / "metrics" / "test_ranks.npy"), expected)
    assert 0 < scored.metrics["hr@20"] < 1
    metrics = ranking_metrics(torch.tensor(expected), (1, 5, 20))
    del metrics["mrr"]  # ranks beyond the best 20 are unknown
    assert {name: value for name, value in scored.metrics.items() if name in metrics} == pytest.approx(metrics)
    assert "mrr" not in scored.metrics
    assert scored.milliseconds > 0


def test_the_best_items_of_a_row_do_not_depend_on_its_batch(tmp_path, data, monkeypatch):
    """A row with only three items left gets three, and the other rows of its batch get k."""
    title = {"search_beams": data.n_items}
    folder, _ = title_run(tmp_path, data, "result_1", title=title, exclude_history=False)
    test, k, full = Rows.of(data, "test"), 20, 4
    left = (int(test.targets[full]) + np.arange(3)) % data.n_items
    had = np.setdiff1d(np.arange(data.n_items, dtype=np.int32), left)
    items, users, positions = (each[np.arange(len(each))].copy() for each in (test.items, test.users, test.positions))
    users[full], positions[full] = len(test.user_starts), len(had)
    starts = np.append(test.user_starts, len(items))
    items = np.concatenate([items, had])
    seen = SeenItems(replace(test, items=items, users=users, positions=positions, user_starts=starts))

    model = FinishedTitleTeacher(folder, data, engine_in(tmp_path / "e"), tmp_path / "gates")
    together = model._best(np.arange(9), k, seen, None)
    n_found = (together < data.n_items).sum(dim=1).tolist()
    assert n_found == [3 if row == full else k for row in range(9)]
    for row in range(9):
        assert torch.equal(model._best(np.array([row]), k, seen, None)[0], together[row])
    whole = model.ranks(seen, k)
    monkeypatch.setattr(teachers, "_BATCH_TOKENS", 1)  # one row a batch
    assert torch.equal(model.ranks(seen, k), whole)


def test_each_protocol_is_scored_once(tmp_path, data):
    folder, _ = title_run(tmp_path, data, "result_1")
    first = score(folder, data, tmp_path)
    (folder / "teacher" / "items.safetensors").unlink()  # a second scoring would need it
    assert score(folder, data, tmp_path) == first
    with pytest.raises(CheckpointError, match=r"lacks items\.safetensors"):
        score(folder, data, tmp_path, Protocol((1, 5), False, 7, 3))


def test_a_run_of_an_older_version_is_named_in_the_error(tmp_path, data):
    folder, _ = title_run(tmp_path, data, "result_7")
    recipe = read_json(folder / "teacher" / "config.json")
    del recipe["gate_input"]
    write_json(folder / "teacher" / "config.json", recipe)
    message = (
        r"^result_7 cannot be evaluated: .* was written by another version .*'gate_input'.* `runs=\[result/result_"
    )
    with pytest.raises(CheckpointError, match=message):
        score(folder, data, tmp_path)


def test_more_candidates_than_prompts_hold_are_refused(tmp_path, data):
    folder, _ = title_run(tmp_path, data, "result_1", max_tokens=200)
    score(folder, data, tmp_path)
    with pytest.raises(ConfigError, match=r"`llm.prompt.max_tokens` is 200, but a prompt may take"):
        score(folder, data, tmp_path, Protocol((1, 5), False, 49, 3))


def test_a_rate_without_valid_rows_has_no_interval():
    nothing = np.zeros(4, np.bool_)
    scores = title_scores(torch.tensor([0, 1, 0, 3]), TitleMatches(nothing, nothing), (5,))
    assert scores["metrics"][CANDIDATES_HR] == 0.5
    assert scores["metrics"][GENERATED_HR_VALID] == 0
    assert GENERATED_HR_VALID not in scores["intervals"]
    assert scores["intervals"][GENERATED_HR] == (0, 0)
    assert scores["metrics"]["candidates_ndcg@5"] == pytest.approx((2 + 1 / np.log2(3) + 1 / np.log2(5)) / 4)


def test_the_comparison_has_a_table_of_title_teachers(tmp_path, data):
    runs = tmp_path / "runs"
    teacher, student = (title_run(runs, data, "result_1")[0], student_run(runs, data, "result_2")[0])
    rows = [score(folder, data, tmp_path) for folder in (teacher, student)]
    about = {"dataset": "toy", "n_items": 60, "rows": 30, "mask_seen": False, "n_candidates": 0, "candidates_seed": 3}
    first, second = write_comparison(tmp_path, rows, (1, 5), about).split("\n\n")
    assert [line.split()[0] for line in first.splitlines()[3:]] == ["titles", "sasrec"]
    line = second.splitlines()[-1]
    assert line.split()[:4] == ["titles", "[1]", "6", f"{100 * rows[0].metrics[CANDIDATES_HR]:.2f}"]
    written = json.loads((tmp_path / "comparison.json").read_text())["rows_scored"]
    assert written[0]["metrics"] == rows[0].metrics
    assert written[0]["intervals"][GENERATED_HR] == list(rows[0].intervals[GENERATED_HR])
