"""Model cards: a ``README.md`` beside a model's weights, with the front matter that the Hugging Face Hub reads.

A card states what the run recorded: the dataset, the options, the manifest of the teacher outputs, and the validation.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2rec.core.files import read_object, without_secrets
from llm2rec.core.git_info import git_state, library_versions
from llm2rec.core.hub import PLACE, is_hub_name
from llm2rec.core.run import Run
from llm2rec.data import RecData
from llm2rec.student.models import MODELS

__all__ = ["Training", "best_validation", "student_card", "teacher_card", "training_on"]

_TUNINGS = {
    "ilora": "instance-wise LoRA experts, mixed for each user by a gate (iLoRA, arXiv 2408.10159)",
    "lora": "one LoRA (arXiv 2106.09685)",
    "none": "no adapter",
}
_RANKING_LOSSES = {
    "weighted_bce": "the ranking distillation of DLLM2Rec (arXiv 2405.00338)",
    "listwise": "listwise ranking distillation (KL divergence from the teacher's distribution)",
    "ranknet": "pairwise ranking distillation (RankNet)",
    "margin": "pairwise ranking distillation (margin loss)",
}


@dataclass(frozen=True)
class Training:
    """Training data and validation metrics of a model.

    Attributes:
        dataset: Name of the dataset.
        fingerprint: The dataset's fingerprint.
        split: How the dataset was split.
        n_items: Items of the catalogue, N.
        n_rows: Training rows.
        n_validation: Validation rows.
        seed: Seed of the run.
        excluded: Items excluded from the validation rankings: "items seen before", "items of the history", "no items".
        metrics: Validation metrics of the kept weights; empty if the model was not validated.
        n_candidates: Number of candidates that targets were ranked among; 0 for the whole catalogue.
    """

    dataset: str
    fingerprint: str
    split: str
    n_items: int
    n_rows: int
    n_validation: int
    seed: int
    excluded: str
    metrics: Mapping[str, float]
    n_candidates: int = 0


def training_on(data: RecData, run: Run, n_rows: int | None = None, n_validation: int | None = None) -> Training:
    """Training data and validation metrics of a run, after its last validation.

    Args:
        data: The dataset.
        run: The run.
        n_rows: Training rows; None for all.
        n_validation: Validation rows; None for all.
    """
    rows, validation = (len(data.splits[split]) for split in ("train", "validation"))
    return Training(
        dataset=data.name,
        fingerprint=data.fingerprint,
        split=str(data.manifest["settings"]["split"]),
        n_items=data.n_items,
        n_rows=min(rows, n_rows or rows),
        n_validation=min(validation, n_validation or validation),
        seed=run.config["seed"],
        excluded="items seen before" if run.masks_seen else "no items",
        metrics=best_validation(run.folder),
    )


def best_validation(run_folder: Path) -> dict[str, float]:
    """Validation metrics of the weights that a run kept, by name; empty if it validated nothing.

    Args:
        run_folder: The run's folder, with ``metrics/validation.json`` if it trained.
    """
    file = run_folder / "metrics" / "validation.json"
    if not file.is_file():
        return {}
    validation = read_object(file, "best_step", "history")
    best: dict[str, float] = next(
        (entry for entry in validation["history"] if entry["step"] == validation["best_step"]), {}
    )
    return {name.removeprefix("val/"): value for name, value in best.items() if name.startswith("val/")}


def student_card(
    name: str,
    raw_ids: Sequence[str],
    max_length: int,
    training: Training,
    settings: Mapping[str, Any],
    teacher: Mapping[str, Any] | None = None,
    *,
    reads: bool = False,
) -> str:
    """Write the card of a student.

    Args:
        name: Its name in `MODELS`.
        raw_ids: Ids of some items of its catalogue, for the example.
        max_length: Longest history that it reads, in items.
        training: Training data and validation metrics.
        settings: Training options by group, without paths; ``distill`` is the recipe of a distilled student.
        teacher: Manifest of the teacher outputs that it was distilled from, empty if they have none; None for a student
            that was trained on its own task alone.
        reads: Whether it reads the texts of new items.
    """
    model, title, distilled, tags = MODELS[name].__name__, "", "", list[str]()
    if teacher is not None:
        (kind, described), (parts, tags) = _teacher(teacher), _recipe(settings["distill"])
        title, distilled = f", distilled from {kind}", f", distilled from {described} by {_listed(parts)}"
    return _card(
        title=f"{model} for {training.dataset}{title}",
        lead=f"A small sequential recommender: {model} trained with llm2rec on `{training.dataset}`{distilled}. "
        "It reads a history of items and ranks the catalogue, in ids and titles.",
        tags=["sequential-recommendation", name, *tags],
        example="import llm2rec\n"
        f'student = llm2rec.Recommender.load("{PLACE}")\n'
        f"print(student.recommend_one({list(raw_ids)!r}, k=10))",
        limits=[
            "It knows the items of its training data and new items by their titles, which its language model encodes "
            "(`items=new.csv`)."
            if reads
            else "It knows only the items of its training data; new items need another training.",
            f"It reads the {max_length} most recent items of a history, in their order: no user, time or context. It "
            "makes no recommendations for a user without history.",
            "It reproduces the biases of its data, such as the popularity of items. Fairness was not evaluated.",
        ],
        training=training,
        settings=settings,
    )


def teacher_card(
    llm: str,
    source: str,
    tuning: str,
    objective: str,
    training: Training,
    settings: Mapping[str, Any],
    *,
    is_trained: bool = True,
) -> str:
    """Write the card of a teacher.

    Args:
        llm: Name of the language model among this project's.
        source: Folder or Hub id of the language model; a folder is not written to the card.
        tuning: ``ilora``, ``lora`` or ``none``.
        objective: ``item`` or ``title``.
        training: Training data and validation metrics.
        settings: Training options, without paths.
        is_trained: Whether any weights were trained.
    """
    base_model = source if is_hub_name(source) else None
    model = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{llm}`"
    task = "scores the whole catalogue" if objective == "item" else "picks an item and writes its title"
    how = "trained with llm2rec on" if is_trained else "used by llm2rec without training on"
    return _card(
        title=f"{llm} as a recommender for {training.dataset}",
        lead=f"A language model as a recommender: {model} with {_TUNINGS[tuning]}, {how} `{training.dataset}`. It "
        f"reads the titles of a history and {task}. This folder does not contain the weights of the language model"
        f"{', only the weights that were trained' if is_trained else ''}.",
        tags=["sequential-recommendation", "peft", *([tuning] if tuning != "none" else []), f"{objective}-objective"],
        example="import llm2rec\n"
        'data = llm2rec.load_data("data/processed/...")  # the dataset it was trained on: the fingerprint below\n'
        f'print(llm2rec.TeacherRecommender.load("{PLACE}", data).recommend_one(["an id", "another"], k=10))',
        limits=[
            "It needs its language model, under that model's own terms, and the dataset whose titles it ranks.",
            "It ranks the items of its dataset only; other items need another training.",
            "A recommendation takes a pass through the language model; a student distilled from it is faster to serve.",
            "It inherits the biases of the language model and of its data. Fairness was not evaluated.",
        ],
        training=training,
        settings=settings,
        base_model=base_model,
    )


def _teacher(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of teacher that a manifest of teacher outputs names, and a description."""
    if "members" in manifest:
        runs = [member for member in manifest["members"] if member.get("kind") not in ("neighbours", "titles")]
        labels = Counter(str(member.get("label", "student")) for member in runs)
        parts = [f"{count} {label}" for label, count in labels.items()]
        shares = {member["kind"]: member["share"] for member in manifest["members"] if member not in runs}
        if (share := shares.get("neighbours", manifest.get("neighbours", 0))) > 0:  # earlier versions: beside members
            parts.append(f"item neighbours with weight {share:.2g}")
        if (share := shares.get("titles", 0)) > 0:
            llm = next(member["llm"] for member in manifest["members"] if member.get("kind") == "titles")
            parts.append(f"title neighbours by `{llm}` with weight {share:.2g}")
        kind, described = "an ensemble", f"an ensemble of {_listed(parts)}"
    elif "objective" in manifest:
        kind = "a language model"
        described = f"{kind} with {_TUNINGS.get(str(manifest.get('tuning')), 'an unknown adapter')}"
    else:
        kind, described = "a teacher", "a teacher of unknown kind"
    return kind, f"the teacher `{manifest['teacher']}` ({described})" if "teacher" in manifest else described


