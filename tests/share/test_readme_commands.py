"""The commands of the README, the guide and the page on scaling run as they stand, one after the other.

Small data and a tiny model stand in for large ones.

They run in this process, which has imported everything already, with a Hub on localhost. The scripts that set the
project up and test it are only looked for, and so is the configuration of a launcher.
"""

import json
import logging
import os
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pytest
from engine_helpers import fresh_processes  # noqa: F401
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/guide.md", "docs/scaling.md"]
PIPELINE = [
    ("data", []),
    ("student", []),
    ("teacher", []),
    ("distill", []),
    ("ensemble", []),
    ("distill", ["distill=listwise_reading"]),
    ("evaluate", []),
]
STAND_INS = {
    "dataset=movielens": ["dataset=toy", "dataset.n_users=60", "dataset.n_items=60", "dataset.n_worlds=5"],
    "distill.teacher_outputs=": ["distill.teacher_outputs=data/teacher_outputs/toy/ensemble"],
    "llm=": ["llm=tiny_random", "llm.width=32", "llm.n_heads=2"],
}
STUDENT = ["student.training.epochs=2"]
QUICK = {
    "student": STUDENT,
    "distill": STUDENT,
    "tune": [*STUDENT, "n_trials=2"],
    "teacher": ["teacher.training.epochs=1", "teacher.train_rows=32", "teacher.validation_rows=8"],
    "teacher=ilora_paper": ["teacher.export.enabled=false"],  # a search over titles for each row takes long
}
RUN = "result/result_..."


def shown_commands():
    """The lines of the pages' shell blocks, without comments."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def runs_of(stage, dataset):
    """Finished runs, oldest first."""
    found = []
    for file in sorted(Path("result").glob("result_*/run.json")):
        record = json.loads(file.read_text())
        if (record["stage"], record["status"], record.get("dataset", {}).get("name")) == (stage, "finished", dataset):
            found.append(file.parent)
    return found


def with_places(stage, words):
    """Overrides with a run in the place of each ``result/result_...``, and items that there are."""
    dataset = "shop" if "history=[sku-7]" in words else "toy"
    sweeps = sorted(file.parent for file in Path("result").glob("result_*/multirun.yaml"))
    places = {
        "run": runs_of("distill", dataset)[-1:],
        "teacher.recommender_run": runs_of("student", dataset)[:1],
        "runs": sweeps[-1:],
    }
    for word in words:
        name, _, value = word.partition("=")
        if RUN in value:
            word = f"{name}={value.replace(RUN, str(places[name][0]))}"
        elif word == "history=[50,181]":
            items = pa.ipc.open_file(runs_of("distill", "toy")[-1] / "student" / "items.arrow").read_all()
            word = f"history=[{','.join(items['raw_id'][:2].to_pylist())}]"
        if stage != "plan":  # which reads no model and no data
            standing = next((stand_in for start, stand_in in STAND_INS.items() if word.startswith(start)), [word])
        else:
            standing = [word]
        yield from standing


def stages_of(words):
    """Stages that a command runs, and their overrides."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[:2] == ["bash", "cmd/run_all_pipeline.sh"]:
        return [(stage, [*more, *words[2:]]) for stage, more in PIPELINE]
    module = words.index("-m") + 1
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    else:
        assert words[0] == "python"
    return [(words[module].removeprefix("llm2rec."), words[module + 1 :])]


@pytest.fixture
def launch(tmp_path, monkeypatch, fresh_processes):  # noqa: F811
    """Run a stage as a command in ``tmp_path``, and put back what Hydra changes for the whole process."""
    root, cwd = logging.getLogger(), os.getcwd()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)

    def run(stage, overrides):
        monkeypatch.setattr(sys, "argv", [f"llm2rec.{stage}", *overrides])
        import_module(f"llm2rec.{stage}.__main__").main()
        os.chdir(tmp_path)

    yield run
    GlobalHydra.instance().clear()
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level
    logging.getLogger("llm2rec").setLevel(logging.NOTSET)
    os.chdir(cwd)


def write_shop(folder):
    """Tables as the README describes them."""
    products = ["item_id,title", *(f"sku-{number},Cups of kind {number}" for number in range(20))]
    purchases = ["user_id,item_id,timestamp"]
    for user in range(30):
        purchases += [f"ann {user},sku-{(user + 3 * n) % 20},2024-05-{n + 1:02d}" for n in range(6)]
    (folder / "products.csv").write_text("\n".join(products) + "\n")
    (folder / "new.csv").write_text("item_id,title\nsku-new,Cups of a new kind\n")
    (folder / "purchases.csv").write_text("\n".join(purchases) + "\n")


@pytest.mark.slow
def test_every_command_that_is_shown_runs(hub, launch, tmp_path, capsys):
    write_shop(tmp_path)
    done = []
    for words in shown_commands():
        if words[0] == "head":
            assert Path(words[-1]).is_file()
            continue
        if words[:1] == ["bash"] and words[1] != "cmd/run_all_pipeline.sh":
            assert (ROOT / words[1]).is_file()
            continue
        for stage, overrides in stages_of(words):
            given = list(with_places(stage, overrides))
            quick = [more for name in (stage, *overrides) for more in QUICK.get(name, [])]
            if (stage, *given) not in done:  # some commands are shown twice
                launch(stage, [*given, *quick])
                done.append((stage, *given))
    assert {stage for stage, *_ in done} == {*dict(PIPELINE), "recommend", "share", "plan", "tune"}
    assert len(hub.repos["ann/movielens-sasrec"]["commits"]) == 1
    answers = re.findall(r"^ +score +id +title$", capsys.readouterr().out, re.MULTILINE)
    assert len(answers) == 4
    reports = list(Path("result").glob("result_*/report.html"))
    assert len(reports) == len([stage for stage, *_ in done if stage == "evaluate"])
