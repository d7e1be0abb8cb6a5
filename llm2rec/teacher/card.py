"""The model card of a teacher."""

from collections.abc import Mapping
from typing import Any

from llm2rec.core.card import PLACE, Training, model_card
from llm2rec.core.hub import is_hub_name

__all__ = ["teacher_card"]

_TUNINGS = {
    "ilora": "instance-wise LoRA experts, mixed for each user by a gate (iLoRA, arXiv 2408.10159)",
    "lora": "one LoRA (arXiv 2106.09685)",
    "none": "no adapter",
}


def teacher_card(
    llm: str, source: str, tuning: str, objective: str, training: Training, settings: Mapping[str, Any]
) -> str:
    """Write the card of a teacher.

    Args:
        llm: Name of the language model among this project's.
        source: Folder or Hub id of the language model; a folder is not written to the card.
        tuning: ``ilora``, ``lora`` or ``none``.
        objective: ``item`` or ``title``.
        training: Training data and validation metrics.
        settings: Training options, without paths.
    """
    base_model = source if is_hub_name(source) else None
    model = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{llm}`"
    task = "scores the whole catalogue" if objective == "item" else "picks an item and writes its title"
    return model_card(
        title=f"{llm} as a recommender for {training.dataset}",
        lead=f"A language model as a recommender: {model} with {_TUNINGS[tuning]}, trained with llm2rec on "
        f"`{training.dataset}`. It reads the titles of a history and {task}. Here are the adapter and what else was "
        "trained; the language model itself is not.",
        tags=["sequential-recommendation", "peft", *([tuning] if tuning != "none" else []), f"{objective}-objective"],
        example="import llm2rec\n"
        'data = llm2rec.load_data("data/processed/...")  # the dataset it was trained on: the fingerprint below\n'
        f'print(llm2rec.TeacherRecommender.load("{PLACE}", data).recommend_one(["an id", "another"], k=10))',
        limits=[
            "It needs its language model, under that model's own terms, and the dataset whose titles it ranks.",
            "Item vectors and head belong to the items of its training data; others need another training.",
            "An answer takes a pass through the language model; for serving there are students, distilled from it.",
            "It inherits what the language model learnt elsewhere, its biases among it, and was not looked at for "
            "fairness or for what a ranking does to people.",
        ],
        training=training,
        settings=settings,
        base_model=base_model,
    )
