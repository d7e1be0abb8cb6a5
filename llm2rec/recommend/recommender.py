"""Recommend items with a finished student."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.hub import obtained
from llm2rec.core.ranking import Catalogue, Pairs
from llm2rec.core.run import described, read_record
from llm2rec.recommend.names import By, ItemNames, Recommendation, Unknown, check_choice
from llm2rec.recommend.new_items import read_new_items
from llm2rec.recommend.search import ExactSearch, HnswSearch, ItemSearch, SearchKind
from llm2rec.recommend.settings import EncoderSettings
from llm2rec.student.models import SequentialRecommender, load_student
from llm2rec.student.reading import TextReader, load_reader
from llm2rec.student.store import load_item_table, validated_mask

__all__ = ["Recommender", "finished_student", "finished_teacher"]

_BATCH_ROWS = 512


class Recommender:
    """A student that recommends in ids and titles. Item vectors are computed once, in the constructor.

    Args:
        model: The student, in evaluation mode, on the device to compute on.
        names: Ids and titles of its items.
        search: Item search; exact by default.
        mask_seen: Whether items of the history are excluded by default.
        reader: What the student has learned to make of texts, for `with_items`; None if it does not read.

    Raises:
        CheckpointError: If names and model differ in the number of items.
    """

    def __init__(
        self,
        model: SequentialRecommender,
        names: ItemNames,
        search: ItemSearch | None = None,
        mask_seen: bool = True,
        reader: TextReader | None = None,
    ) -> None:
        if len(names) != model.n_items:
            raise CheckpointError(
                f"the student knows {model.n_items} items, but items.arrow names {len(names)}; copy the whole folder."
            )
        self.model, self.names, self.mask_seen, self._reader = model, names, mask_seen, reader
        self._device = next(model.parameters()).device
        self._search = search or ExactSearch(Catalogue(model.output_items.vectors()))

    @classmethod
    def load(
        cls,
        run_folder: Path | str,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        search: SearchKind = "exact",
        index: Path | str | None = None,
        items: Path | str | Mapping[str, str] | None = None,
        llm: EncoderSettings | str | None = None,
    ) -> "Recommender":
        """Load the student of a finished run of `llm2rec.student` or `llm2rec.distill`.

        Args:
            run_folder: The run's folder, the student's in it, or a copy of either; nothing else is needed. Or an id on
                the Hugging Face Hub, ``user/name``.
            revision: Branch, tag or commit on the Hub.
            device: Where to compute.
            search: ``exact`` scores all items; ``hnsw`` is approximate (see `HnswSearch`).
            index: File of the index: read if it exists, otherwise built and written. None builds it each time.
            items: New items; see `with_items`. The file of the index stays that of the student's own items.
            llm: As of `with_items`.

        Returns:
            The recommender.

        Raises:
            CheckpointError: If the folder holds no finished student with the names of its items.
            HubError: If it cannot be fetched.
            ConfigError: If ``search`` is unknown, or an exact search is given an index; and as `with_items`.
            DataError: As `with_items`.
        """
        check_choice("search", search, SearchKind)
        if index is not None and search == "exact":
            raise ConfigError(f"`index` is {str(index)!r}, but an exact search uses none; set `search=hnsw`.")
        folder = finished_student(run_folder, revision)
        names, model = ItemNames(load_item_table(folder)), load_student(folder).to(device)
        found = None
        if search == "hnsw":
            catalogue = Catalogue(model.output_items.vectors())
            found = HnswSearch.load_or_build(catalogue, None if index is None else Path(index))
        known = cls(model, names, found, validated_mask(folder), load_reader(folder))
        return known if items is None else known.with_items(items, llm)

    def with_items(
        self, items: Path | str | Mapping[str, str], llm: EncoderSettings | str | None = None
    ) -> "Recommender":
        """A recommender that also knows new items, by their texts, without training.

        New items are recommended and may be in histories. Their texts are encoded as those of training were, and the
        student's projection makes item vectors of them.

        Args:
            items: File of a table with the columns ``item_id`` and ``title`` (and those of `dataset.text_columns`, if
                the dataset had some), in a format of ``dataset=csv``; or texts by id.
            llm: The language model that encoded the texts of training, a folder; None for where it was then.

        Returns:
            Another recommender; this one does not change.

        Raises:
            ConfigError: If the student does not read texts, or the language model cannot be loaded.
            CheckpointError: If it is another language model than that of training.
            DataError: If the file cannot be read, an id is empty, known or occurs twice, or a title is empty.
        """
        reader = self._reader
        new = read_new_items(items, reader)
        names = new.after(self.names)
        assert reader is not None
        model = copy.deepcopy(self.model)
        place = llm if isinstance(llm, EncoderSettings) else EncoderSettings(llm)
        model.add_items(new.vectors(reader, place, self._device))
        found = None
        if isinstance(self._search, HnswSearch):
            found = self._search.with_items(Catalogue(model.output_items.vectors()))
        return Recommender(model, names, found, self.mask_seen, reader)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        by: By = "id",
        unknown: Unknown = "error",
        mask_seen: bool | None = None,
    ) -> list[list[Recommendation]]:
        """Find the best items for each of several histories.

        Args:
            histories: Lists, arrays or Series of raw ids (or titles, see ``by``), oldest first. The model reads the
                most recent ones, as many as it was trained for.
            k: How many items; a history that leaves fewer gets fewer.
            by: ``id`` or ``title``: what the histories consist of.
            unknown: ``error`` refuses items that the model was not trained on, ``drop`` ignores them.
            mask_seen: Whether all items of the history are excluded, also those that the model does not read; None
                does as the student was validated (`validated_mask`).

        Returns:
            A list for each history, best first; of equal scores the lower item id first.

        Raises:
            UnknownItemError: If an item is unknown; the message suggests similar titles.
            DataError: If a history is empty, or none of its items is known.
            ConfigError: If ``k`` or a choice is invalid.
        """
        k = self.names.check_k(k)
        items = self.names.histories(histories, by, unknown)
        mask_seen = self.mask_seen if mask_seen is None else mask_seen
        found: list[list[Recommendation]] = []
        for start in range(0, len(items), _BATCH_ROWS):
            found += self._best(items[start : start + _BATCH_ROWS], k, mask_seen)
        return found

    def recommend_one(
        self,
        history: Sequence[str],
        k: int = 10,
        *,
        by: By = "id",
        unknown: Unknown = "error",
        mask_seen: bool | None = None,
    ) -> list[Recommendation]:
        """Find the best items for one history; see `recommend`.

        Args:
            history: List, array or Series of raw ids (or titles, see ``by``), oldest first.
            k: How many items.
            by: ``id`` or ``title``.
            unknown: ``error`` or ``drop``.
            mask_seen: Whether items of the history are excluded; as in `recommend`.

        Returns:
            The items, best first.

        Raises:
            UnknownItemError: As `recommend`, and so the others.
            DataError: If the history is empty, or none of its items is known.
            ConfigError: If ``k`` or a choice is invalid.
        """
        return self.recommend([history], k, by=by, unknown=unknown, mask_seen=mask_seen)[0]

    def recall(self, histories: Sequence[Sequence[str]], k: int = 10, *, by: By = "id") -> float:
        """Share of the exactly best ``k`` items that this recommender's search finds, over all histories.

        It is 1 for an exact search. Items of the history are excluded as in `recommend`.

        Args:
            histories: As in `recommend`.
            k: How many items.
            by: ``id`` or ``title``.

        Returns:
            The share, 0 to 1.
        """
        exact = Recommender(self.model, self.names, mask_seen=self.mask_seen)
        found, best = (each.recommend(histories, k, by=by) for each in (self, exact))
        hits = sum(
            len({item.item_id for item in mine} & {item.item_id for item in theirs})
            for mine, theirs in zip(found, best, strict=True)
        )
        return hits / sum(map(len, best))

    @torch.inference_mode()
    def _best(self, histories: list[list[int]], k: int, mask_seen: bool) -> list[list[Recommendation]]:
        seen = self._pairs(histories) if mask_seen else None
        scores, items = self._search.top_k(self._users(histories), k, seen)
        raw_ids, titles = self.names.raw_ids, self.names.titles
        return [
            [Recommendation(raw_ids[i], titles[i], score) for score, i in zip(row_scores, row, strict=True) if i >= 0]
            for row_scores, row in zip(scores.tolist(), items.tolist(), strict=True)
        ]

    def _users(self, histories: list[list[int]]) -> Tensor:
        """User vectors ``(B, D)`` of histories, truncated to the length that the model reads."""
        cut = [history[-self.model.max_length :] for history in histories]
        lengths = [len(history) for history in cut]
        padded = np.full((len(cut), max(lengths)), self.model.n_items, np.int64)
        for row, history in enumerate(cut):
            padded[row, : len(history)] = history
        users: Tensor = self.model(
            torch.from_numpy(padded).to(self._device), torch.tensor(lengths, device=self._device)
        )
        return users

    def _pairs(self, histories: list[list[int]]) -> Pairs:
        """Rows and items of all histories, untruncated."""
        rows = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        items = np.concatenate([np.array(history, np.int64) for history in histories])
        return torch.from_numpy(rows).to(self._device), torch.from_numpy(items).to(self._device)


def finished_student(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a finished student.

    Args:
        place: Folder of a finished run of `llm2rec.student` or `llm2rec.distill`, the student's folder in it or a copy
            of that, or an id on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        CheckpointError: If there is none.
        HubError: If it cannot be fetched.
    """
    return _finished(obtained(place, revision), "student", "student", "distill")


def finished_teacher(place: Path | str, revision: str | None = None) -> Path:
    """The folder of a finished teacher; as `finished_student`, of a run of `llm2rec.teacher`."""
    return _finished(obtained(place, revision), "teacher", "teacher")


def _finished(folder: Path, part: str, *stages: str) -> Path:
    if (folder / "config.json").is_file() and not (folder / "run.json").is_file():  # a model without its run
        return folder
    if not (folder / "run.json").is_file():
        raise CheckpointError(
            f"{folder} is not a run folder (it has no run.json); give one, such as result/result_..., the folder of a "
            f"{part}, or an id on the Hugging Face Hub."
        )
    record = read_record(folder)
    if record["stage"] not in stages or record["status"] != "finished":
        raise CheckpointError(
            f"{folder.name} is {described(record)}; expected a finished run of {' or '.join(stages)}."
        )
    return folder / part
