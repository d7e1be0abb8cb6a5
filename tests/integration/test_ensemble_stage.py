"""The whole way: students, ensembles with and without language models, a student of an ensemble, the comparison."""

import json
import shutil

import forked_stages
import numpy as np
import pytest
import torch
from command_helpers import STUDENT, TEACHER, TORCHRUN, TOY, history, run, run_until, runs

from llm2rec.core.files import read_json, write_json

SMALL = ["ensemble.top_k=60", "ensemble.block_rows=50"]
NO_LLM = ["ensemble.titles.share=0", "ensemble.neighbours.share=0.5", "ensemble.students.temperature=1"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A sweep of two students, their ensemble, what learnt from it, and the comparison of all."""
    folder = tmp_path_factory.mktemp("chain")
    run(folder, "student", *STUDENT, "--multirun", "seed=1,2")
    (sweep,) = runs(folder)
    log = run(folder, "ensemble", *STUDENT, *SMALL, *NO_LLM, f"runs=[result/{sweep.name}]").stderr
    ensemble = runs(folder)[-1]
    outputs = "distill.teacher_outputs=data/teacher_outputs/toy/ensemble"
    run(folder, "distill", *STUDENT, "distill=listwise", outputs)
    distilled = runs(folder)[-1]
    run(folder, "evaluate", *STUDENT, "metrics.n_candidates=20", "report.baseline=sasrec")
    return {"folder": folder, "sweep": sweep, "ensemble": ensemble, "distilled": distilled, "log": log}


def outputs_in(folder):
    found = folder / "data" / "teacher_outputs" / "toy" / "ensemble"
    tables = (np.load(found / f"{name}_train.npy") for name in ("myrank", "confidence"))
    return *tables, read_json(found / "manifest.json")


def test_an_ensemble_teaches_and_is_compared(chain):
    folder, ensemble = chain["folder"], chain["ensemble"]
    ranking, confidence, manifest = outputs_in(folder)
    assert ranking.shape == confidence.shape == (424, 60)
    assert (np.sort(ranking, axis=1) == np.arange(60)).all(), "the whole catalogue, once each"
    assert (np.diff(confidence, axis=1) >= 0).all(), "surest first"
    np.testing.assert_allclose(np.exp(-confidence.astype(np.float64)).sum(axis=1), 1, rtol=1e-4)
    sweep = chain["sweep"].name
    students = [
        {"kind": "student", "run": f"{sweep}/{job}", "label": "sasrec", "seed": seed, "share": 0.25, "temperature": 1.0}
        for job, seed in ((0, 1), (1, 2))
    ]
    for found, expected in zip(manifest["members"], [*students, {"kind": "neighbours", "share": 0.5}], strict=True):
        assert found.items() >= expected.items()
        assert {"alone", "without"} <= found.keys()
    assert manifest["search"].items() >= {"metric": "ndcg@10", "rows": 60, "seed": 42}.items()
    assert manifest["search"]["trials"] > 1
    assert manifest["members"] == read_json(ensemble / "metrics" / "members.json")["members"]
    assert manifest["vectors"] == [{"kind": "student", "run": f"{sweep}/{job}", "width": 64} for job in (0, 1)]
    assert not (folder / "data" / "llm").exists(), "no language model was made"
    assert "ndcg@10 on validation: 0." in chain["log"]
    assert not (ensemble / "export").exists()
    record = read_json(ensemble / "run.json")
    assert (record["label"], record["status"]) == ("ensemble (2 sasrec 0.5, neighbours 0.5)", "finished")
    assert read_json(chain["distilled"] / "run.json")["label"] == "sasrec + listwise (ensemble)"

    compared = read_json(runs(folder)[-1] / "report.json")
    entries = {entry["stage"]: entry for entry in compared["entries"]}
    assert entries.keys() == {"popularity", "student", "ensemble", "distill"}
    ranks = np.load(ensemble / "metrics" / "test_ranks.npy")
    assert ranks.shape == (60,)
    shown = json.loads((ensemble / "metrics" / "test.json").read_text())
    assert shown["metrics"]["hr@10"] == pytest.approx((ranks < 10).mean())
    assert (ensemble / "metrics" / "test_candidates.json").is_file()


def test_an_ensemble_outlives_its_members(chain, tmp_path):
    shutil.copytree(chain["folder"] / "data", tmp_path / "data")
    shutil.copytree(chain["ensemble"], tmp_path / "result" / chain["ensemble"].name)
    shutil.rmtree(tmp_path / "result" / chain["ensemble"].name / "metrics")
    run(tmp_path, "evaluate", *STUDENT)
    there, here = (
        np.load(each / "result" / chain["ensemble"].name / "metrics" / "test_ranks.npy")
        for each in (chain["folder"], tmp_path)
    )
    assert (there == here).all()


def test_an_ensemble_labels_the_rows_of_a_budget_alone(chain, tmp_path):
    budget, members = ["active=random", "active.budget=0.25"], f"runs=[{chain['sweep']}]"
    log = run(tmp_path, "ensemble", *STUDENT, *SMALL, *NO_LLM, *budget, members).stderr
    assert "labelled 106 of 424 rows in" in log
    some, everything = (each / "data" / "teacher_outputs" / "toy" / "ensemble" for each in (tmp_path, chain["folder"]))
    rows = np.load(some / "rows.npy")
    for name in ("myrank_train", "confidence_train"):
        part, whole = (np.load(each / f"{name}.npy") for each in (some, everything))
        np.testing.assert_allclose(part, whole[rows], rtol=1e-4)
    assert read_json(some / "manifest.json")["selection"]["budget"] == 0.25
    (of_run,) = runs(tmp_path)
    assert read_json(of_run / "metrics" / "labelling.json")["labelled"] == len(rows) == 106
    done = run(tmp_path, "distill", *STUDENT, *budget, "distill=listwise", f"distill.teacher_outputs={some}")
    assert "distilling 106 of 424 rows" in done.stderr
    log = run(tmp_path, "ensemble", *STUDENT, *SMALL, *NO_LLM, "active=disagreement", members).stderr
    assert "SelectionPolicyDisagreement distils at most 42 rows and chooses them among labelled ones: all 424" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runs=newest"], "`runs` is 'newest', expected `latest`, finished students"),
        (["runs=[]", "ensemble.neighbours.share=0", "ensemble.titles.share=0"], "the ensemble has no members"),
        (["runs=[]", "ensemble.titles.share=0"], "item neighbours alone have no item vectors"),
        (["runs=[result/SWEEP]", "llm=minilm", "ensemble.vectors=[else]"], "names 'else', expected some of titles"),
        (["runs=[]", "llm=minilm", "ensemble.vectors=[students]"], "names 'students', expected some of titles."),
        (["runs=[result/never]"], "is not the folder of a run or sweep"),
        (["runs=[result]"], "is not the folder of a run or sweep"),
        (["runs=[result/SWEEP,result/SWEEP/1]"], "names SWEEP/1 twice"),
        (["runs=[result/SWEEP/0,result/SWEEP/0]"], "names SWEEP/0 twice"),
        (["runs=[result/ENSEMBLE]"], "is a finished run of stage 'ensemble'; expected a finished run of"),
        (["runs=[result/SWEEP]", "dataset.seed=7"], "was trained on dataset 'toy', not on this"),
        (["runs=[result/SWEEP]", "ensemble.neighbours.share=2"], "ensemble.neighbours.share is 2.0, expected a share"),
        (["runs=[]", "ensemble.titles.share=0", "ensemble.titles.decay=0.5"], "`ensemble.titles.decay` is given, but"),
        (["runs=[]", "llm=minilm", "llm.path=nowhere"], "llm.path is 'nowhere', which is neither"),
        (["runs=[result/SWEEP]", "ensemble.name=a/b"], "ensemble.name is 'a/b'"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:20],
)
def test_what_makes_no_ensemble_is_refused_before_anything_is_written(chain, overrides, message):
    names = {"SWEEP": chain["sweep"].name, "ENSEMBLE": chain["ensemble"].name}
    for word, name in names.items():
        overrides, message = [each.replace(word, name) for each in overrides], message.replace(word, name)
    before, known = outputs_in(chain["folder"])[2], set(runs(chain["folder"]))
    stderr = chain["folder"] / "stderr.txt"
    code, lines = forked_stages.run(chain["folder"], "ensemble", [*STUDENT, *SMALL, *overrides], stderr)
    assert code == 1
    assert message in "\n".join(lines)
    assert not any("Traceback" in line for line in lines)
    assert outputs_in(chain["folder"])[2] == before
    for begun in set(runs(chain["folder"])) - known:
        assert not (begun / "ensemble").exists()
        assert not (begun / "export").exists()


@pytest.mark.slow
def test_two_processes_and_a_killed_one_write_the_same(chain, tmp_path):
    sweep = shutil.copytree(chain["sweep"], tmp_path / chain["sweep"].name)
    members = f"runs=[{sweep}]"
    whole = outputs_in(chain["folder"])

    killed = tmp_path / "killed"

    def blocks():
        return [block for each in runs(killed) for block in each.glob("export/block_*")]

    run_until(killed, "ensemble", *STUDENT, *SMALL, *NO_LLM, members, reached=lambda: len(blocks()) >= 2)
    assert not (killed / "data" / "teacher_outputs").exists()
    (begun,) = runs(killed)
    further = shutil.copytree(sweep / "0", sweep / "7")  # a job that has finished since is no member
    run(killed, "ensemble", *STUDENT, *SMALL, *NO_LLM, members, f"resume=result/{begun.name}")
    shutil.rmtree(further)

    two = tmp_path / "two"
    run(two, "ensemble", *STUDENT, *SMALL, *NO_LLM, members, launcher=TORCHRUN)
    for folder in (killed, two):
        for ours, theirs in zip(outputs_in(folder)[:2], whole[:2], strict=True):
            assert np.array_equal(ours, theirs)
        (made,) = runs(folder)
        assert history(made) == history(chain["ensemble"])


def test_a_finished_ensemble_is_taken_again_until_its_outputs_are_gone_or_anothers(chain):
    folder = chain["folder"]
    overrides = [*STUDENT, *SMALL, *NO_LLM, f"runs=[result/{chain['sweep'].name}]", "reuse=true"]
    before = len(runs(folder))
    assert "up to date" in run(folder, "ensemble", *overrides).stderr
    assert len(runs(folder)) == before
    shutil.move(folder / "data" / "teacher_outputs" / "toy" / "ensemble", folder / "aside")
    run(folder, "ensemble", *overrides)
    assert len(runs(folder)) == before + 1
    assert np.array_equal(outputs_in(folder)[0], np.load(folder / "aside" / "myrank_train.npy"))
    run(folder, "ensemble", *overrides, "ensemble.neighbours.share=0.25")  # under the same name
    assert "up to date" not in run(folder, "ensemble", *overrides).stderr
    assert len(runs(folder)) == before + 3
    assert outputs_in(folder)[2]["members"][-1]["share"] == 0.5


def test_jobs_of_a_sweep_that_have_not_finished_stay_out(chain, tmp_path):
    shutil.copytree(chain["folder"] / "data" / "processed", tmp_path / "data" / "processed")
    sweep = shutil.copytree(chain["sweep"], tmp_path / "sweep")
    (sweep / "1" / "run.json").unlink()
    log = run(tmp_path, "ensemble", *STUDENT, *SMALL, *NO_LLM, f"runs=[{sweep}]").stderr
    assert "sweep/1 is not finished and is left out of the ensemble" in log
    members = outputs_in(tmp_path)[2]["members"]
    assert [member["run"] for member in members if "run" in member] == ["sweep/0"]


# ---- with language models --------------------------------------------------------------------------------------------

LLM = ["llm=tiny_random", "llm.width=32"]


@pytest.fixture(scope="module")
def mixed(chain, tmp_path_factory):
    """An ensemble of everything: students, neighbours, titles, a teacher with outputs, and one without."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(chain["folder"] / "data" / "processed", folder / "data" / "processed")
    run(folder, "teacher", *TEACHER, *LLM, "teacher.training.epochs=0", "teacher.export.top_k=40")
    zero_shot = [*TOY, *LLM, "teacher=zero_shot", "teacher.export.enabled=false"]
    run(folder, "teacher", *zero_shot)
    teachers = runs(folder)
    members = f"runs=[{','.join(map(str, (chain['sweep'], *teachers)))}]"
    log = run(folder, "ensemble", *STUDENT, *SMALL, *LLM, members).stderr
    return {"folder": folder, "teachers": teachers, "members": members, "log": log, "run": runs(folder)[-1]}


def test_language_models_are_members(mixed, chain):
    _, confidence, manifest = outputs_in(mixed["folder"])
    kinds = [member["kind"] for member in manifest["members"]]
    assert kinds == ["student", "student", "neighbours", "titles", "teacher", "teacher"]
    assert sum(member["share"] for member in manifest["members"]) == pytest.approx(1)
    titles, first, second = manifest["members"][3:]
    assert titles["llm"] == titles["text"]["name"] == "tiny_random"
    assert {"whitening", "decay", "temperature", "alone", "without"} <= titles.keys()
    assert [each["run"] for each in (first, second)] == [each.name for each in mixed["teachers"]]
    assert (first["top_k"], second["top_k"]) == (40, 50)
    assert "exported 40 items per training row" in mixed["log"]
    np.testing.assert_allclose(np.exp(-confidence.astype(np.float64)).sum(axis=1), 1, rtol=1e-4)
    (column,) = manifest["vectors"]
    assert column == {"kind": "titles", "llm": "tiny_random", "text": titles["text"], "width": 32}
    vectors = torch.load(mixed["folder"] / "data/teacher_outputs/toy/ensemble/all_embeddings.pt", weights_only=True)
    assert vectors.shape == (60, 32)
    assert vectors.mean(dim=0).abs().max() > 1e-3, "raw"
    assert not (mixed["run"] / "rankings").exists()
    history = read_json(mixed["run"] / "metrics" / "validation.json")["history"]
    assert history[0]["val/ndcg@10"] == pytest.approx(manifest["search"]["value"], abs=1e-6)


def test_an_ensemble_with_language_models_is_evaluated(mixed, chain):
    shutil.rmtree(mixed["folder"] / "data" / "llm" / "text_vectors")  # the vectors are its own
    run(mixed["folder"], "evaluate", *STUDENT, f"runs=[{mixed['run']}]", "metrics.n_candidates=5")
    shown = read_json(mixed["run"] / "metrics" / "test.json")
    assert 0 < shown["metrics"]["hr@10"] <= 1
    assert len(np.load(mixed["run"] / "metrics" / "test_ranks.npy")) == 60


def test_titles_and_neighbours_alone_teach(chain, tmp_path):
    shutil.copytree(chain["folder"] / "data" / "processed", tmp_path / "data" / "processed")
    fixed = ["ensemble.titles.share=0.5", "ensemble.titles.temperature=0.1", "ensemble.vectors=[titles]"]
    run(tmp_path, "ensemble", *STUDENT, *SMALL, *LLM, "runs=[]", *fixed)
    manifest = outputs_in(tmp_path)[2]
    assert [(each["kind"], each["share"]) for each in manifest["members"]] == [("neighbours", 0.5), ("titles", 0.5)]
    assert manifest["members"][1]["temperature"] == 0.1
    (record,) = runs(tmp_path)
    assert read_json(record / "run.json")["label"] == "ensemble (neighbours 0.5, titles of tiny_random 0.5)"
    assert "up to date" in run(tmp_path, "ensemble", *STUDENT, *SMALL, *LLM, "runs=[]", *fixed, "reuse=true").stderr


@pytest.mark.slow
def test_two_processes_and_a_resumed_one_choose_the_same(mixed, tmp_path):
    whole = outputs_in(mixed["folder"])
    shutil.copytree(mixed["folder"] / "data" / "processed", tmp_path / "two" / "data" / "processed")
    teachers = "teacher_outputs/toy/ilora-tiny_random"
    shutil.copytree(mixed["folder"] / "data" / teachers, tmp_path / "two" / "data" / teachers)
    run(tmp_path / "two", "ensemble", *STUDENT, *SMALL, *LLM, mixed["members"], launcher=TORCHRUN)
    ranking, _, manifest = outputs_in(tmp_path / "two")

    def without_places(members):
        return [{key: value for key, value in member.items() if key != "text"} for member in members]

    assert without_places(manifest["members"]) == without_places(whole[2]["members"])
    assert manifest["search"] == whole[2]["search"]
    assert (ranking == whole[0]).mean() > 0.99

    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "two" / "data", killed / "data")
    shutil.rmtree(killed / "data" / "teacher_outputs" / "toy" / "ensemble")

    def blocks():
        return [block for each in runs(killed) for block in each.glob("export/block_*")]

    run_until(killed, "ensemble", *STUDENT, *SMALL, *LLM, mixed["members"], reached=lambda: len(blocks()) >= 2)
    (begun,) = runs(killed)
    chosen = read_json(begun / "metrics" / "members.json")
    chosen["search"]["trials"] = 12345  # a search made again would not count so many
    write_json(begun / "metrics" / "members.json", chosen)
    run(killed, "ensemble", *STUDENT, *SMALL, *LLM, mixed["members"], f"resume=result/{begun.name}")
    ranking, _, manifest = outputs_in(killed)
    assert manifest["search"]["trials"] == 12345
    assert np.array_equal(ranking, whole[0])
