"""The workshop of `test_bad_inputs.py`, and ways to spoil what lies in it."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "AMAZON",
    "CSV",
    "LOCAL_LLM",
    "MOVIES",
    "OUTPUTS",
    "STUDENT",
    "TEACHER",
    "TOY",
    "WORKSHOP",
    "Spoil",
    "Try",
    "archive",
    "both",
    "cut",
    "embeddings",
    "finish_workshop",
    "first",
    "flipped",
    "gone",
    "raw",
    "record",
    "replaced",
    "row",
    "table",
    "text",
]

Spoil = Callable[[Path], object]

TOY = ("dataset.n_users=60", "dataset.n_items=60", "dataset.n_worlds=5")
STUDENT = (*TOY, "student.training.epochs=1")
TEACHER = (*TOY, "teacher.training.epochs=1", "llm.width=16", "llm.n_layers=1")
CSV = ("dataset=csv", "dataset.interactions=interactions.csv", "dataset.items=items.csv")
AMAZON = ("dataset=amazon_games", "dataset.reviews=reviews.jsonl", "dataset.metadata=meta.jsonl")
MOVIES = ("dataset=movielens", "dataset.raw_dir=ml.zip")
LOCAL_LLM = (*TEACHER[:4], "llm=minilm", "llm.path=llm")
OUTPUTS = "data/teacher_outputs/toy/ilora-tiny_random"

WORKSHOP = (
    ("data", TOY),
    ("student", STUDENT),
    ("teacher", TEACHER),
    ("distill", STUDENT),
)
"""Stages that make the workshop, in order."""


@dataclass(frozen=True)
class Try:
    """One bad input.

    Attributes:
        name: What is bad.
        stage: Which stage gets it.
        overrides: Its command line.
        names: What the error must hold: the value, or the file.
        spoil: Makes the bad input in a copy of the workshop.
    """

    name: str
    stage: str
    overrides: tuple[str, ...]
    names: str
    spoil: Spoil = lambda folder: None


def finish_workshop(folder: Path) -> None:
    """Give runs fixed names, and the tiny language model a place of its own."""
    runs = sorted((folder / "result").iterdir())
    for run, (stage, _) in zip(runs, WORKSHOP, strict=True):
        run.rename(run.with_name(f"result_{stage}"))
    (made,) = (each for each in (folder / "data/llm").iterdir() if each.name.startswith("tiny_random"))
    shutil.copytree(made, folder / "llm")
    write_tables(folder)
    (folder / "histories.jsonl").write_text(json.dumps(["t00000", "t00001"]) + "\n")


# ---- ways to spoil ---------------------------------------------------------------------------------------------------


def write_tables(folder: Path, rows: object = None, header: str = "user_id,item_id,timestamp") -> None:
    """Write interactions.csv, to which ``rows`` are added at the end, and items.csv."""
    good = [f"{user},i{item},{item}" for user in "abcd" for item in range(6)]
    added = [] if rows is None else [rows] if isinstance(rows, str) else list(rows)  # type: ignore[call-overload]
    (folder / "interactions.csv").write_text("\n".join([header, *good, *added]) + "\n", encoding="utf-8")
    titles = [f"i{item},Title {item}" for item in range(6)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")


def row(text: str) -> Spoil:
    """Add a row to the interactions."""
    return lambda folder: write_tables(folder, text)


def text(name: str, content: str) -> Spoil:
    """Write a text file."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def raw(name: str, content: bytes) -> Spoil:
    """Write a binary file."""
    return lambda folder: (folder / name).write_bytes(content)


def gone(name: str) -> Spoil:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(pattern: str, part: float = 0.5) -> Spoil:
    """Keep only the first part of the one file of this name."""

    def spoil(folder: Path) -> None:
        file = next(folder.glob(pattern))
        content = file.read_bytes()
        file.write_bytes(content[: int(part * len(content))])

    return spoil


def flipped(pattern: str) -> Spoil:
    """Change a byte in the middle of the one file of this name."""

    def spoil(folder: Path) -> None:
        file = next(folder.glob(pattern))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)

    return spoil


def replaced(name: str, old: bytes, new: bytes) -> Spoil:
    """Replace bytes of a file by as many others."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))


def record(name: str, **values: Any) -> Spoil:
    """Change values of a JSON file; None takes a key away."""

    def spoil(folder: Path) -> None:
        changed = json.loads((folder / name).read_text()) | values
        kept = {key: value for key, value in changed.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return spoil


def table(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Change a table of the teacher outputs, without the manifest that would reveal it."""

    def spoil(folder: Path) -> None:
        file = folder / OUTPUTS / f"{name}.txt"
        rows = [line.split() for line in file.read_text().splitlines()]
        file.write_text("\n".join(" ".join(map(str, each)) for each in change(rows)) + "\n")
        (folder / OUTPUTS / "manifest.json").unlink()

    return spoil


def first(value: str) -> Callable[[Any], Any]:
    """Replace the first value of a table."""
    return lambda rows: [[value, *rows[0][1:]], *rows[1:]]


def embeddings(change: Callable[[torch.Tensor], Any]) -> Spoil:
    """Save something else for the item vectors, without the manifest that would reveal it."""

    def spoil(folder: Path) -> None:
        file = folder / OUTPUTS / "all_embeddings.pt"
        torch.save(change(torch.load(file, weights_only=True)), file)
        (folder / OUTPUTS / "manifest.json").unlink()

    return spoil


def archive(*members: tuple[str, str], name: str = "ml.zip") -> Spoil:
    """Write a zip with a good u.data and u.item, and these members."""

    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("ml-100k/u.data", "".join(f"1\t{i}\t3\t{i}\n" for i in range(1, 7)))
            file.writestr("ml-100k/u.item", "".join(f"{i}|Film {i}\n" for i in range(1, 7)))
            for member, content in members:
                file.writestr(member, content)

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """Spoil one after the other."""
    return lambda folder: [spoil(folder) for spoil in spoils]
