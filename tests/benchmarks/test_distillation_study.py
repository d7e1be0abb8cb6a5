"""The study of distillation: equal budgets, what is made of its runs, and a whole study in small."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import distillation_study
import numpy as np
import pytest
import study_earlier
import study_field
import study_findings
import study_plan
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from llm2rec.config import register
from llm2rec.core.files import sha256_of_file, write_json
from llm2rec.core.statistics import row_values
from llm2rec.data import Toy, prepare
from llm2rec.stage import build
from llm2rec.student.settings import StudentSettings

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "distillation_study.py"


def test_configurations_are_drawn_once_and_begin_with_the_first_of_everything():
    space = ([{"a": 1}, {"a": 2}, {"a": 3}], [{"b": 1, "c": 1}, {"b": 2}])
    drawn = study_plan.draw(space, 4, "x")
    assert drawn[0] == {"a": 1, "b": 1, "c": 1}
    assert drawn == study_plan.draw(space, 4, "x")
    assert len({json.dumps(each) for each in drawn}) == 4
    assert drawn != study_plan.draw(space, 4, "y")
    assert len(study_plan.draw(space, 100, "x")) == 6
    assert sorted(each["b"] for each in drawn) == [1, 1, 2, 2], "each choice as often as others"
    assert {each["a"] for each in drawn} == {1, 2, 3}


@pytest.mark.parametrize("arm", [arm for arm in study_plan.ARMS if arm.parent is None], ids=lambda arm: arm.name)
def test_every_arm_gets_as_many_tries_and_knows_every_option(arm):
    budget = study_plan.Budget()
    first = arm.name == study_plan.BASELINE
    tries = study_plan.draw(arm.space, budget.tries if first else budget.more_tries, arm.name)
    assert len(tries) == (6 if first else 4)
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        known = compose("config", overrides=["student=sasrec", "distill=dllm2rec"])
    for config in tries:
        whole = {"student.loss.name": "cross_entropy", **arm.fixed, **config}
        for name in study_plan.fitting(whole):
            assert OmegaConf.select(known, name, default="?", throw_on_missing=False) != "?", name


def test_the_baseline_goes_on_around_its_best():
    best = study_plan.draw(study_plan.BASELINE_SPACE, 6, "x")[3]
    around = study_plan.draw(study_plan.further(best), 5, "y")
    assert {**best, **around[0]}.items() >= best.items(), "the first is the best itself, which has been tried"
    configs = [json.dumps({**best, **each}, sort_keys=True) for each in around]
    assert len(set(configs)) == 5
    assert all(0 < each["student.model.dropout"] < 1 for each in around)


@pytest.mark.parametrize("change", [each for changes in study_plan.PILOTS.values() for each in changes], ids=str)
def test_a_pilot_is_a_configuration_of_the_student(change):
    best = {"n_negatives": 1024, "proposal": "popularity", "name": "sampled_softmax"}
    config = {**{f"student.loss.{name}": value for name, value in best.items()}, **change}
    overrides = [*study_plan.STUDENTS["sasrec"], *(f"{name}={value}" for name, value in config.items())]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        student = build(compose("config", overrides=[*overrides, f"paths.root={ROOT}"]).student, StudentSettings)
    assert student.loss.name == config["student.loss.name"]


@pytest.mark.parametrize(("loss", "over"), [("cross_entropy", "catalogue"), ("sampled_softmax", "sampled")])
def test_a_listwise_student_normalises_as_its_own_loss_does(loss, over):
    config = {"student.loss.name": loss, **study_plan.LISTWISE}
    assert study_plan.fitting(config) == {**config, "distill.ranking.over": over}
    assert study_plan.fitting({"student.loss.name": loss}) == {"student.loss.name": loss}


def test_variations_stand_on_arms_that_are_searched():
    searched = {arm.name for arm in study_plan.ARMS if arm.parent is None}
    assert searched >= {arm.parent for arm in study_plan.ARMS if arm.parent}
    assert searched >= {*study_plan.LLM_ARMS, study_plan.BASELINE}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Three arms of two seeds on the toy data: the second is better on the first half of the rows."""
    folder = tmp_path_factory.mktemp("scored")
    spec = Toy(n_users=40, n_items=30, n_volumes=3, n_worlds=2, min_length=4, max_length=9)
    data = prepare(spec, folder / "processed")
    generator = np.random.default_rng(0)
    ranks = generator.integers(0, 30, (2, 40))
    better = np.where(np.arange(40) < 20, ranks // 4, ranks)
    runs = {}
    for name, found in {"baseline": ranks, "collaborative": better, "hybrid": ranks}.items():
        runs[name] = {seed: f"{name}_{seed}" for seed in (1, 2)}
        for seed, each in zip((1, 2), found, strict=True):
            metrics = folder / "result" / f"{name}_{seed}" / "metrics"
            metrics.mkdir(parents=True)
            np.save(metrics / "test_ranks.npy", each)
            write_json(metrics / "test.json", {})
    return study_findings.Findings(folder, data.folder, (1, 2)), runs, ranks, better


def test_arms_are_compared_row_by_row(scored):
    findings, runs, ranks, better = scored
    result, rows = findings.test(runs, {"text": {0: "hybrid_1"}}, study_earlier.Known())
    mean = {name: np.mean([row_values(each, "ndcg@20") for each in found]) for name, found in
            {"baseline": ranks, "collaborative": better}.items()}  # fmt: skip
    assert result["metrics"]["collaborative"]["ndcg@20"]["mean"] == pytest.approx(mean["collaborative"])
    gain = result["gains"]["collaborative"]
    assert gain["relative"] == pytest.approx(mean["collaborative"] / mean["baseline"] - 1)
    assert gain["low"] < gain["mean"] < gain["high"]
    assert gain["p"] < 0.01
    assert result["gains"]["hybrid"]["p"] == 1
    assert result["gains"]["hybrid"]["mean"] == 0
    assert "baseline" not in result["gains"]
    assert rows["collaborative"].mean() == pytest.approx(mean["collaborative"])
    assert result["teachers"]["text"]["hr@20"]["mean"] == pytest.approx((ranks[0] < 20).mean())
    for groups in result["groups"].values():
        rows = [group["rows"] for group in groups]
        assert sum(rows) == 40
        parts = [group["gains"]["collaborative"]["mean"] for group in groups]
        assert np.average(parts, weights=rows) == pytest.approx(gain["mean"])
        assert np.average([group["baseline"] for group in groups], weights=rows) == pytest.approx(mean["baseline"])


def test_a_gain_has_what_seeds_add_to_its_interval(scored):
    findings, runs, ranks, better = scored
    gain = findings.test(runs, {}, study_earlier.Known())[0]["gains"]["collaborative"]
    taught, alone = ([row_values(each, "ndcg@20").mean() for each in found] for found in (better, ranks))
    error = np.hypot(np.diff(taught)[0], np.diff(alone)[0]) / 2  # of two values each: half their difference
    assert gain["seeds_error"] == pytest.approx(error / np.mean(alone))
    low, high = gain["relative_low"], gain["relative_high"]
    below = gain["relative"] - gain["ratio_low"]
    assert gain["relative"] - low == pytest.approx(np.sqrt(below**2 + (1.96 * gain["seeds_error"]) ** 2))
    assert low < gain["ratio_low"] < gain["ratio_high"] < high
    once = {"baseline": {1: "baseline_1"}, "collaborative": {1: "collaborative_1"}}
    single = study_findings.Findings(findings.folder, findings.prepared, (1,)).test(once, {}, study_earlier.Known())
    assert "seeds_error" not in single[0]["gains"]["collaborative"]
    more = {**runs, "baseline": {**runs["baseline"], 3: "collaborative_1"}}
    result = findings.test(more, {}, study_earlier.Known())[0]
    assert len(result["metrics"]["baseline"]["ndcg@20"]["runs"]) == 3, "further seeds count too"


def test_variations_are_compared_with_what_they_vary_and_make_no_claim_dearer(scored):
    findings, runs, *_ = scored
    varied = {"collaborative, neighbours only": runs["baseline"], "collaborative, ensemble only": runs["collaborative"]}
    result, _ = findings.test({**runs, **varied}, {}, study_earlier.Known())
    alone, _ = findings.test(runs, {}, study_earlier.Known())
    assert result["gains"] == alone["gains"]
    assert alone["variations"] == {}
    lost, nothing = (result["variations"][name] for name in varied)
    gain = result["gains"]["collaborative"]
    assert lost["mean"] == pytest.approx(-gain["mean"])
    assert lost["p_holm"] == 2 * lost["p"]
    assert (nothing["mean"], nothing["p"]) == (0, 1)
    orphans, _ = findings.test({**runs, "dllm2rec with margin": runs["hybrid"]}, {}, study_earlier.Known())
    assert orphans["variations"] == {}, "nothing to compare it with"
    stands, _ = findings.test(runs, {}, study_earlier.Known(test=result))
    assert stands["variations"] == result["variations"], "as their rows are not at hand"
    assert "over collaborative" in "\n".join(study_findings.test_table(result))


def test_arms_that_lack_a_seed_are_left_out_and_nothing_is_tested_without_a_baseline(scored):
    findings, runs, *_ = scored
    lacking = {**runs, "hybrid": {1: "hybrid_1"}, "collaborative": {**runs["collaborative"], 2: "not_scored"}}
    result, rows = findings.test(lacking, {}, study_earlier.Known())
    assert result["metrics"].keys() == rows.keys() == {"baseline"}
    others = {name: each for name, each in runs.items() if name != "baseline"}
    assert findings.test(others, {}, study_earlier.Known())[0] == {}


def test_an_earlier_result_counts_as_if_it_had_been_run_here(scored, tmp_path):
    findings, runs, *_ = scored
    whole, rows = findings.test(runs, {"text": {0: "hybrid_1"}}, study_earlier.Known())
    former = {name: runs[name] for name in ("baseline", "hybrid")}
    test, former_rows = findings.test(former, {"text": {0: "hybrid_1"}}, study_earlier.Known())
    tried = {"config": {"a": 1}, "seconds": {}, "validation": {"ndcg@20": 0.1}}
    section = {"tries": {"baseline": [tried]}, "chosen": {}, "validation": {}, "test": test}
    write_json(tmp_path / "x.json", {"samples": {"toy": {"sasrec": section}}, "command": "c", "commit": {}})
    study_earlier.write_rows(
        tmp_path / "x.json", {study_earlier.row_name("toy", "sasrec", name): each for name, each in former_rows.items()}
    )

    earlier = study_earlier.Earlier(tmp_path / "x.json")
    result = earlier.of("toy", "sasrec")
    assert result.tried("baseline", {"a": 1}) == tried
    assert result.tried("baseline", {"a": 2}) is None
    assert earlier.of("toy", "gru4rec") == study_earlier.Known()
    again, again_rows = findings.test({"collaborative": runs["collaborative"]}, {}, result)
    assert again.keys() == whole.keys()
    assert again_rows.keys() == rows.keys()
    for part in ("metrics", "teachers"):
        assert json.dumps(again[part], sort_keys=True) == json.dumps(whole[part], sort_keys=True)
    for name, gain in whole["gains"].items():  # float32 rows
        assert again["gains"][name] == pytest.approx(gain, rel=1e-5)
    for of, groups in whole["groups"].items():
        for one, other in zip(groups, again["groups"][of], strict=True):
            assert other["gains"].keys() == one["gains"].keys()
            assert other["baseline"] == pytest.approx(one["baseline"], rel=1e-5)


def test_gains_whose_rows_are_not_at_hand_stand_and_are_corrected_with_the_new_ones(scored):
    findings, runs, *_ = scored
    former, _ = findings.test({name: runs[name] for name in ("baseline", "collaborative")}, {}, study_earlier.Known())
    now = {name: runs[name] for name in ("baseline", "hybrid")}
    result, rows = findings.test(now, {}, study_earlier.Known(test=former))
    assert rows.keys() == {"baseline", "hybrid"}
    assert result["gains"]["collaborative"]["p_holm"] == 2 * former["gains"]["collaborative"]["p"]
    assert all(group["gains"].keys() == {"collaborative", "hybrid"} for group in result["groups"]["length"])


def test_results_of_another_configuration_are_dropped(scored):
    findings, runs, *_ = scored
    varied = {**runs, "collaborative, ensemble only": runs["baseline"]}
    test, rows = findings.test(varied, {"text": {0: "hybrid_1"}}, study_earlier.Known())
    validation = {name: {"1": 0.1} for name in rows}
    result = study_earlier.Known(validation=validation, test=test, rows=rows)
    assert result.without(set()) is result
    changed = result.without({"collaborative"})
    assert changed.rows.keys() == changed.validation.keys() == changed.test["metrics"].keys() == {"baseline", "hybrid"}
    assert changed.test["gains"].keys() == {"hybrid"}
    assert changed.test["variations"] == {}
    again, _ = findings.test({}, {}, changed)
    assert again["gains"].keys() == {"hybrid"}
    assert again["teachers"] == test["teachers"]
    assert all(group["gains"].keys() == {"hybrid"} for group in again["groups"]["length"])
    moved = result.without({"baseline"})
    assert moved.test["gains"] == {}
    assert moved.test["variations"].keys() == {"collaborative, ensemble only"}, "which are not compared with it"
    now, _ = findings.test({"baseline": runs["collaborative"]}, {}, moved)
    assert now["gains"]["collaborative"]["mean"] == pytest.approx(0, abs=1e-8), "its rows, beside the new baseline's"
    assert now["gains"]["hybrid"]["mean"] < 0
    assert study_earlier.Known().without({"baseline"}) == study_earlier.Known()


def test_the_headline_is_of_the_arm_that_validates_best(scored):
    findings, runs, *_ = scored
    validation = {"baseline": {1: 0.1}, "hybrid": {1: 0.2, 2: 0.4}, "collaborative": {1: 0.9}}
    tried = [{"validation": {"ndcg@20": 0.1}}, {"validation": {"ndcg@20": 0.3}}]
    test, _ = findings.test({**runs, "collaborative, ensemble only": runs["baseline"]}, {}, study_earlier.Known())
    result = {"validation": validation, "test": test, "tries": {"baseline": tried, "hybrid": []}}
    titles = {"titles": {"errors": 0.5}}
    samples = {"games": {**titles, "sasrec": result}, "movielens": {**titles, "sasrec": {**result, "test": {}}}}
    headline = study_findings.headline(samples)
    gain = result["test"]["gains"]["collaborative"]
    assert (headline["games_ndcg20_gain"], headline["games_p"]) == (gain["relative"], gain["p_holm"])
    varied = headline["games sasrec collaborative, ensemble only: gain over collaborative"]
    assert varied == test["variations"]["collaborative, ensemble only"]["relative"] < 0
    assert headline["games_llm_ndcg20_gain"] == 0, "no language model is in the collaborative teacher"
    assert headline["games_llm_p"] == 1
    assert headline["sasrec_games_ndcg10"] == result["test"]["metrics"]["baseline"]["ndcg@10"]["mean"]
    assert headline["ml100k sasrec hybrid: validation ndcg@20"] == pytest.approx(0.3)
    assert "ml100k_ndcg20_gain" not in headline
    former = {"games": {**titles, "sasrec": {**result, "test": {k: v for k, v in test.items() if k != "variations"}}}}
    assert study_findings.headline(former).keys() == headline.keys() - {
        "games sasrec collaborative, ensemble only: gain over collaborative",
        "games sasrec collaborative, ensemble only: p",
        *(name for name in headline if name.startswith("ml100k")),
    }
    assert "| baseline | 2 |" in study_findings.tables(former)
    tables = study_findings.tables(samples)
    assert "| baseline | 2 | 0.3000 | 0.1000 (1) |" in tables
    assert tables.count("gain in ndcg@20") == 1
    figure = study_findings.figure(samples)
    assert figure.startswith("<svg")
    assert "games, sasrec" in figure
    assert "movielens" not in figure
    assert "not been opened" in study_findings.figure({"movielens": samples["movielens"]})

    between = {**result, "test": study_earlier.Known(validation=validation, test=test).without({"baseline"}).test}
    chosen_anew = {"games": {**titles, "sasrec": between}}
    assert "sasrec_games_ndcg10" not in study_findings.headline(chosen_anew), "the former baseline's"
    assert "| hybrid |" in study_findings.tables(chosen_anew)
    assert "not been opened" in study_findings.figure(chosen_anew)


def test_shuffled_vectors_belong_to_other_items_and_nothing_else_changes(tmp_path):
    vectors = torch.arange(40.0).view(20, 2)
    (tmp_path / "text").mkdir()
    torch.save(vectors, tmp_path / "text" / "all_embeddings.pt")
    (tmp_path / "text" / "rows.npy").write_bytes(b"rows")
    hashes = {"all_embeddings.pt": "of the former", "rows.npy": "stays"}
    write_json(tmp_path / "text" / "manifest.json", {"teacher": "text", "width": 2, "sha256": hashes})
    folder = tmp_path / "shuffled"
    study_field.shuffle_vectors(tmp_path / "text", folder)
    shuffled = torch.load(folder / "all_embeddings.pt", weights_only=True)
    assert not torch.equal(shuffled, vectors)
    assert torch.equal(shuffled.sort(dim=0).values, vectors)
    hashes["all_embeddings.pt"] = sha256_of_file(folder / "all_embeddings.pt")
    assert json.loads((folder / "manifest.json").read_text()) == {"teacher": "shuffled", "width": 2, "sha256": hashes}
    assert (folder / "rows.npy").read_bytes() == b"rows"
    (tmp_path / "text" / "all_embeddings.pt").unlink()
    study_field.shuffle_vectors(tmp_path / "text", folder)  # it has been done


def command(tmp_path, *arguments):
    arguments_of_run = [sys.executable, str(SCRIPT), "--quick", "--json", str(tmp_path / "x.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments_of_run += ["--work", str(tmp_path / "work"), *arguments]
    return subprocess.run(arguments_of_run, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_study_in_small_goes_on_where_it_stopped(tmp_path):
    """Two arms on validation; then a third one, and the test split. What has been done is not done again."""
    done = command(tmp_path, "--arms", "vectors", "--parts", "search")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "x.json").read_text())
    sasrec = first["samples"]["toy"]["sasrec"]
    assert {name: len(tries) for name, tries in sasrec["tries"].items()} == {"baseline": 2, "vectors": 1}
    assert sasrec["test"] == {}
    assert not any(record["stage"] == "evaluate" for record in first["samples"]["toy"]["stages"])

    done = command(tmp_path, "--arms", "vectors", "collaborative", "collaborative, rows of the LLM")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    stages = result["samples"]["toy"]["stages"]
    assert stages[: len(first["samples"]["toy"]["stages"])] == first["samples"]["toy"]["stages"]
    assert "llm2rec.teacher" not in done.stdout
    test = result["samples"]["toy"]["sasrec"]["test"]
    assert test["gains"].keys() == {"vectors", "collaborative"}
    assert test["variations"].keys() == {"collaborative, rows of the LLM"}
    assert test["teachers"].keys() == {"collaborative", "titles"}
    assert result["headline"].keys() >= {"toy_ndcg20_gain", "toy_p", "sasrec_toy_ndcg10"}
    assert "| teacher: titles |" in done.stdout
    text = (tmp_path / "x.json").read_text()
    assert str(tmp_path) not in text
    assert str(ROOT) not in text

    again = command(tmp_path, "--arms", "vectors", "collaborative", "collaborative, rows of the LLM", "--parts")
    assert again.returncode == 0, again.stderr
    assert ">>>" not in again.stdout
    assert json.loads((tmp_path / "x.json").read_text())["headline"] == result["headline"]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    earlier = ["--earlier", str(tmp_path / "x.json")]
    done = command(elsewhere, *earlier, "--arms", "vectors", "collaborative", "collaborative, ensemble only")
    assert done.returncode == 0, done.stderr
    moved = json.loads((elsewhere / "x.json").read_text())
    trained = [record for record in moved["samples"]["toy"]["stages"][len(stages) :] if record["stage"] == "distill"]
    assert len(trained) == 1, "what is compared with has been run elsewhere"
    moved_test = moved["samples"]["toy"]["sasrec"]["test"]
    assert moved_test["gains"].keys() == test["gains"].keys()
    assert moved_test["variations"].keys() == {*test["variations"], "collaborative, ensemble only"}
    (source,) = moved["earlier"]
    assert source["command"].endswith("--parts"), "the last that wrote the file"


@pytest.mark.parametrize("arm", ["baseline", "collaborative"])
def test_pilots_change_the_best_of_what_was_drawn(arm, tmp_path, monkeypatch):
    change = {"student.training.learning_rate": 5e-4}
    monkeypatch.setattr(distillation_study, "PILOTS", {("toy", "sasrec", arm): (change,)})
    tries = {"baseline": [], "collaborative": []}

    def study():
        section = {"tries": tries, "chosen": {}, "validation": {}, "test": {}}
        write_json(tmp_path / "x.json", {"samples": {"toy": {"sasrec": section}}, "command": "c", "commit": {}})
        earlier = study_earlier.Earlier(tmp_path / "x.json")
        options = argparse.Namespace(work=tmp_path, quick=True, jobs=1, tries=None, arms=[arm], earlier=earlier)
        (toy,) = study_plan.datasets(options)
        return distillation_study.Study(study_field.Field(toy, options, study_plan.Budget()), "sasrec")

    def add(name, configs, scores):
        tried = zip(configs, scores, strict=True)
        tries[name] += [{"config": each, "seconds": {}, "validation": {"ndcg@20": score}} for each, score in tried]

    assert study().tries(study().arms[arm]) is None, "all begin at the best of the baseline's first tries"
    add("baseline", study().first_tries(), [0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    drawn = [each for each in study().tries(study().arms[arm]) if study().tried(study().arms[arm], each) is None]
    assert len(drawn) == 4
    add(arm, drawn, [0.1, 0.3, 0.1, 0.1])
    *others, pilot = study().tries(study().arms[arm])
    assert len(others) == len(tries[arm])
    assert pilot == {**drawn[1], **change}
    assert study().chosen(study().arms[arm]) is None, "while the pilot has not been run"
    add(arm, [pilot], [0.25])
    assert study().chosen(study().arms[arm]) == drawn[1]


def test_stages_are_listed_once_as_they_are_typed():
    clean, changed = ({"commit": "0123456789abcdef", "dirty": dirty} for dirty in (False, True))
    here = [
        {"run": "result_1", "overrides": ["seed=1"], "git": clean, "seconds": {"data": 0.05, "train": 3.0}},
        {"run": "result_2", "overrides": ["history=[3, 4]", "seed=1"], "git": changed, "seconds": {}},
    ]
    result = study_field.one_line_each(here)
    assert [each["overrides"] for each in result] == ["seed=1", "'history=[3, 4]' seed=1"]
    assert [each["git"] for each in result] == ["0123456789ab", "0123456789ab+"]
    assert [each["seconds"] for each in result] == [{"train": 3.0}, {}]
    further = {"run": "result_3", "overrides": ["seed=2"], "git": clean, "seconds": {}}
    last = {**further, "overrides": "seed=2", "git": "0123456789ab"}
    assert study_field.one_line_each([*result, *here, further]) == [*result, last]


def test_overrides_of_all_stages_are_written_once_and_read_into_each():
    stages = [{"overrides": f"dataset=toy llm=tiny_random {rest}"} for rest in ("seed=1", "seed=12", "student=x")]
    samples = {"toy": {"titles": {}, "stages": stages}}
    written = study_earlier.common_once(samples)
    assert written["toy"]["common"] == "dataset=toy llm=tiny_random"
    assert [each["overrides"] for each in written["toy"]["stages"]] == ["seed=1", "seed=12", "student=x"]
    assert study_earlier.spelt_out(written) == samples
    assert study_earlier.spelt_out(samples) == samples
    alone = {"toy": {"stages": [{"overrides": "dataset=toy"}, {"overrides": "dataset=toy seed=1"}]}}
    assert study_earlier.spelt_out(study_earlier.common_once(alone)) == alone
    assert study_earlier.spelt_out(study_earlier.common_once({"toy": {"stages": []}})) == {"toy": {"stages": []}}


def test_a_stage_that_was_killed_goes_on(tmp_path):
    options = argparse.Namespace(work=tmp_path, quick=True, jobs=1)
    stages = study_field.Stages(options, ["dataset=toy"], ["dataset.seed=3"])
    overrides_of_run = ["dataset=toy", "student=sasrec"]
    assert stages.begun("student", overrides_of_run) == []
    for name, overrides in {"result_1": [*overrides_of_run, "dataset.seed=3"], "result_2": overrides_of_run}.items():
        (stages.folder / "result" / name).mkdir(parents=True)
        write_json(stages.folder / "result" / name / "run.json", {"stage": "student", "overrides": overrides})
    assert stages.begun("student", overrides_of_run) == ["resume=result/result_1"]
    assert stages.begun("teacher", overrides_of_run) == []


def test_results_are_shortened():
    result = {
        "seed": 12345678,
        "runs": (0.123456789, 9.9990001e-05),
        "validation": {"mrr@5": 0.1, "ndcg@5": 0.25, "hr@1": 0.1},
    }
    brief = study_findings.brief(result)
    assert brief == {"seed": 12345678, "runs": [0.123457, 9.999e-05], "validation": {"ndcg@5": 0.25}}
    assert study_findings.brief(brief) == brief, "an earlier result is kept as it was"
