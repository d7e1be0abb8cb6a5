"""Sample recommendations as titles, logged to TensorBoard."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from llm2rec.core.train.engine import Engine
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import SequentialRecommender

__all__ = ["Answers", "log_recommendations", "recommendation_table", "student_answers"]

_ROWS, _ITEMS = 5, 5  # users shown, and items shown of their history and of what is recommended
Answers = Callable[[NDArray[np.int32], NDArray[np.int32], int], Tensor]


def log_recommendations(engine: Engine, answers: Answers, rows: Rows, items: Dataset) -> None:
    """Log the recommendations for the first rows of a split to TensorBoard; call it on all processes.

    Args:
        engine: Engine of the run; does nothing if TensorBoard is off.
        answers: Gives for histories ``(B, L)`` of lengths ``(B,)`` the k items most likely to come next, shape
            ``(B, k)``, best first.
        rows: The split.
        items: Items of `llm2rec.data`, with column ``title``.
    """
    if engine.has_tensorboard:
        history, lengths = rows.histories(np.arange(min(_ROWS, len(rows))))
        best = answers(history, lengths, min(_ITEMS, rows.n_items)).tolist()
        read = [each[:length][-_ITEMS:].tolist() for each, length in zip(history, lengths, strict=True)]
        table = recommendation_table(read, rows.targets[:_ROWS].tolist(), best, items)
        engine.log_text("recommendations", table)


def student_answers(model: SequentialRecommender, mask_seen: bool) -> Answers:
    """Best items of a student in evaluation mode, for `log_recommendations`; ``mask_seen`` excludes the history."""
    return partial(_best_items, model, mask_seen)


def _best_items(
    model: SequentialRecommender, mask_seen: bool, history: NDArray[np.int32], lengths: NDArray[np.int32], k: int
) -> Tensor:
    device = next(model.parameters()).device
    read, counts = (torch.from_numpy(each).to(device, torch.int64) for each in (history, lengths))
    with torch.inference_mode():
        scores = model.score(model(read, counts))
        if mask_seen:
            with_padding = nn.functional.pad(scores, (0, 1))  # a column for the padding id
            scores = with_padding.scatter(1, read, -torch.inf)[:, :-1]
        return scores.topk(k, dim=1).indices


def recommendation_table(
    histories: Sequence[Sequence[int]], targets: Sequence[int], answers: Sequence[Sequence[int]], items: Dataset
) -> str:
    """Put histories, what came next and what is recommended into a table of titles.

    Args:
        histories: Item ids of each row, oldest first.
        targets: What came next.
        answers: What is recommended, best first.
        items: Items of `llm2rec.data`, with column ``title``.

    Returns:
        Markdown. A target that is among the answers is set in bold there.
    """

    def titles(numbers: Sequence[int], bold: int | None = None) -> str:
        # A bar would begin another column.
        named = [(number, items[number]["title"].replace("|", "\\|")) for number in numbers]
        return "; ".join(f"**{title}**" if number == bold else title for number, title in named)

    rows = [
        f"| {titles(history)} | {titles([target])} | {titles(answer, bold=target)} |"
        for history, target, answer in zip(histories, targets, answers, strict=True)
    ]
    return "\n".join(["| history, its end | came next | recommended, best first |", "|---|---|---|", *rows])
