"""Preparation in the plain way, everything in memory at once: what `llm2rec.data.prepare` must give exactly."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from llm2rec.data.filtering import check_titles
from llm2rec.data.recdata import SEQUENCE_FEATURES, content_hash, item_features
from llm2rec.data.splitting import EXAMPLE_FEATURES, SPLIT_NAMES, build_examples


@dataclass(frozen=True)
class Sequences:
    user_ids: np.ndarray
    item_ids: np.ndarray
    titles: np.ndarray
    item_columns: dict
    lengths: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    counts: dict


def filter_and_number(raw, spec):
    counts = dict(raw.notes)
    counts["raw_interactions"] = len(raw.interactions)
    titles = check_titles(raw.items, spec)
    item = pd.Index(raw.items["item_id"]).get_indexer(pd.Index(raw.interactions["item_id"]))
    user, distinct_users = pd.factorize(raw.interactions["user_id"])
    user_ids = np.asarray(distinct_users, dtype=object)
    timestamp = raw.interactions["timestamp"].to_numpy(dtype=np.int64)

    known = item >= 0
    if spec.missing_items == "drop":
        counts["rows_with_missing_items"] = int((~known).sum())
        counts["missing_items"] = raw.interactions["item_id"][~known].nunique()
    keep = known & np.append(titles != "", False)[item]
    counts["rows_without_title"] = int((known & ~keep).sum())
    counts["items_without_title"] = int((titles == "").sum())
    if spec.min_rating is not None:
        rated = raw.interactions["rating"].to_numpy() >= spec.min_rating
        counts["rows_below_min_rating"] = int((keep & ~rated).sum())
        keep &= rated
    rows = np.flatnonzero(keep)
    repeated = pd.DataFrame({"u": user[rows], "i": item[rows], "t": timestamp[rows]}).duplicated().to_numpy()
    counts["duplicate_rows"] = int(repeated.sum())
    rows = rows[~repeated]
    rows = _dense_enough(rows, user, item, spec, counts)
    counts["users_dropped"] = len(user_ids) - len(np.unique(user[rows]))
    counts["items_dropped"] = len(titles) - len(np.unique(item[rows]))
    item_ids = raw.interactions["item_id"].tolist()
    order = dict(zip(raw.items["item_id"], raw.items["order" if "order" in raw.items else "item_id"], strict=True))

    def place(row):
        of_tie = {"source": row, "item": order.get(item_ids[row])}
        if spec.ties == "shuffle":
            of_tie["shuffle"] = _hash(f"{spec.ties_seed}\t{user_ids[user[row]]}\t{item_ids[row]}")
        return user[row], timestamp[row], of_tie[spec.ties]

    rows = np.array(sorted(rows.tolist(), key=place), dtype=np.int64)
    kept_users, lengths = np.unique(user[rows], return_counts=True)
    kept_items, numbered = np.unique(item[rows], return_inverse=True)
    return Sequences(
        user_ids=user_ids[kept_users],
        item_ids=raw.items["item_id"].to_numpy(dtype=object)[kept_items],
        titles=titles[kept_items],
        item_columns={name: raw.items[name].to_numpy()[kept_items] for name in ("text", "order") if name in raw.items},
        lengths=lengths.astype(np.int64),
        items=numbered.astype(np.int32),
        timestamps=timestamp[rows],
        counts=counts,
    )


def _hash(text):
    return hashlib.md5(text.encode()).hexdigest()[:16]


def _dense_enough(rows, user, item, spec, counts):
    before_core = before_short = 0
    n_users_short = 0
    while True:
        n_rows = len(rows)
        while spec.k_core > 1 and len(rows):
            dense = (np.bincount(user[rows]) >= spec.k_core)[user[rows]]
            dense &= (np.bincount(item[rows]) >= spec.k_core)[item[rows]]
            if dense.all():
                break
            before_core += int((~dense).sum())
            rows = rows[dense]
        lengths = np.bincount(user[rows]) if len(rows) else np.zeros(0, dtype=np.int64)
        long_enough = (lengths >= spec.min_interactions)[user[rows]]
        n_users_short += int(((lengths > 0) & (lengths < spec.min_interactions)).sum())
        before_short += int((~long_enough).sum())
        rows = rows[long_enough]
        if len(rows) == n_rows:
            break
    counts["rows_below_k_core"] = before_core
    counts["users_too_short"] = n_users_short
    counts["rows_of_short_users"] = before_short
    return rows


def target_spans(sequences, spec):
    lengths = sequences.lengths
    counts = {}
    if spec.split == "leave_one_out":
        bounds = [np.ones_like(lengths), lengths - 2, lengths - 1, lengths]
    else:
        validation_cut, test_cut = _cuts(sequences.timestamps, spec)
        user = np.repeat(np.arange(len(lengths)), lengths)
        bounds = [np.ones_like(lengths)]
        for cut in (validation_cut, test_cut):
            n_before = np.bincount(user[sequences.timestamps < cut], minlength=len(lengths))
            bounds.append(np.maximum(n_before, 1))
        bounds.append(lengths)
        counts["validation_cut"] = int(validation_cut)
        counts["test_cut"] = int(test_cut)
        new = sequences.timestamps[np.cumsum(lengths) - lengths] >= validation_cut
        counts["users_new_after_cut"] = int(new.sum())
    spans = {}
    next_example = 0
    for name, first, stop in zip(SPLIT_NAMES, bounds[:-1], bounds[1:], strict=True):
        sizes = stop - first
        spans[name] = (first, stop, next_example + np.cumsum(sizes) - sizes)
        next_example += int(sizes.sum())
    return spans, counts


def _cuts(timestamps, spec):
    ordered = np.sort(timestamps)
    # From the end: 1 - 0.1 - 0.1 is not 0.8 in binary, and rounding it would move a row.
    n_test = max(1, round(len(ordered) * spec.test_fraction))
    n_validation = max(1, round(len(ordered) * spec.validation_fraction))
    return int(ordered[max(0, len(ordered) - n_test - n_validation)]), int(ordered[len(ordered) - n_test])


def compute_statistics(sequences, splits, counts, spans):
    n_users, n_items = len(sequences.user_ids), len(sequences.item_ids)
    histories = {name: _column(split, "history") for name, split in splits.items()}
    targets = {name: _column(split, "target") for name, split in splits.items()}
    seen = np.zeros(n_items, dtype=bool)
    seen[histories["train"]] = True
    seen[targets["train"]] = True
    _, title_counts = np.unique(sequences.titles.astype(str), return_counts=True)
    history_lengths = np.concatenate([_list_lengths(split, "history") for split in splits.values()])
    return {
        "users": n_users,
        "items": n_items,
        "interactions": len(sequences.items),
        "density": len(sequences.items) / (n_users * n_items),
        "sequence_length": _summary(sequences.lengths),
        "history_length": _summary(history_lengths),
        "rows": {name: len(splits[name]) for name in SPLIT_NAMES},
        "items_unseen_in_train": int((~seen).sum()),
        "cold_targets": {name: int((~seen[targets[name]]).sum()) for name in SPLIT_NAMES[1:]},
        "repeated_targets": _repeated_targets(sequences, spans),
        "items_sharing_a_title": int(title_counts[title_counts > 1].sum()),
        "removed": dict(counts),
    }


def _repeated_targets(sequences, spans):
    """Training and validation targets that their user interacted with before, one by one."""
    found, ends = 0, np.cumsum(sequences.lengths)
    for user, end in enumerate(ends):
        items = sequences.items[end - sequences.lengths[user] : end].tolist()
        for name in ("train", "validation"):
            first, stop, _ = spans[name]
            found += sum(items[place] in items[:place] for place in range(first[user], stop[user]))
    return found


def _column(dataset, name):
    """All values of an integer column, lists flattened."""
    column = dataset.data.table[name]
    parts = [chunk.flatten() if name == "history" else chunk for chunk in column.chunks]
    return np.concatenate([part.to_numpy() for part in parts]) if parts else np.zeros(0, dtype=np.int64)


def _list_lengths(dataset, name):
    chunks = dataset.data.table[name].chunks
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]) if chunks else np.zeros(0, np.int64)


def _summary(values):
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
    }


def prepare_plainly(spec):
    """The manifest's fingerprint and hashes, and the statistics, of a dataset."""
    sequences = filter_and_number(spec.read(), spec)
    spans, split_counts = target_spans(sequences, spec)
    n_items = len(sequences.item_ids)
    items = {
        "item_id": pa.array(np.arange(n_items, dtype=np.int32)),
        "raw_id": pa.array(sequences.item_ids, pa.string()),
        "title": pa.array(sequences.titles, pa.string()),
        **{name: pa.array(values) for name, values in sequences.item_columns.items()},
    }
    offsets = pa.array(np.concatenate(([0], np.cumsum(sequences.lengths))).astype(np.int32))
    by_user = {
        "user_index": pa.array(np.arange(len(sequences.user_ids), dtype=np.int32)),
        "user_id": pa.array(sequences.user_ids, pa.string()),
        "items": pa.ListArray.from_arrays(offsets, pa.array(sequences.items)),
        "timestamps": pa.ListArray.from_arrays(offsets, pa.array(sequences.timestamps)),
    }
    tables = {
        "items": Dataset(pa.table(items).cast(item_features(items).arrow_schema)),
        "sequences": Dataset(pa.table(by_user).cast(SEQUENCE_FEATURES.arrow_schema)),
    }
    for name, (first, stop, first_example) in spans.items():
        columns = {"first": pa.array(first), "stop": pa.array(stop), "first_example": pa.array(first_example)}
        examples = build_examples(pa.table(by_user | columns), spec.history_length)
        tables[name] = Dataset(examples.cast(EXAMPLE_FEATURES.arrow_schema))
    hashes = {name: content_hash(table) for name, table in tables.items()}
    covered = {"items": hashes["items"], "settings": spec.settings(), **{name: hashes[name] for name in SPLIT_NAMES}}
    fingerprint = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    splits = {name: tables[name] for name in SPLIT_NAMES}
    return fingerprint, hashes, compute_statistics(sequences, splits, {**sequences.counts, **split_counts}, spans)
