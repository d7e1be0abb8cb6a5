"""Raw files in, one canonical dataset out; made once, found again by content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, load_from_disk

from llm2rec.core.errors import DataError
from llm2rec.core.files import flush_folder, storage_errors
from llm2rec.data.filtering import Sequences, filter_and_number
from llm2rec.data.recdata import (
    FORMAT_VERSION,
    ITEM_FEATURES,
    SEQUENCE_FEATURES,
    RecData,
    content_hash,
    load,
)
from llm2rec.data.spec import DatasetSpec
from llm2rec.data.splitting import EXAMPLE_FEATURES, SPLIT_NAMES, Span, build_examples, target_spans
from llm2rec.data.statistics import compute_statistics

__all__ = ["prepare"]

_USERS_PER_BATCH = 1000

_log = logging.getLogger(__name__)


def prepare(spec: DatasetSpec, processed_dir: Path, raw_cache_dir: Path | None = None) -> RecData:
    """Prepare a dataset, or load it where the same content has been prepared before.

    The folder is `<name>-<key>`, the key a hash of settings, raw content and format version. It is written aside
    and renamed when complete: a run killed half-way leaves only a hidden folder that nothing reads, and of two
    runs at the same time one wins.

    Args:
        spec: What to prepare.
        processed_dir: Where prepared datasets lie.
        raw_cache_dir: Where downloads are kept; None forbids downloading.

    Returns:
        The dataset, memory-mapped.

    Raises:
        DataError: If raw data is missing, malformed or leaves nothing to train, validate or test on.
        ConfigError: If the settings cannot work with this data.
    """
    spec = spec.obtain(None if raw_cache_dir is None else Path(raw_cache_dir))
    settings = spec.settings()
    recipe = {"format_version": FORMAT_VERSION, "raw": spec.raw_digest(), "settings": settings}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    folder = Path(processed_dir).absolute() / f"{spec.name}-{key[:12]}"
    if folder.exists():
        _log.info("prepared data found in %s", folder)
        return load(folder)

    raw = spec.read()
    sequences = filter_and_number(raw, spec)
    spans, split_counts = target_spans(sequences, spec)
    with storage_errors(folder):
        _write(folder, sequences, spans, split_counts, spec, key)
    _log.info("prepared data written to %s", folder)
    return load(folder)


def _write(
    folder: Path,
    sequences: Sequences,
    spans: Mapping[str, Span],
    split_counts: Mapping[str, int],
    spec: DatasetSpec,
    key: str,
) -> None:
    """Write the whole folder aside and move it into its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        aside.chmod(0o755)  # mkdtemp makes it private, and the rename would keep it so
        with _quiet():
            tables = _write_tables(aside, sequences, spans, spec, key)
        _write_json(
            aside / "statistics.json",
            compute_statistics(
                sequences, {name: tables[name] for name in SPLIT_NAMES}, {**sequences.counts, **split_counts}
            ),
        )
        _write_json(aside / "manifest.json", _manifest(tables, spec.settings(), key))
        flush_folder(aside)
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_tables(
    folder: Path, sequences: Sequences, spans: Mapping[str, Span], spec: DatasetSpec, key: str
) -> dict[str, Dataset]:
    """Write items, sequences and examples; return them memory-mapped."""
    n_items = len(sequences.item_ids)
    items = {
        "item_id": pa.array(np.arange(n_items, dtype=np.int32)),
        "raw_id": pa.array(sequences.item_ids, pa.string()),
        "title": pa.array(sequences.titles, pa.string()),
    }
    tables = {"items": _saved(Dataset(pa.table(items).cast(ITEM_FEATURES.arrow_schema)), folder / "items")}

    offsets = pa.array(np.concatenate(([0], np.cumsum(sequences.lengths))).astype(np.int32))
    by_user = {
        "user_index": pa.array(np.arange(len(sequences.user_ids), dtype=np.int32)),
        "user_id": pa.array(sequences.user_ids, pa.string()),
        "items": pa.ListArray.from_arrays(offsets, pa.array(sequences.items)),
        "timestamps": pa.ListArray.from_arrays(offsets, pa.array(sequences.timestamps)),
    }
    tables["sequences"] = _saved(Dataset(pa.table(by_user).cast(SEQUENCE_FEATURES.arrow_schema)), folder / "sequences")
    work = folder / "work"
    work.mkdir()
    for name in SPLIT_NAMES:
        span = spans[name]
        columns = {"first": span.first, "stop": span.stop, "first_example": span.first_example}
        # Mapped from disk, so that worker processes share the file instead of each receiving a copy.
        with_span = _saved(Dataset(pa.table(by_user | {k: pa.array(v) for k, v in columns.items()})), work / name)
        examples = with_span.with_format("arrow").map(
            build_examples,
            batched=True,
            batch_size=_USERS_PER_BATCH,
            remove_columns=with_span.column_names,
            features=EXAMPLE_FEATURES,
            fn_kwargs={"history_length": spec.history_length},
            num_proc=spec.num_proc if spec.num_proc > 1 else None,
            cache_file_name=str(work / f"{name}.arrow"),
            new_fingerprint=f"{key[:32]}-{name}",
        )
        tables[name] = _saved(examples.with_format(None), folder / name)
    shutil.rmtree(work)
    return tables


def _saved(dataset: Dataset, folder: Path) -> Dataset:
    dataset.save_to_disk(str(folder))
    return load_from_disk(str(folder))


def _manifest(tables: Mapping[str, Dataset], settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    hashes = {name: content_hash(table) for name, table in tables.items()}
    covered = {"items": hashes["items"], "settings": settings, **{name: hashes[name] for name in SPLIT_NAMES}}
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest(),
        "key": key,
        "settings": dict(settings),
        "sizes": {name: len(table) for name, table in tables.items()},
        "hashes": hashes,
        "versions": {name: metadata.version(name) for name in ("datasets", "numpy", "pandas", "pyarrow")},
    }


def _move_into_place(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError as error:
        # Another process finished first; the key says that its content is ours.
        if not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} could not be written ({error}); make room for it or remove it.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from drawing a bar for each of its small steps."""
    was_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            enable_progress_bars()
