"""Model cards: a ``README.md`` beside a model's weights, with the front matter that the Hugging Face Hub reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2rec.core.files import read_object, without_secrets
from llm2rec.core.git_info import git_state, library_versions

__all__ = ["CARD", "PLACE", "Training", "best_validation", "model_card"]

CARD = "README.md"
"""File name; the one file of a model's folder that people edit."""
PLACE = "FOLDER"
"""Placeholder in the example for the model's folder; `llm2rec.share` replaces it with the Hub id."""


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
        left_out: Items excluded from the validation rankings: "items seen before", "items of the history", "no items".
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
    left_out: str
    metrics: Mapping[str, float]
    n_candidates: int = 0


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


def model_card(
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
    state = git_state()
    commit = f"commit `{state['commit']}`{' with local changes' if state['dirty'] else ''}" if state["commit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    ranked = f"Full ranking of all {training.n_items:,} items, {training.left_out} left out"
    if training.n_candidates:
        ranked = f"Targets among {training.n_candidates} candidates drawn at random"
    validation = (
        f"{ranked}, for {training.n_validation:,} validation rows; these numbers chose the weights, so they flatter "
        "them. Test data was not opened.\n\n" + _table(training.metrics)
        if training.metrics
        else "It was not validated in its training."
    )
    text = f"""---
{_front_matter(title, tags, training, base_model)}
---

# {title}

{lead}

## How to load it

```python
{example}
```

## What it was trained on

Dataset `{training.dataset}` (fingerprint `{training.fingerprint[:12]}`): {training.n_rows:,} training rows over \
{training.n_items:,} items, split `{training.split}`. Whatever holds of this data (who is in it, what was shown to
them, its terms of use) holds of the model.

```json
{json.dumps(settings, indent=2, ensure_ascii=False)}
```

## How it validated

{validation}

## What it cannot do

{chr(10).join(f"- {each}" for each in limits)}

## What made it

llm2rec{f", {commit}" if commit else ""}; seed {training.seed}; {versions}.
"""
    return str(without_secrets(text))


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
