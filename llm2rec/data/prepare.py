"""Prepare a dataset from raw files; done once, and found again by content."""

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

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llm2rec.core.errors import DataError
from llm2rec.core.files import flush_folder, sha256_of_file, storage_errors
from llm2rec.data.filtering import filter_and_number
from llm2rec.data.masking import RepeatCount
from llm2rec.data.recdata import FEATURES, FORMAT_VERSION, RecData, item_features, load
from llm2rec.data.spec import DatasetSpec
from llm2rec.data.splitting import SPLIT_NAMES, target_spans
from llm2rec.data.summary import SplitCounts, compute_statistics
from llm2rec.data.writing import hash_table, write_items, write_users

__all__ = ["prepare"]

_log = logging.getLogger(__name__)


def prepare(spec: DatasetSpec, processed_dir: Path, raw_cache_dir: Path | None = None) -> RecData:
    """Prepare a dataset, or load it if the same content was prepared before.

    The folder is `<name>-<key>`, the key a hash of settings, raw content and format version. It is written under
    a temporary name and renamed when complete: a killed run leaves only a hidden folder that nothing reads, and of
    two runs at the same time one wins.

    Interactions go from file to file in that hidden folder: memory grows with users, items, and the interactions of
    the largest user, but not with all interactions.

    Args:
        spec: The dataset.
        processed_dir: Folder of prepared datasets.
        raw_cache_dir: Folder of downloads; None forbids downloading.

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

    with storage_errors(folder):
        _write(folder, spec, settings, key)
    _log.info("prepared data written to %s", folder)
    return load(folder)


def _write(folder: Path, spec: DatasetSpec, settings: Mapping[str, Any], key: str) -> None:
    """Write the folder under a temporary name and rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        aside.chmod(0o755)  # mkdtemp makes it private, and the rename would keep it so
        _write_all(aside, spec, settings, key)
        flush_folder(aside)
        _move_into_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_all(folder: Path, spec: DatasetSpec, settings: Mapping[str, Any], key: str) -> None:
    """Write tables, statistics and manifest."""
    work = folder / "work"
    work.mkdir()
    sequences = filter_and_number(spec.read_parts(work), spec, work)
    spans, split_counts = target_spans(sequences, spec)
    with _quiet():
        write_items(folder, sequences, key)
        write_users(folder, sequences, spans, spec.history_length, spec.num_proc, key)
    counts = {name: SplitCounts(len(sequences.item_ids), spec.history_length) for name in SPLIT_NAMES}
    repeats = RepeatCount(spans["validation"].stop)
    count = {"sequences": repeats.add, **{name: each.add for name, each in counts.items()}}
    features = FEATURES | {"items": item_features(sequences.item_columns)}
    hashed = {name: hash_table(folder / name, each, count.get(name)) for name, each in features.items()}
    shutil.rmtree(work)
    removed = {**sequences.counts, **split_counts}
    _write_json(folder / "statistics.json", compute_statistics(sequences, counts, removed, repeats.repeated))
    files = {str(file.relative_to(folder)): sha256_of_file(file) for file in sorted(folder.glob("*/*.arrow"))}
    hashes, sizes = ({name: each[which] for name, each in hashed.items()} for which in (0, 1))
    covered = {"items": hashes["items"], "settings": settings, **{name: hashes[name] for name in SPLIT_NAMES}}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest(),
        "key": key,
        "settings": dict(settings),
        "sizes": sizes,
        "hashes": hashes,
        "files": files,
        "versions": {name: metadata.version(name) for name in ("datasets", "numpy", "pandas", "pyarrow")},
    }
    _write_json(folder / "manifest.json", manifest)


def _move_into_place(aside: Path, folder: Path) -> None:
    try:
        os.rename(aside, folder)
    except OSError as error:
        # Another process finished first; the same key means the same content.
        if not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} could not be written ({error}); free space or remove it.") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disable the progress bars of `datasets`."""
    was_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            enable_progress_bars()
