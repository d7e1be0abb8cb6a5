"""HR@1 among candidates: equal to a plain loop, the same candidates for all runs, each run scored once."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import engine_in, random_rows
from evaluate_helpers import student_run

from llm2rec.config import MetricsConfig
from llm2rec.core.errors import CheckpointError, ConfigError, NonFiniteError
from llm2rec.core.files import write_json
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.statistics import bootstrap_interval
from llm2rec.evaluate.scoring import teachers
from llm2rec.evaluate.scoring.candidates import CANDIDATES_HR, rank_among, rank_among_candidates
from llm2rec.evaluate.scoring.scoring import Protocol, Scored, score_popularity, score_run
from llm2rec.evaluate.table import write_comparison
from llm2rec.student.datamodule import Rows
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.interfaces import ITeacherRecommender

PROTOCOL = Protocol(ks=(1, 5), mask_seen=False, n_candidates=7, candidates_seed=3)


def plain_hits(data, scores_of, n_candidates=7, seed=3):
    """Pick the best candidate of every test row, one after the other; ``scores_of`` gives all items' scores."""
    test = Rows.of(data, "test")
    sampler, hits = CandidateSampler(test, seed, n_candidates, split="test"), []
    for number, row in enumerate(data.splits["test"]):
        scores = scores_of(row["history"])
        others = [item for item in sampler.draw(np.array([number]))[0].tolist() if item != row["target"]]
        assert len(others) == n_candidates - 1
        hits.append(all(float(scores[item]) < float(scores[row["target"]]) for item in others))
    return np.array(hits, np.float64)


def assert_scored(scored, hits):
    assert 0 < hits.mean() < 1  # else any count would do
    assert scored.metrics[CANDIDATES_HR] == hits.mean()
    low, high = scored.intervals[CANDIDATES_HR]
    assert (low, high) == bootstrap_interval(hits)
    assert low < hits.mean() < high


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("max_length", [None, 2])
def test_a_student_is_scored_as_by_a_loop(tmp_path, data, max_length, mask_seen):
    """Also a student with a shorter history: its candidates still exclude the whole history."""
    folder, model = student_run(tmp_path, data, "result_20260101_000000", max_length=max_length)

    def scores_of(history):
        read = torch.tensor([history[-model.max_length :]])
        return model.score(model(read, torch.tensor([read.shape[1]])))[0].detach()

    protocol = Protocol((1, 5), mask_seen, 7, 3)
    scored = score_run(folder, data, engine_in(tmp_path / "e"), protocol, tmp_path)
    hits = plain_hits(data, scores_of)
    assert_scored(scored, hits)
    ranks = np.load(folder / "metrics" / "test_candidates_ranks.npy")
    assert np.array_equal(ranks == 0, hits)
    assert ranks.max() < 7


def test_popularity_is_scored_among_the_same_candidates(data):
    counts = np.zeros(data.n_items)
    for row in data.sequences:
        np.add.at(counts, row["items"][:-2], 1)  # leave-one-out: the last two validate and test
    hits = plain_hits(data, lambda history: counts)
    assert_scored(score_popularity(data, PROTOCOL), hits)
    assert score_popularity(data, Protocol((1, 5), True, 7, 3)).metrics[CANDIDATES_HR] == hits.mean()


class LastItemTeacher(ITeacherRecommender):
    """Predicts items near the last one, without experts; counts its forward passes."""

    tuner = None

    def __init__(self, n_items):
        self.n_items, self.n_calls = n_items, 0

    @property
    def item_vectors(self):
        raise NotImplementedError

    def best_items(self, history, lengths, k, gate_inputs=None):
        return self.log_probs(history, lengths).topk(k)

    def token_counts(self, history, lengths):
        return 1000 + 500 * lengths.astype(np.int64)  # so that batches are small and not in the order of rows

    def log_probs(self, history, lengths, keep=None):
        self.n_calls += 1
        last = history[np.arange(len(history)), lengths - 1].astype(np.int64)
        distance = (torch.arange(self.n_items) - torch.from_numpy(last).unsqueeze(1)) * 7 % self.n_items
        return (-distance.float() / 9).log_softmax(dim=1)


