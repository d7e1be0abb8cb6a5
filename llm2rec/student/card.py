"""The model card of a student."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm2rec.core.card import PLACE, Training, best_validation, model_card
from llm2rec.core.run import Run
from llm2rec.data import RecData
from llm2rec.student.models import MODELS

__all__ = ["student_card", "training_on"]


def training_on(data: RecData, run: Run, n_rows: int | None = None, n_validation: int | None = None) -> Training:
    """The training section of a card, at the end of a run.

    Args:
        data: The dataset.
        run: The run, after its last validation.
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
        left_out="items seen before" if run.config["metrics"]["mask_seen"] else "no items",
        metrics=best_validation(run.folder),
    )


def student_card(
    name: str,
    raw_ids: Sequence[str],
    max_length: int,
    training: Training,
    settings: Mapping[str, Any],
    teacher: str | None = None,
) -> str:
    """Write the card of a student.

    Args:
        name: Its name in `MODELS`.
        raw_ids: Ids of some items of its catalogue, for the example.
        max_length: Longest history that it reads, in items.
        training: Training data and validation metrics.
        settings: Training options, without paths.
        teacher: Name of its teacher, if it was distilled.
    """
    named = MODELS[name].__name__
    distilled = f", distilled from the teacher `{teacher}` with DLLM2Rec (arXiv 2405.00338)" if teacher else ""
    return model_card(
        title=f"{named} for {training.dataset}" + (", distilled from a language model" if teacher else ""),
        lead=f"A small sequential recommender: {named} trained with llm2rec on `{training.dataset}`{distilled}. "
        "It reads a history of items and ranks the catalogue, in ids and titles.",
        tags=["sequential-recommendation", name, *(["distillation", "dllm2rec"] if teacher else [])],
        example="import llm2rec\n"
        f'student = llm2rec.Recommender.load("{PLACE}")\n'
        f"print(student.recommend_one({list(raw_ids)!r}, k=10))",
        limits=[
            "It knows the items of its training data and no others; new items need another training.",
            f"It reads the {max_length} most recent items of a history, in their order, and nothing else: no user, no "
            "time, no context. A user without history gets no answer.",
            "It repeats what its data holds, the popularity of items among it; it was not looked at for fairness or "
            "for what a ranking does to people.",
        ],
        training=training,
        settings=settings,
    )