def _recipe(distill: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The losses and item vectors that a recipe takes from the teacher, in words, and tags for them."""
    ranking, embedding = distill.get("ranking", {}), distill.get("embedding", {})
    parts, of_dllm2rec = list[str](), False
    if ranking.get("weight", 0) > 0:
        parts.append(_RANKING_LOSSES[ranking["loss"]])
        of_dllm2rec = ranking["loss"] == "weighted_bce"
    if embedding.get("fusion_scale", 0) != 0 and embedding.get("fusion") == "frozen":
        parts.append("the teacher's item vectors in columns that are not trained (after AlphaFuse, arXiv 2504.19218)")
    elif embedding.get("fusion_scale", 0) != 0:
        also = "" if of_dllm2rec else " of DLLM2Rec (arXiv 2405.00338)"
        parts.append(f"the fusion of item vectors with the teacher's{also}")
        of_dllm2rec = True
    if embedding.get("alignment_weight", 0) > 0:
        parts.append(f"the alignment of item vectors with the teacher's ({embedding['alignment']})")
    if embedding.get("initialise", "none") != "none":
        parts.append(f"item vectors initialised from the teacher's ({embedding['initialise']})")
    return parts, ["distillation", *(["dllm2rec"] if of_dllm2rec else [])]


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _card(
    title: str,
    lead: str,
    tags: Sequence[str],
    example: str,
    limits: Sequence[str],
    training: Training,
    settings: Mapping[str, Any],
    base_model: str | None = None,
) -> str:
    """Write a card, without home folders and anything that looks like a secret.

    Args:
        title: Heading, and the model's name in the front matter.
        lead: What the model is and does.
        tags: Front-matter tags in addition to ``llm2rec`` and ``recommendation``.
        example: Python code that loads the model from `PLACE` and uses it.
        limits: Limitations, a sentence each.
        training: Training data and validation metrics.
        settings: Training options, plain values without paths.
        base_model: Hub id of the base model, if it has one.
    """
    text = f"""---
{_front_matter(title, tags, training, base_model)}
---

# {title}

{lead}

## Usage

```python
{example}
```

## Training data

Dataset `{training.dataset}` (fingerprint `{training.fingerprint[:12]}`): {training.n_rows:,} training rows over \
{training.n_items:,} items, split `{training.split}`. The terms of use and the biases of this data apply to the model.

```json
{json.dumps(settings, indent=2, ensure_ascii=False)}
```

## Validation

{_validation(training)}

## Limitations

{chr(10).join(f"- {each}" for each in limits)}

## Provenance

{_provenance(training.seed)}
"""
    return str(without_secrets(text))


def _provenance(seed: int) -> str:
    state = git_state()
    commit = f", commit `{state['commit']}`{' with local changes' if state['dirty'] else ''}" if state["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return f"llm2rec{commit}; seed {seed}; {versions}."


def _validation(training: Training) -> str:
    if not training.metrics:
        return "The model was not validated."
    ranked = f"Full ranking of all {training.n_items:,} items, {training.excluded} excluded"
    if training.n_candidates:
        ranked = f"Targets among {training.n_candidates} candidates drawn at random"
    return (
        f"{ranked}, for {training.n_validation:,} validation rows. These numbers selected the weights, so they are "
        "optimistic. The test split was not read.\n\n" + _table(training.metrics)
    )


def _front_matter(title: str, tags: Sequence[str], training: Training, base_model: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # imported here: it takes half a second

    results = [
        EvalResult(
            task_type="recommendation",
            task_name=f"next item, {f'{among} candidates' if (among := training.n_candidates) else 'full ranking'}",
            dataset_type=training.dataset,
            dataset_name=training.dataset,
            dataset_split="validation",
            dataset_args={"fingerprint": training.fingerprint},
            metric_type=name,
            metric_name=name.upper(),
            metric_value=round(value, 6),
        )
        for name, value in training.metrics.items()
    ]
    adapts: dict[str, Any] = {"base_model": base_model, "base_model_relation": "adapter"} if base_model else {}
    data = ModelCardData(
        library_name="llm2rec",
        tags=["llm2rec", "recommendation", *tags],
        model_name=title,
        eval_results=results or None,
        **adapts,
    )
    return str(data.to_yaml())


def _table(metrics: Mapping[str, float]) -> str:
    lines = [f"| {name.upper()} | {value:.4f} |" for name, value in metrics.items()]
    return "\n".join(["| metric | validation |", "|---|---|", *lines])
