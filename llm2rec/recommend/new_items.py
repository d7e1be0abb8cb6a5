"""Items added after training: their names, and their vectors from their texts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from llm2rec.core.errors import ConfigError, DataError
from llm2rec.core.logging import quiet_libraries
from llm2rec.data import CsvTables
from llm2rec.recommend.names import ItemNames
from llm2rec.recommend.settings import EncoderSettings
from llm2rec.student.reading import TextReader

__all__ = ["NewItems", "read_new_items"]

logger = logging.getLogger("llm2rec.recommend")


@dataclass(frozen=True)
class NewItems:
    """Names and texts of new items.

    Attributes:
        raw_ids: Their ids, each once.
        titles: Their titles.
        texts: What a language model reads of them.
    """

    raw_ids: list[str]
    titles: list[str]
    texts: list[str]

    def after(self, names: ItemNames) -> ItemNames:
        """The names of the known items and of these.

        Raises:
            DataError: If an id is known already.
        """
        known = set(names.raw_ids).intersection(self.raw_ids)
        if known:
            first = next(raw_id for raw_id in self.raw_ids if raw_id in known)
            raise DataError(
                f"{len(known)} of {len(self.raw_ids)} ids of `items` are items that the student knows, such as "
                f"{first!r}; leave them out."
            )
        new = pa.table({"raw_id": self.raw_ids, "title": self.titles})
        return ItemNames(pa.concat_tables([names.table(), new.cast(names.table().schema)]))

    def vectors(self, reader: TextReader, place: EncoderSettings, device: torch.device) -> dict[str, Tensor]:
        """Their vectors for each item table, ``(M, D)``, on the CPU.

        Args:
            reader: What the student has learned to make of texts.
            place: Where the language model is.
            device: Where it runs.

        Raises:
            ConfigError: If the language model cannot be loaded.
            CheckpointError: If it is not the one that encoded the titles of training.
        """
        # Imports transformers, which takes seconds: serving needs it for new items only.
        from llm2rec.teacher.text_encoder import TextEncoder

        quiet_libraries()  # transformers was not there before
        if place.path is not None and len(reader.encoders) > 1:
            raise ConfigError(
                f"`llm.path` is {place.path!r}, but the student reads with {len(reader.encoders)} language models; "
                "leave it out."
            )
        encoded = []
        for about in reader.encoders:
            if place.path is not None:
                if not about.get("weights"):  # of a Hub id, whose commit a folder does not have
                    logger.warning("`llm.path=%s` cannot be compared with %s of training", place.path, about["name"])
                about = {**about, "source": place.path, "revision": None}
            try:
                encoder = TextEncoder.from_about(about, device, trust_remote_code=place.trust_remote_code)
            except ConfigError as error:
                raise ConfigError(
                    f"new items need the language model of training, {about['name']!r}: {error} If it has moved, name "
                    "its folder: `llm.path=FOLDER`."
                ) from error
            encoded.append(encoder.encode(self.texts))
        return reader.vectors(torch.cat(encoded, dim=1))


def read_new_items(items: Path | str | Mapping[str, str], reader: TextReader | None) -> NewItems:
    """Read new items.

    Args:
        items: A table with the columns ``item_id`` and ``title``, and those of `dataset.text_columns` in training, in a
            format of ``dataset=csv``; or texts by id, which are titles too.
        reader: What the student has learned to make of texts; None if it does not read.

    Raises:
        ConfigError: If the student does not read texts.
        DataError: If the file cannot be read, or an id or title is empty or an id occurs twice.
    """
    if reader is None:
        raise ConfigError(
            "`items` is given, but this student does not read texts: it knows items by their ids alone. Distil one "
            "from teacher outputs with vectors of titles, with `distill=reading` or `distill.embedding.fusion_scale`."
        )
    new = _from_texts(items) if isinstance(items, Mapping) else _from_table(Path(items), reader)
    if not new.raw_ids:
        raise DataError("`items` is empty; give at least one item, or leave it out.")
    return new


def _from_texts(items: Mapping[str, str]) -> NewItems:
    titles = [" ".join(text.split()) for text in items.values()]
    if empty := [raw_id for raw_id, title in zip(items, titles, strict=True) if not (raw_id.strip() and title)]:
        raise DataError(f"`items` has an empty id or text: {empty[0]!r}; give every item both.")
    return NewItems(list(items), titles, titles)


def _from_table(file: Path, reader: TextReader) -> NewItems:
    spec = CsvTables(interactions="", items=str(file), text_columns=reader.text_columns, text_length=reader.text_length)
    try:
        frame = spec.read_items()
    except DataError as error:
        raise DataError(
            f"new items: {error} (No options of `dataset` apply here: the columns are item_id and title.)"
        ) from error
    titles = frame["title"].tolist()
    return NewItems(frame["item_id"].tolist(), titles, frame["text"].tolist() if "text" in frame else titles)