def test_a_teacher_is_scored_through_its_interface_in_batches_of_any_order(tmp_path, data, monkeypatch):
    teacher = LastItemTeacher(data.n_items)
    monkeypatch.setattr(teachers, "load_teacher", lambda folder, data, device: (teacher, None))
    ranks = torch.arange(len(data.splits["test"]))
    monkeypatch.setattr(teachers.FinishedItemTeacher, "ranks", lambda self, seen, k: ranks)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    folder = tmp_path / "result_20260101_000000"
    record = {"stage": "teacher", "status": "finished", "seed": 1, "label": "ilora", "parameters": 5}
    write_json(folder / "run.json", {**record, "dataset": dataset})
    scored = score_run(folder, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)
    assert teacher.n_calls > 60  # more than the timed requests: several batches
    lengths = np.array([1], np.int32)
    hits = plain_hits(data, lambda history: teacher.log_probs(np.array([history[-1:]], np.int32), lengths)[0])
    assert_scored(scored, hits)


def test_ranks_do_not_depend_on_the_number_of_processes():
    data = random_rows(11, 40, 5)
    sampler, scores = CandidateSampler(data, 0, split="test"), torch.rand(11, 40)
    costs = np.random.default_rng(0).integers(1, 9, size=11)

    def ranks(*blocks):
        parts = []
        for block in blocks:
            engine = SimpleNamespace(my_rows=lambda n, b=block: np.arange(n)[b], gather_rows=lambda mine, n: mine)
            parts.append(
                rank_among_candidates(
                    lambda rows: scores[rows], data.targets, sampler, engine, costs=costs, max_cost=16
                )
            )
        return torch.cat(parts).tolist()

    assert ranks(slice(0, 6), slice(6, 11)) == ranks(slice(0, 11)) == ranks(slice(0, 11), slice(11, 11))


def test_ties_count_against_the_model_and_nan_raises():
    candidates, targets = np.array([[4, 2, 0], [1, 3, 2]]), torch.tensor([2, 2])
    assert rank_among(torch.zeros(2, 5), candidates, targets).tolist() == [2, 2]
    scores = torch.tensor([[0.0, 9, 1, 9, 0.5], [3, 1, 2, 2, 9]])  # items 1 and 3 are no candidates of the first row
    assert rank_among(scores, candidates, targets).tolist() == [0, 1]
    with pytest.raises(NonFiniteError):
        rank_among(torch.full((2, 5), torch.nan), candidates, targets)


def test_adding_candidates_keeps_the_full_ranking_and_each_protocol_is_scored_once(tmp_path, data):
    folder, _ = student_run(tmp_path, data, "result_20260101_000000")
    engine, without = engine_in(tmp_path / "e"), Protocol(PROTOCOL.ks, PROTOCOL.mask_seen)
    plain = score_run(folder, data, engine, without, tmp_path)
    assert (CANDIDATES_HR in plain.metrics, plain.intervals) == (False, {})
    stored = (folder / "metrics" / "test.json").read_bytes()
    first = score_run(folder, data, engine, PROTOCOL, tmp_path)
    assert (folder / "metrics" / "test.json").read_bytes() == stored
    assert {name: first.metrics[name] for name in plain.metrics} == plain.metrics
    (folder / "student" / "model.safetensors").unlink()  # another scoring would need it
    assert score_run(folder, data, engine, PROTOCOL, tmp_path) == first
    assert score_run(folder, data, engine, without, tmp_path) == plain
    for other in (Protocol((1, 5), False, 8, 3), Protocol((1, 5), False, 7, 4)):
        with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
            score_run(folder, data, engine, other, tmp_path)


def test_a_catalogue_too_small_raises_before_any_run_is_scored(data):
    with pytest.raises(ConfigError, match=f"`n_candidates` is {data.n_items}, but a row may have only"):
        score_popularity(data, Protocol((1,), False, data.n_items))


@pytest.mark.parametrize("n_candidates", [-1, 1])
def test_an_invalid_number_of_candidates_raises(n_candidates):
    with pytest.raises(ConfigError, match=f"metrics.n_candidates is {n_candidates}, expected 0 for none, or at least"):
        MetricsConfig(n_candidates=n_candidates)


def test_the_comparison_shows_candidates_with_their_interval(tmp_path):
    metrics = ranking_metrics(torch.tensor([0, 3, 30]), (1,)) | {CANDIDATES_HR: 0.5}
    rows = [Scored("popularity", "", metrics, 7, None, intervals={CANDIDATES_HR: (0.25, 0.625)})]
    about = {"dataset": "toy", "n_items": 50, "rows": 3, "mask_seen": False, "n_candidates": 20, "candidates_seed": 9}
    line = write_comparison(tmp_path, rows, (1,), about).splitlines()[-1]
    assert line.split() == ["popularity", "33.33", "50.00", "25.00-62.50", "7"]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["rows_scored"][0]["intervals"] == {CANDIDATES_HR: [0.25, 0.625]}
    assert (written["n_candidates"], written["candidates_seed"]) == (20, 9)
