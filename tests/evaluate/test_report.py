"""The report: numbers equal plain loops, pages are valid and self-contained, and a browser shows them whole."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from PIL import Image
from report_helpers import PROTOCOL, Page, findings_of, metrics_of, ranks_of, wild_data, wild_runs

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, write_json
from llm2rec.core.statistics import row_values
from llm2rec.distill.data_bridge import outputs_hash
from llm2rec.evaluate.__main__ import _command, in_words
from llm2rec.evaluate.report.comparison import check_baseline, p_value, read_run
from llm2rec.evaluate.report.pages import write_pages
from llm2rec.evaluate.scoring.scoring import score_run
from llm2rec.student.datamodule import Rows

SECTIONS = [
    "conclusions", "setting", "results", "baseline", "groups", "latency", "curves", "overlap", "gates", "samples",
    "provenance",
]  # fmt: skip
DISTILLED, OTHER, TITLES = "sasrec <b>", "sasrec (result_20260103_000000)", "titles"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return wild_data(tmp_path_factory.mktemp("wild"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory, data):
    """Findings on five runs, the runs with their models, and the folder of the report."""
    folder = tmp_path_factory.mktemp("reported")
    made = wild_runs(folder / "result", data)
    findings = findings_of(list(made), data, engine_in(folder / "e"), folder / "gates")
    write_pages(folder, findings)
    return findings, made, folder


def test_runs_that_differ_in_their_seed_alone_are_one_entry(reported):
    findings, made, _ = reported
    first, second, distilled, other, titles = made
    names = {each.name: each.runs for each in findings.entries}
    assert names == {
        "popularity": ("popularity",),
        f"sasrec ({first.name})": (first.name, second.name),
        DISTILLED: (distilled.name,),
        OTHER: (other.name,),
        TITLES: (titles.name,),
    }
    entry = findings.entries[1]
    both = [metrics_of(first)["ndcg@10"], metrics_of(second)["ndcg@10"]]
    assert entry.metrics["ndcg@10"].mean == pytest.approx(np.mean(both))
    assert entry.metrics["ndcg@10"].spread == pytest.approx(np.std(both, ddof=1))
    assert findings.entries[2].metrics["hr@5"].mean == pytest.approx(metrics_of(distilled)["hr@5"])
    assert findings.baseline == entry.name


def test_gains_are_those_of_plain_loops(reported, data):
    findings, made, _ = reported
    first, second, distilled, _, _ = made
    gain = [row_values(ranks_of(each), "ndcg@10") for each in (first, second, distilled)]
    apart = gain[2] - (gain[0] + gain[1]) / 2
    comparison = next(each for each in findings.comparisons if each.name == DISTILLED)
    assert comparison.difference.mean == pytest.approx(apart.mean())
    assert comparison.relative == pytest.approx(apart.mean() / ((gain[0] + gain[1]) / 2).mean())
    assert (comparison.difference.better, comparison.difference.worse) == ((apart > 0).sum(), (apart < 0).sum())
    assert comparison.p_holm >= comparison.difference.p

    counts = np.zeros(data.n_items, int)
    for row in data.sequences:
        np.add.at(counts, row["items"][:-2], 1)
    tests = list(data.splits["test"])
    for groups, numbers in (
        (findings.by_popularity, [counts[row["target"]] for row in tests]),
        (findings.by_length, [len(data.sequences[row["user_index"]]["items"]) - 1 for row in tests]),
    ):
        assert sum(group.rows for group in groups) == len(tests)
        for group in groups:
            rows = [i for i, number in enumerate(numbers) if group.low <= number <= group.high]
            assert len(rows) == group.rows
            assert group.gains[DISTILLED].mean == pytest.approx(apart[rows].mean())


def test_targets_that_training_never_shows_are_reported_apart(reported, data):
    findings, made, folder = reported
    shown = {item for row in data.splits["train"] for item in (*row["history"], row["target"])}
    rows = [number for number, row in enumerate(data.splits["test"]) if row["target"] not in shown]
    assert len(rows) == 4
    (untrained,) = findings.slices
    assert (untrained.rows, untrained.share) == (len(rows), len(rows) / 36)
    assert untrained.metrics.keys() == {each.name for each in findings.entries}
    first, second, distilled, _, _ = (ranks_of(each)[rows] for each in made)
    found = untrained.metrics[DISTILLED]
    assert found["hr@10"].mean == pytest.approx(np.mean([rank < 10 for rank in distilled]))
    by_hand = [np.mean([1 / np.log2(rank + 2) if rank < 10 else 0 for rank in ranks]) for ranks in (first, second)]
    assert untrained.metrics[findings.entries[1].name]["ndcg@10"].runs == pytest.approx(by_hand)
    caption = f"Targets that do not occur in training: {len(rows)} test rows ({100 * len(rows) / 36:.1f} %)"
    assert caption in (folder / "report.md").read_text()
    assert read_json(folder / "report.json")["slices"][0]["rows"] == len(rows)


def test_a_p_value_that_no_random_signs_reach_is_a_bound():
    assert p_value(0.0004) == p_value(0.0004, is_bound=True) == "< 0.001"
    assert (p_value(0.0012), p_value(0.0012, is_bound=True)) == ("0.001", "≤ 0.001")


def test_the_cost_of_labels_is_in_the_report(reported):
    findings, _, _ = reported
    (labelling,) = findings.labellings
    assert asdict(labelling) == {
        "name": TITLES, "labelled": 1000, "train_rows": 4000, "seconds": 12.34, "seconds_saved": 37.02
    }  # fmt: skip


def test_students_and_teacher_share_what_plain_loops_count(reported, data):
    findings, made, folder = reported
    (overlap,) = findings.overlaps
    assert (overlap.teacher, overlap.run, overlap.top_k) == ("random", "result_of_teacher", 10)
    assert overlap.taught == (DISTILLED,)
    assert overlap.rows == len(data.splits["train"])
    teacher = np.load(folder / "result" / "outputs" / "random" / "myrank_train.npy")[:, :10]
    model = list(made.values())[2]
    shares = [
        len({*model.score(model(torch.tensor([row["history"]]), torch.tensor([len(row["history"])])))[0]
             .topk(10).indices.tolist()} & {*best.tolist()}) / 10
        for row, best in zip(data.splits["train"], teacher, strict=True)
    ]  # fmt: skip
    assert overlap.students[DISTILLED].mean == pytest.approx(np.mean(shares))
    assert overlap.students.keys() == {findings.entries[1].name, DISTILLED, OTHER}
    assert not overlap.without_history  # a random ranking holds items of the history


def test_gates_are_stored_by_scoring_and_averaged_by_group(reported, data):
    findings, made, _ = reported
    (use,) = findings.gates
    gates = np.load(list(made)[-1] / "metrics" / "test_gates.npy")
    model, test = list(made.values())[-1], Rows.of(data, "test")
    inputs = model.gate_inputs(*test.histories())
    expected = model.evaluation_gates(inputs).numpy()
    np.testing.assert_allclose(gates, expected, atol=1e-5)
    np.testing.assert_allclose(gates.sum(axis=1), 1, atol=1e-5)
    lengths = np.array(data.splits["test"]["position"][:])
    for low, high, n_rows, mean in use.groups:
        rows = (lengths >= low) & (lengths <= high)
        assert rows.sum() == n_rows
        np.testing.assert_allclose(mean, gates[rows].mean(axis=0), atol=1e-6)
    assert 0 < use.entropy <= np.log(gates.shape[1])


def test_samples_are_what_students_rank_first(reported, data):
    findings, made, _ = reported
    model = list(made.values())[2]
    users = {str(row["user_id"]): row for row in data.splits["test"]}
    assert len(findings.samples) == 5
    for sample in findings.samples:
        row = users[sample.user]
        scores = model.score(model(torch.tensor([row["history"]]), torch.tensor([len(row["history"])])))[0]
        best = scores.topk(5).indices.tolist()
        assert sample.answers[DISTILLED] == tuple((data.titles[item], item == row["target"]) for item in best)
        assert sample.places[DISTILLED] == int((scores >= scores[row["target"]]).sum())
        assert sample.history == tuple(data.titles[item] for item in row["history"][-6:])


def test_the_page_is_valid_and_self_contained(reported):
    findings, _, folder = reported
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags() & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "action", "data", "xlink:href", "style"}, tag
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert attributes["href"][1:] in page.ids
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", source)
    policy = next(each for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    figures = [tag for tag, _ in page.elements if tag == "figure"]
    assert len(drawings) == 2 * len(figures) >= 14  # one for wide screens, one for phones
    assert all(each["role"] == "img" and len(each["aria-label"]) > 30 for each in drawings)
    for sentence in findings.conclusions:
        assert sentence in page.text.replace("\u00a0", " ")
    assert "python -m llm2rec.evaluate dataset=csv" in page.text
    assert f"python -m x {findings.runs[0].name}" in page.text


def test_titles_and_labels_with_markup_are_escaped(reported, data):
    findings, _, folder = reported
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "<script" not in text.lower()
        assert "sasrec <b>" not in text
    title = findings.samples[0].target
    assert title.startswith("<script>alert(")
    assert title in Page((folder / "report.html").read_text(encoding="utf-8")).text
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [re.sub(r"\\.", "", line) for line in lines if line.startswith("|")]
    headers = [number for number, line in enumerate(rows) if set(line) <= set("| -:")]
    assert len(headers) > 10
    for number in headers:
        assert rows[number].count("|") == rows[number - 1].count("|") == rows[number + 1].count("|")


def test_markdown_and_json_have_the_same_content(reported):
    findings, _, folder = reported
    source = (folder / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", source)
    assert len(titles) == len(SECTIONS)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert [line[3:].replace("\\", "") for line in text.splitlines() if line.startswith("## ")] == titles
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(asdict(findings)))
    assert written["comparisons"][0]["p_holm"] == findings.comparisons[0].p_holm


def test_a_student_is_not_compared_with_outputs_that_were_written_since(tmp_path, data):
    folder = list(wild_runs(tmp_path / "result", data))[2]
    record = read_json(folder / "run.json")
    engine = engine_in(tmp_path / "e")
    for known, n_overlaps in ((outputs_hash(tmp_path / "result" / "outputs" / "random"), 1), ("0" * 64, 0)):
        write_json(folder / "run.json", record | {"teacher_outputs": known})
        findings = findings_of([folder], data, engine, tmp_path)
        assert len(findings.overlaps) == n_overlaps
    assert findings.notes["overlap"][0].startswith(f"{DISTILLED}: ")


def test_one_run_is_compared_with_popularity_and_missing_parts_have_notes(tmp_path, data):
    folder = list(wild_runs(tmp_path / "result", data))[2]
    shutil.rmtree(tmp_path / "result" / "outputs")
    (folder / "metrics" / "validation.json").unlink()
    engine = engine_in(tmp_path / "e")
    score_run(folder, data, engine, PROTOCOL, tmp_path)
    (folder / "student" / "model.safetensors").unlink()  # scores are kept without it
    findings = findings_of([folder], data, engine, tmp_path)
    assert findings.baseline == "popularity"
    assert [each.name for each in findings.comparisons] == [DISTILLED]
    for part in ("curves", "overlap", "samples"):
        assert len(findings.notes[part]) == 1
        assert findings.notes[part][0].startswith(f"{DISTILLED}: ")
    write_pages(tmp_path, findings)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [each for each in page.ids if each in SECTIONS] == SECTIONS


def test_scores_and_ranks_that_do_not_match_raise(tmp_path, data):
    folder = next(iter(wild_runs(tmp_path / "result", data)))
    scored = score_run(folder, data, engine_in(tmp_path / "e"), PROTOCOL, tmp_path)
    np.save(folder / "metrics" / "test_ranks.npy", np.zeros(len(ranks_of(folder)), np.int64))
    with pytest.raises(CheckpointError, match=r"its ranks give 1\.000000; delete .*test\.json"):
        read_run(scored, folder, None)
    (folder / "metrics" / "test_ranks.npy").unlink()
    with pytest.raises(CheckpointError, match="holds no readable ranks"):
        read_run(scored, folder, None)


@pytest.mark.parametrize("wanted", [DISTILLED, "result_20260102_000000", "popularity", "result/result_20260102_000000"])
def test_the_baseline_can_be_chosen(reported, data, tmp_path, wanted):
    _, made, folder = reported
    check_baseline(wanted, list(made))
    findings = findings_of(list(made)[:3], data, engine_in(tmp_path / "e"), folder / "gates", baseline=wanted)
    assert findings.baseline == ("popularity" if wanted == "popularity" else DISTILLED)
    assert len(findings.comparisons) == (2 if wanted == "popularity" else 1)


def test_an_unknown_baseline_raises(reported):
    _, made, _ = reported
    with pytest.raises(ConfigError, match=r"`report.baseline` is 'gru4rec', expected a label .* 'sasrec <b>'"):
        check_baseline("gru4rec", list(made))


def test_three_recommendations_are_given_in_words(reported):
    findings = reported[0]
    name, answers = list(findings.samples[0].answers.items())[-1]
    first, *best = in_words(findings)
    assert first.startswith(f"{name} recommends after ")
    assert first.endswith(f"{findings.samples[0].history[-1]}:")
    assert best == [f"{number}. {title}" for number, (title, _) in enumerate(answers[:3], 1)]
    assert len(best) == 3
    assert in_words(replace(findings, samples=[])) == []


def test_what_has_no_model_has_no_parameters_and_what_was_not_trained_no_curve(reported, data, tmp_path):
    findings, made, folder = reported
    assert findings.entries[0].name == "popularity"
    assert findings.entries[0].parameters is None
    row = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| popularity"))
    assert f"{data.n_items:,}" not in row
    untrained = {"select_on": "ndcg@10", "best_step": 0, "history": [{"step": 0, "val/ndcg@10": 0.1}]}
    first, _, distilled, *_ = made
    shutil.copytree(distilled, copied := tmp_path / distilled.name)
    write_json(copied / "metrics" / "validation.json", untrained)
    again = findings_of([first, copied], data, engine_in(tmp_path / "e"), folder / "gates")
    assert DISTILLED not in {curve.entry for curve in again.curves}
    assert f"{DISTILLED}: no validation curve, as nothing was trained." in again.notes["curves"]


def test_a_command_is_the_one_that_started_the_run(tmp_path):
    write_json(tmp_path / "run.json", {"stage": "student", "status": "finished"})
    assert _command(tmp_path) is None
    overrides = ["seed=3", 'dataset.name="two words"', "x=${y}"]
    write_json(tmp_path / "run.json", {"stage": "student", "status": "finished", "overrides": overrides})
    assert _command(tmp_path) == "python -m llm2rec.student seed=3 'dataset.name=\"two words\"' 'x=${y}'"
    write_json(tmp_path / "run.json", {"stage": "student", "status": "finished", "overrides": []})
    assert _command(tmp_path) == "python -m llm2rec.student"


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_the_page_within_its_width(reported, tmp_path, width):
    """In a frame of the screen's width, since a browser window has a minimum width."""
    _, _, folder = reported
    (tmp_path / "report.html").write_bytes((folder / "report.html").read_bytes())
    measure = (
        "const page = frame.contentDocument.documentElement, seen = [...page.querySelectorAll('svg')].filter("
        "each => each.getBoundingClientRect().width > 0);"
        "document.title = JSON.stringify([page.scrollWidth, seen.length, "
        "Math.max(...seen.map(each => each.getBoundingClientRect().right)), page.querySelectorAll('figure').length])"
    )
    (tmp_path / "frame.html").write_text(
        f'<!DOCTYPE html><body style="margin:0"><iframe id="frame" src="report.html" width="{width}" height="900" '
        f'style="border:0" onload="{measure.replace(chr(34), "&quot;")}"></iframe>'
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
    ]  # fmt: skip
    page = (tmp_path / "frame.html").as_uri()
    shown = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, check=True, timeout=120)
    content, drawn, right, figures = json.loads(re.search(r"<title>(.*?)</title>", shown.stdout)[1])
    assert content <= width  # no horizontal overflow
    assert drawn == figures > 6  # one of the two charts of each figure
    assert right <= width
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page], capture_output=True, check=True, timeout=120)
    with Image.open(shot) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # text, not a blank page
