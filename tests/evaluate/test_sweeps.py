"""Jobs of a sweep as a table with one row per combination of options."""

import json
from statistics import mean, stdev

import pytest
from evaluate_helpers import student_run

from llm2rec.core.errors import CheckpointError
from llm2rec.core.run import is_sweep, jobs_of
from llm2rec.evaluate.scoring.scoring import Scored
from llm2rec.evaluate.sweeps import combine, format_sweep, write_sweep


@pytest.fixture
def sweep(tmp_path, data):
    """Two options by three seeds, in Hydra's order; of the second option one job failed late, one early."""
    folder = tmp_path / "result_20260101_000000"
    for number in range(12):
        option, seed = ["bce", "dros"][number // 6], [1, 2, 3][number % 3]
        width = [8, 16][number // 3 % 2]
        overrides = ["dataset=toy", f"seed={seed}", f"student.loss.name={option}", f"student.model.width={width}"]
        status = "running" if number == 7 else "finished"
        student_run(folder, data, str(number), seed=seed, overrides=overrides, status=status)
    (folder / "10" / "run.json").unlink()
    (folder / "multirun.yaml").write_text("")
    return folder


def scores(jobs):
    """Metrics that identify the job."""
    return {
        job.folder: Scored("sasrec", job.folder.name, {"hr@1": 0.01 * n, "ndcg@5": 0.2}, 5, 1.0, n % 3 + 1)
        for n, job in enumerate(jobs)
    }


def test_jobs_are_found_in_their_order(sweep, tmp_path, data):
    assert is_sweep(sweep)
    assert not is_sweep(student_run(tmp_path, data, "result_20260101_000001")[0])
    assert not is_sweep(tmp_path)
    jobs = jobs_of(sweep)
    assert [job.folder.name for job in jobs] == [str(n) for n in range(12)]
    assert [n for n, job in enumerate(jobs) if not job.is_finished] == [7, 10]
    assert jobs[4].options == {"dataset": "toy", "student.loss.name": "bce", "student.model.width": "16"}


def test_seeds_are_combined_and_shared_options_left_out(sweep):
    jobs = jobs_of(sweep)
    gathered = combine(jobs, scores(jobs))
    options = [("bce", "8"), ("bce", "16"), ("dros", "8"), ("dros", "16")]
    assert [tuple(each.options.values()) for each in gathered] == options
    assert [each.seeds for each in gathered] == [[1, 2, 3], [1, 2, 3], [1, 3], [1, 3]]
    assert gathered[2].runs == [f"{sweep.name}/6", f"{sweep.name}/8"]
    values = [0.06, 0.08]
    assert gathered[2].metrics["hr@1"] == {"mean": mean(values), "std": stdev(values), "values": values}
    assert gathered[0].metrics["ndcg@5"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0), "values": [0.2] * 3}


def test_different_models_are_never_one_row(sweep):
    jobs = jobs_of(sweep)[:2]
    scored = {job.folder: Scored(f"model {n}", "", {"hr@1": 0.5}, 5, 1.0, n) for n, job in enumerate(jobs)}
    gathered = combine(jobs, scored)
    assert [each.label for each in gathered] == ["model 0", "model 1"]
    assert gathered[0].metrics["hr@1"]["std"] is None


def test_the_table_has_mean_spread_and_unfinished_jobs(sweep, tmp_path):
    jobs = jobs_of(sweep)
    text = write_sweep(tmp_path, jobs, scores(jobs), (1, 5), {"dataset": "toy", "mask_seen": True})
    assert (tmp_path / "sweep.txt").read_text() == text
    (line,) = (line for line in text.splitlines() if "name=dros student.model.width=8" in line)
    assert line.split()[-7:] == ["2", "7.00", "±", "1.41", "20.00", "±", "0.00"]
    assert f"not finished and not in the table: {sweep.name}/7, {sweep.name}/10" in text
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert (written["dataset"], written["not_finished"]) == ("toy", [f"{sweep.name}/7", f"{sweep.name}/10"])
    assert written["combinations"][0]["metrics"]["hr@1"]["values"] == [0.0, 0.01, 0.02]
    single = format_sweep(combine(jobs[:1], scores(jobs)), (1,))
    assert "±" not in single


def test_a_sweep_without_a_finished_job_raises(sweep):
    for file in sweep.glob("*/run.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no job of the sweep .* is finished; see log.txt of its 12 jobs"):
        jobs_of(sweep)
