"""``--help`` of every command: what it does, an example, and the options that matter with a line each.

Descriptions are those of the dataclasses' docstrings, values those of the composed configuration.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from llm2rec.core.paths import conf_folder

__all__ = ["TOPICS", "Topic", "describe", "descriptions", "help_text"]

_WIDTH = 118
_COLUMN = 44  # where descriptions begin


@dataclass(frozen=True)
class Topic:
    """What ``--help`` of a command shows besides its docstring.

    Attributes:
        example: Its overrides in an example.
        options: Full names of options; those that the chosen files lack are left out.
    """

    example: str
    options: tuple[str, ...]


_DATA = ("dataset.interactions", "dataset.items", "dataset.min_rating", "dataset.k_core", "dataset.history_length",
         "dataset.split")  # fmt: skip
_TRAINING = ("epochs", "batch_size", "micro_batch_size", "learning_rate", "patience")
_STUDENT = (*(f"student.training.{name}" for name in _TRAINING), "student.model.width", "student.model.dropout",
            "student.loss.name")  # fmt: skip
_RUN = ("metrics.select_on", "metrics.mask_seen", "seed", "resume", "finish", "reuse")
_MEMBERS = ("students", "neighbours", "titles", "teachers")
_SELECTION = ("active.budget", "active.pool")

TOPICS = {
    "data": Topic("dataset=csv dataset.interactions=visits.csv dataset.items=items.csv", (*_DATA, "reuse")),
    "student": Topic("dataset=toy student=gru4rec student.training.epochs=20", (*_STUDENT, *_RUN)),
    "teacher": Topic(
        "dataset=toy llm=minilm llm.path=FOLDER teacher.training.epochs=1",
        (
            "llm.path", "llm.pooling", "teacher.objective", "teacher.tuning", "teacher.precision",
            "teacher.gradient_checkpointing", "teacher.train_rows", "teacher.recommender_run", "teacher.adapter.r",
            "teacher.adapter.num_experts", "teacher.adapter.target_modules",
            *(f"teacher.training.{name}" for name in _TRAINING), "teacher.export.enabled", "teacher.export.top_k",
            *_SELECTION, *_RUN,
        ),
    ),
    "ensemble": Topic(
        "dataset=toy llm=minilm llm.path=FOLDER 'runs=[result/result_A,result/result_B]'",
        (
            "runs", "llm.path", "ensemble.name", *(f"ensemble.{name}.share" for name in _MEMBERS),
            "ensemble.students.temperature", "ensemble.vectors", "ensemble.top_k", *_SELECTION, *_RUN,
        ),
    ),
    "distill": Topic(
        "dataset=toy distill=listwise_reading",
        (
            "distill.teacher_outputs", "distill.ranking.loss", "distill.ranking.weight", "distill.ranking.top_k",
            "distill.ranking.temperature", *_SELECTION, *_STUDENT, *_RUN,
        ),
    ),
    "distill.export_dllm2rec": Topic(
        "dataset=toy distill=dllm2rec_code", ("distill.teacher_outputs", "paths.dllm2rec_dir")
    ),
    "evaluate": Topic(
        "dataset=toy 'runs=[result/result_A,result/result_B]' report.baseline=result/result_A",
        ("runs", "report.baseline", "metrics.ks", "metrics.mask_seen", "metrics.n_candidates"),
    ),
    "plan": Topic(
        "dataset=toy llm=llama2_7b gpus=4 plan.card=h100",
        (
            "gpus", "plan.card", "plan.launch", "plan.utilisation", "plan.n_items", "plan.n_rows", "plan.prompt_tokens",
            "llm.path", "teacher.objective", "teacher.precision", "teacher.training.epochs", "teacher.train_rows",
        ),
    ),
    "recommend": Topic(
        "run=result/result_A 'history=[item1,item2]' k=5",
        (
            "run", "history", "histories", "output", "k", "by", "unknown", "mask_seen", "search", "index", "export",
            "formats", "revision",
        ),
    ),
    "share": Topic("run=result/result_A repo=user/name", ("run", "repo", "private", "base_model", "message")),
    "tune": Topic(
        "stage=student n_trials=20 dataset=toy student.model.dropout=0.1,0.2,0.4 student=sasrec,gru4rec",
        ("stage", "n_trials", "name", "search_seed", "prune", "jobs", "storage"),
    ),
}  # fmt: skip


def descriptions(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass, and those of its bases, say of each option."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        docstring = _documented_elsewhere(*each.DOCUMENTED_IN) if hasattr(each, "DOCUMENTED_IN") else each.__doc__
        entries = re.split(r"^(?:Attributes|Args):\n", inspect.cleandoc(docstring or ""), flags=re.MULTILINE)[1:]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", "".join(entries), re.MULTILINE):
            found[name] = re.sub(r"\bNone\b", "null", " ".join(text.split())).replace("``", "`")
    return found


def _documented_elsewhere(file: str, name: str) -> str:
    """The docstring of a class whose module takes seconds to import."""
    tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return next(
        ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )


def describe(cfg: DictConfig, option: str) -> str | None:
    """The description of an option; None if the chosen files do not have it or do not read it."""
    parent, _, name = option.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if not is_dataclass(kind) or name not in {field.name for field in fields(kind)}:
        return None
    if any(rule.option is None and name in rule.names for rule in getattr(kind, "IGNORED", ())):
        return None
    return descriptions(kind)[name]


def help_text(cfg: DictConfig, name: str, about: str) -> str:
    """What ``--help`` prints.

    Args:
        cfg: The composed configuration, Hydra's part included.
        name: Name of the command, a key of `TOPICS`.
        about: What the command does.
    """
    topic = TOPICS[name]
    groups = [option.partition(".")[0] for option in topic.options if "." in option]
    lines = [about.replace("``", "`"), "", "Example:", f"  python -m llm2rec.{name} {topic.example}", ""]
    if choices := list(_choices(cfg, ["dataset"] * ("dataset" in cfg) + groups)):
        lines += ["== Choices (group=choice; the one after = is chosen) ==", *choices, ""]
    lines += ["== Options that matter (option=value; the value after = is set) =="]
    for option in topic.options:
        if (text := describe(cfg, option)) is not None:
            lines += _entry(f"{option}{_shown(cfg, option)}", text.split(". ")[0].rstrip(".") + ".")
    return "\n".join([*lines, "", "--cfg job shows every option; --info defaults shows the files they come from."])


def _entry(option: str, text: str) -> list[str]:
    indent = " " * _COLUMN
    if len(option) > _COLUMN - 4:
        return [f"  {option}", *textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {option}".ljust(_COLUMN), subsequent_indent=indent)


def _shown(cfg: DictConfig, option: str) -> str:
    """The value of an option as one would write it; interpolations as they are."""
    parent, _, name = option.rpartition(".")
    value = OmegaConf.to_container(OmegaConf.select(cfg, parent) if parent else cfg, resolve=False)[name]  # type: ignore[index, call-overload]
    if value == MISSING:
        return " (required)"
    if isinstance(value, list):
        return f"=[{','.join(map(str, value))}]"
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return f"={words[value] if value is None or isinstance(value, bool) else value}"


def _choices(cfg: DictConfig, groups: Sequence[str]) -> Iterator[str]:
    """The files of each group of `conf/` and the one chosen."""
    for group in dict.fromkeys(groups):
        names = sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
        if len(names) > 1:
            chosen = cfg.hydra.runtime.choices[group]
            yield from textwrap.wrap(f"{group}={chosen}: {', '.join(names)}", _WIDTH, initial_indent="  ",
                                     subsequent_indent="    ")  # fmt: skip
