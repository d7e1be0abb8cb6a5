"""Write and read prepared tables in the format of `datasets`, part by part."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features

from llm2rec.core.logging import progress
from llm2rec.data._buckets import ROW
from llm2rec.data._spill import read_batches
from llm2rec.data.filtering import Sequences
from llm2rec.data.recdata import SEQUENCE_FEATURES, ContentHash, item_features
from llm2rec.data.splitting import EXAMPLE_FEATURES, SPLIT_NAMES, Span, build_examples

__all__ = ["hash_table", "write_items", "write_users"]

_ROWS_PER_BATCH = 1 << 15  # of interactions, about
_MOST_SHARDS = 64  # files of a table; `datasets` keeps all of them open
_SPAN = ("first", "stop", "first_example")

_FEATURES = {"sequences": SEQUENCE_FEATURES, **dict.fromkeys(SPLIT_NAMES, EXAMPLE_FEATURES)}


def write_items(folder: Path, sequences: Sequences, key: str) -> None:
    """Write the table of items."""
    items = {
        "item_id": pa.array(np.arange(len(sequences.item_ids), dtype=np.int32)),
        "raw_id": pa.array(sequences.item_ids, pa.string()),
        "title": pa.array(sequences.titles, pa.string()),
        **{name: pa.array(values) for name, values in sequences.item_columns.items()},
    }
    features = item_features(items)
    (file,) = _prepare_folder(folder / "items", features, 1, f"{key[:32]}-items")
    _write(file, features, [pa.table(items)])


def write_users(
    folder: Path, sequences: Sequences, spans: dict[str, Span], history_length: int, n_processes: int, key: str
) -> None:
    """Write the tables of sequences and examples, each in several files.

    The files are the same for any number of processes.

    Args:
        folder: Parent of the folders of the tables.
        sequences: The users' interactions.
        spans: The targets of each split.
        history_length: Most items a history holds, L.
        n_processes: Number of processes that write.
        key: Key of this dataset.
    """
    n_shards = min(_MOST_SHARDS, sum(file.stat().st_size > 0 for file in sequences.buckets.files))
    files = {
        name: _prepare_folder(folder / name, features, n_shards, f"{key[:32]}-{name}")
        for name, features in _FEATURES.items()
    }
    shards = _shards(n_shards, files, sequences, spans, history_length)
    if n_processes == 1 or n_shards == 1:
        for shard in progress(shards, "write examples", n_shards, "file"):
            _write_shard(shard)
        return
    with multiprocessing.Pool(min(n_processes, n_shards)) as pool:
        for _ in progress(pool.imap_unordered(_write_shard, shards), "write examples", n_shards, "file"):
            pass


@dataclass(frozen=True)
class _Bucket:
    """The users of one bucket.

    Attributes:
        file: Their interactions.
        first_user: Number of the first of them.
        user_ids: Their raw ids, ``(u,)``.
        lengths: Their interactions, ``(u,)``.
        spans: First target, end of targets and first example of each split, ``(3, u)``.
    """

    file: Path
    first_user: int
    user_ids: npt.NDArray[np.object_]
    lengths: npt.NDArray[np.int64]
    spans: dict[str, npt.NDArray[np.int64]]

    def users(self, split: str | None = None) -> Iterator[pa.Table]:
        """Yield users with their sequences and their targets of a split, in parts."""
        rows = np.fromfile(self.file, ROW)
        columns = {} if split is None else dict(zip(_SPAN, self.spans[split], strict=True))
        ends = np.concatenate(([0], np.cumsum(self.lengths)))
        cuts = np.searchsorted(ends, np.arange(0, ends[-1], _ROWS_PER_BATCH), side="left")
        for start, stop in itertools.pairwise(np.unique(np.append(cuts, len(self.lengths))).tolist()):
            offsets = pa.array((ends[start : stop + 1] - ends[start]).astype(np.int32))
            inside = rows[ends[start] : ends[stop]]
            yield pa.table(
                {
                    "user_index": pa.array(np.arange(start, stop, dtype=np.int32) + np.int32(self.first_user)),
                    "user_id": pa.array(self.user_ids[start:stop], pa.string()),
                    "items": pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(inside["item"]))),
                    "timestamps": pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(inside["time"]))),
                    **{name: pa.array(values[start:stop]) for name, values in columns.items()},
                }
            )


@dataclass(frozen=True)
class _Shard:
    """Buckets whose tables go into the same files, by the table's name."""

    buckets: list[_Bucket]
    files: dict[str, Path]
    history_length: int


def _write_shard(shard: _Shard) -> None:
    users = (part for bucket in shard.buckets for part in bucket.users())
    _write(shard.files["sequences"], SEQUENCE_FEATURES, users)
    for name in SPLIT_NAMES:
        users = (part for bucket in shard.buckets for part in bucket.users(name))
        _write(shard.files[name], EXAMPLE_FEATURES, (build_examples(part, shard.history_length) for part in users))


def _shards(
    n_shards: int, files: dict[str, list[Path]], sequences: Sequences, spans: dict[str, Span], history_length: int
) -> Iterator[_Shard]:
    """Yield shards of about the same number of buckets."""
    buckets = list(_buckets(sequences, spans))
    for number in range(n_shards):
        share = slice(number * len(buckets) // n_shards, (number + 1) * len(buckets) // n_shards)
        yield _Shard(buckets[share], {name: each[number] for name, each in files.items()}, history_length)


def _buckets(sequences: Sequences, spans: dict[str, Span]) -> Iterator[_Bucket]:
    ends = np.cumsum(sequences.lengths)
    n_rows = start = 0
    for file in sequences.buckets.files:
        if not (size := file.stat().st_size):
            continue
        n_rows += size // ROW.itemsize
        stop = int(np.searchsorted(ends, n_rows)) + 1
        users = slice(start, stop)
        of_splits = {name: np.stack([getattr(span, each)[users] for each in _SPAN]) for name, span in spans.items()}
        yield _Bucket(file, start, sequences.user_ids[users], sequences.lengths[users], of_splits)
        start = stop


def _prepare_folder(folder: Path, features: Features, n_files: int, fingerprint: str) -> list[Path]:
    """Let `datasets` write the metadata of a table, and return the files that will hold its rows."""
    empty = Dataset(features.arrow_schema.empty_table(), fingerprint=fingerprint)
    empty.save_to_disk(str(folder))
    for file in folder.glob("*.arrow"):
        file.unlink()
    names = [f"data-{number:05d}-of-{n_files:05d}.arrow" for number in range(n_files)]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    return [folder / name for name in names]


def _write(file: Path, features: Features, parts: Iterable[pa.Table]) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for part in parts:
            writer.write_table(part.cast(schema).combine_chunks())


def hash_table(
    folder: Path, features: Features, see: Callable[[pa.RecordBatch], None] | None = None
) -> tuple[str, int]:
    """Read a written table part by part.

    Args:
        folder: Its folder.
        features: Its columns.
        see: Called with every part.

    Returns:
        The hash of its content, and its number of rows.
    """
    hashed, n_rows = ContentHash(features.arrow_schema), 0
    for file in sorted(folder.glob("*.arrow")):
        for batch in read_batches(file):
            hashed.update(batch)
            n_rows += len(batch)
            if see is not None:
                see(batch)
    return hashed.hexdigest(), n_rows
