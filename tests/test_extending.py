"""The examples of docs/extending.md, applied to a copy of the package and run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
# Keeps the stages small.
TINY = [
    *("student.training.epochs=2", "teacher.training.epochs=1", "student.model.width=8", "llm.width=32"),
    "logging.tensorboard=false",
]
RECIPES = ["A dataset", "A student", "A task loss", "A gate", "A selection policy"]


def recipe(name):
    """A section's blocks of code as (language, file, text), and its commands."""
    section = GUIDE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w+)\n# (\S+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return blocks, re.findall(r"^    python -m (.*)$", section, re.MULTILINE)


def insert(file, diff):
    """Insert the added lines of a block after the line above them, which the file has once."""
    above, *added = diff.splitlines()
    assert all(line.startswith("+") for line in added)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines.count(above[1:]) == 1, f"{file.name} has {lines.count(above[1:])} lines {above[1:]!r}"
    place = lines.index(above[1:]) + 1
    lines[place:place] = [line[1:] for line in added]
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with all recipes applied, and playlists of 30 users who each prefer some songs."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("llm2rec", "conf"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in RECIPES:
        for language, file, text in recipe(name)[0]:
            target = folder / file
            if language == "diff":
                insert(target, text)
            else:
                assert not target.exists(), f"{file} exists already"
                target.write_text(text, encoding="utf-8")
    chance = np.random.default_rng(0)
    songs = [[f"Song {(user * 3 + chance.integers(12)) % 40}" for _ in range(8)] for user in range(30)]
    lines = [f"user{user}: {', '.join(each)}" for user, each in enumerate(songs)]
    (folder / "playlists.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(copy, *command):
    """Run a command of the page in the copy; returns the folder of its run."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return max((copy / "result").iterdir())


@pytest.mark.slow
def test_the_recipes_work_together(copy):
    """All commands in their order; the last ones use what the first ones add."""
    made = []
    for name in RECIPES:
        for command in recipe(name)[1]:
            folder = run(copy, *shlex.split(command), *TINY)
            made.append((name, command.split()[0], json.loads((folder / "run.json").read_text()), folder))
    assert all(record["status"] == "finished" for _, _, record, _ in made)
    by_recipe = {(name, stage): (record, folder) for name, stage, record, folder in made}
    assert by_recipe["A dataset", "llm2rec.data"][0]["dataset"]["name"] == "playlists"
    assert by_recipe["A student", "llm2rec.student"][0]["label"] == "mean"
    folder = by_recipe["A task loss", "llm2rec.student"][1]
    assert json.loads((folder / "config.json").read_text())["student"]["loss"]["name"] == "hinge"
    folder = by_recipe["A gate", "llm2rec.teacher"][1]
    assert json.loads((folder / "teacher" / "adapter" / "adapter_config.json").read_text())["gate"] == "cosine"
    labelling = json.loads(
        (by_recipe["A selection policy", "llm2rec.teacher"][1] / "metrics/labelling.json").read_text()
    )
    assert labelling["labelled"] == round(labelling["train_rows"] / 2)
    label = by_recipe["A selection policy", "llm2rec.distill"][0]["label"]
    assert label == "mean + dllm2rec (ilora_cosine-tiny_random)"


@pytest.mark.slow
def test_the_recipes_pass_the_linter_and_the_formatter(copy):
    for command in (["check", "."], ["format", "--check", "llm2rec", "newest.py"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(ROOT / "pyproject.toml")],
            cwd=copy, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_recipe_has_blocks_that_apply_and_commands(copy):
    assert all(recipe(name)[0] and recipe(name)[1] for name in RECIPES)
    files = [file for name in RECIPES for language, file, _ in recipe(name)[0] if language == "yaml"]
    assert [file.split("/")[1] for file in files] == ["dataset", "student", "student", "teacher", "active"]
    assert all((copy / file).is_file() for file in files)
