"""Commands in processes of their own, which find the stand-in by the environment alone; and a teacher, whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import TOKEN
from share_helpers import RAW_IDS, TRAINING

import llm2rec
from llm2rec.cards import teacher_card
from llm2rec.core.errors import CheckpointError, HubError
from llm2rec.core.files import write_json
from llm2rec.data import Toy, prepare
from llm2rec.student.datamodule import Rows
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import AdapterSettings, PromptSettings, TeacherSettings, TinyRandomSettings
from llm2rec.teacher.store import save_teacher

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def command(folder, hub, name, *overrides, token=TOKEN):
    variables = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": token,
    }
    arguments = [sys.executable, "-m", f"llm2rec.{name}", *overrides]
    environment = {**os.environ, **variables}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_a_command_pushes_a_run_and_another_answers_by_its_id(hub, make_run, tmp_path):
    run = make_run()
    pushed = command(tmp_path, hub, "share", f"run={run.relative_to(tmp_path)}", "repo=ann/shop", "private=false")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout == f"{hub.url}/ann/shop/commit/{hub.sha('ann/shop', 'main')}\n"
    assert hub.repos["ann/shop"]["private"] is False
    answered = command(
        tmp_path, hub, "recommend", "run=ann/shop", f"history=[{','.join(RAW_IDS[:3])}]", "k=3", token=""
    )
    assert answered.returncode == 0, answered.stderr
    assert [line.split()[2] for line in answered.stdout.splitlines()[1:]] == [
        item.item_id for item in llm2rec.Recommender.load(run).recommend_one(RAW_IDS[:3], k=3)
    ]
    assert TOKEN not in pushed.stdout + pushed.stderr
    for arguments, message in [
        (["run=ann/none", "history=[b1]"], "HubError: cannot download 'ann/none': the Hub knows no such id"),
        (
            ["run=ann/shop", "revision=v9", "history=[b1]"],
            "HubError: cannot download 'ann/shop': `revision` does not exist",
        ),
    ]:
        refused = command(tmp_path, hub, "recommend", *arguments)
        assert refused.returncode == 1
        assert refused.stderr.startswith(message)
        assert len(refused.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"result", "hf", "hub_cache"}


@pytest.fixture
def teacher_run(tmp_path):
    """A run folder of a teacher with a random adapter, whose language model is a folder; and its dataset."""
    data = prepare(Toy(n_users=30, n_items=60, n_worlds=5), tmp_path / "processed")
    llm = TinyRandomSettings(name="tiny", pooling="mean", prompt=PromptSettings(max_tokens=200), width=32, n_heads=2)
    source = make_tiny_random(llm, tmp_path / "llm", data.titles)
    targets = Rows.of(data, "train").targets.numpy()
    settings = TeacherSettings(adapter=AdapterSettings(r=8))
    torch.manual_seed(4)
    model, recipe = build_teacher(llm, str(source), settings, data, targets, torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "result" / "result_20260101_000000"
    card = teacher_card("tiny", str(source), "ilora", "item", TRAINING, {})
    save_teacher(folder / "teacher", model.eval(), recipe, card)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    write_json(folder / "run.json", {"stage": "teacher", "status": "finished", "seed": 1, "dataset": dataset})
    return folder, source, data


def test_a_teacher_goes_and_comes_with_its_language_model_by_name(hub, teacher_run, tmp_path):
    run, source, data = teacher_run
    with pytest.raises(HubError, match="base_model="):
        llm2rec.push(run, "ann/teacher")
    assert not hub.requests
    hub.add("org/tiny", {file.name: file.read_bytes() for file in source.iterdir()})
    llm2rec.push(run, "ann/teacher", base_model="org/tiny")
    files = hub.files("ann/teacher")
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert json.loads(files["config.json"])["source"] == "org/tiny"
    assert b"base_model: org/tiny" in files["README.md"]
    assert "adapter/README.md" not in files
    own = llm2rec.TeacherRecommender.load(run, data)
    fetched = llm2rec.TeacherRecommender.load("ann/teacher", data)
    histories = np.array([[3, 7, 60, 60]], np.int32), np.array([2], np.int32)
    assert torch.equal(fetched.model.log_probs(*histories), own.model.log_probs(*histories))
    assert own.recommend_one(data.items["raw_id"][:3]) == fetched.recommend_one(data.items["raw_id"][:3])


def test_a_teacher_from_the_hub_runs_no_code_of_its_language_model(hub, teacher_run):
    run, source, data = teacher_run
    hub.add("org/tiny", {file.name: file.read_bytes() for file in source.iterdir()})
    llm2rec.push(run, "ann/teacher", base_model="org/tiny")
    config = json.loads(hub.files("ann/teacher")["config.json"])
    hub.add("ann/teacher", {"config.json": json.dumps(config | {"trust_remote_code": True}).encode()})
    with pytest.raises(CheckpointError, match=r"its language model 'org/tiny' runs code of its own"):
        llm2rec.TeacherRecommender.load("ann/teacher", data)
