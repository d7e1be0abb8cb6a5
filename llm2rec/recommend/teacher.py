"""Recommend items with a finished teacher."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llm2rec.core.hub import is_hub_id
from llm2rec.data import RecData
from llm2rec.recommend.names import By, ItemNames, Recommendation, Unknown
from llm2rec.recommend.recommender import finished_teacher
from llm2rec.teacher.ilora_model import EXCLUDED
from llm2rec.teacher.interfaces import ITeacherRecommender
from llm2rec.teacher.store import load_teacher

__all__ = ["TeacherRecommender"]


class TeacherRecommender:
    """A teacher that recommends in ids and titles, like `Recommender`; one language-model pass per history.

    Args:
        model: The teacher, in evaluation mode.
        names: Ids and titles of its items.
        max_length: Most items of a history that it reads.
    """

    def __init__(self, model: ITeacherRecommender, names: ItemNames, max_length: int) -> None:
        self.model, self.names, self.max_length = model, names, max_length

    @classmethod
    def load(
        cls,
        run_folder: Path | str,
        data: RecData,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "TeacherRecommender":
        """Load the teacher of a finished run of `llm2rec.teacher`.

        Args:
            run_folder: The run's folder, the teacher's in it, or an id on the Hugging Face Hub, ``user/name``.
            data: The dataset it was trained on, whose titles it reads.
            revision: Branch, tag or commit on the Hub.
            device: Where to compute.

        Returns:
            The recommender.

        Raises:
            CheckpointError: If the folder holds no finished teacher, its language model is missing, or a
                teacher from the Hub needs a language model with custom code.
            HubError: If it cannot be fetched.
        """
        is_foreign = is_hub_id(run_folder)
        folder = finished_teacher(run_folder, revision)
        model, _ = load_teacher(folder, data, torch.device(device), is_foreign=is_foreign)
        return cls(model, ItemNames(data.items.with_format("arrow")[:]), data.history_length)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        by: By = "id",
        unknown: Unknown = "error",
        batch_size: int = 8,
    ) -> list[list[Recommendation]]:
        """Find the items that are likeliest to come next, for each of several histories.

        Args:
            histories: Lists, arrays or Series of raw ids (or titles, see ``by``), oldest first; the most recent ones
                are read.
            k: How many items; fewer where the teacher excludes the history, also what it does not read of it, and fewer
                remain.
            by: ``id`` or ``title``: what the histories consist of.
            unknown: ``error`` rejects items that are not in the data, ``drop`` ignores them.
            batch_size: Histories per forward pass.

        Returns:
            A list for each history, best first.

        Raises:
            UnknownItemError: If an item is unknown; the message suggests similar titles.
            DataError: If a history is empty, or none of its items is known.
            ConfigError: If ``k`` or a choice is invalid.
        """
        k = self.names.check_k(k)
        items = self.names.histories(histories, by, unknown)
        found: list[list[Recommendation]] = []
        for start in range(0, len(items), batch_size):
            found += self._best(items[start : start + batch_size], k)
        return found

    def recommend_one(
        self, history: Sequence[str], k: int = 10, *, by: By = "id", unknown: Unknown = "error"
    ) -> list[Recommendation]:
        """Find the likeliest items for one history; see `recommend`.

        Args:
            history: List, array or Series of raw ids (or titles, see ``by``), oldest first.
            k: How many items.
            by: ``id`` or ``title``.
            unknown: ``error`` or ``drop``.

        Returns:
            The items, best first.

        Raises:
            UnknownItemError: As `recommend`, and so the others.
            DataError: If the history is empty, or none of its items is known.
            ConfigError: If ``k`` or a choice is invalid.
        """
        return self.recommend([history], k, by=by, unknown=unknown)[0]

    def _best(self, histories: list[list[int]], k: int) -> list[list[Recommendation]]:
        read = [history[-self.max_length :] for history in histories]
        excludes = self.model.exclude_history
        unread = [set(whole) - set(end) if excludes else set() for whole, end in zip(histories, read, strict=True)]
        left = len(self.names) - (max(len(set(history)) for history in read) if excludes else 0)
        n_more = max(map(len, unread))  # may be found and are then dropped
        if k + n_more > left:  # a title search raises if fewer remain for any row
            if len(histories) > 1:
                return [found for history in histories for found in self._best([history], k)]
            if left == n_more:
                return [[]]
            k = left - n_more
        padded = np.full((len(read), self.max_length), len(self.names), np.int32)
        for row, history in enumerate(read):
            padded[row, : len(history)] = history
        best = self.model.best_items(padded, np.array([len(history) for history in read], np.int32), k + n_more)
        raw_ids, titles = self.names.raw_ids, self.names.titles
        return [
            [
                Recommendation(raw_ids[item], titles[item], score)
                for item, score in zip(row, scores, strict=True)
                if item not in dropped and score > -EXCLUDED / 2  # excluded items have a large negative score
            ][:k]
            for row, scores, dropped in zip(*(each.tolist() for each in best), unread, strict=True)
        ]
