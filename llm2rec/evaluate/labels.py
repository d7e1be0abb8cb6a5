"""Labels that show how runs differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2rec.core.files import read_object
from llm2rec.core.run import read_record

__all__ = ["MODEL_SETTINGS", "labels_of", "without_seed"]

MODEL_SETTINGS = {
    "student": ("dataset", "student", "metrics"),
    "distill": ("dataset", "student", "distill", "active", "metrics"),
    "teacher": ("dataset", "llm", "teacher", "metrics"),
    "ensemble": ("dataset", "ensemble", "runs", "metrics"),
}
"""The parts of a configuration that decide which model a stage trains, besides the seed."""
_MEMORY = "micro_batch_size"  # changes no result


def labels_of(folders: Sequence[Path]) -> list[str]:
    """Labels of runs; those that share a label and differ in settings get what differs, such as ``(temperature=2.0)``.

    Args:
        folders: Run folders.

    Returns:
        A label for each; runs that differ in their seed alone keep one label.

    Raises:
        CheckpointError: If a record is damaged.
        DataError: If a configuration is damaged.
    """
    records = [read_record(folder) if (folder / "run.json").is_file() else {} for folder in folders]
    alike: dict[tuple[str, str], list[int]] = {}
    for number, (folder, record) in enumerate(zip(folders, records, strict=True)):
        alike.setdefault((str(record.get("label", folder.name)), str(record.get("stage"))), []).append(number)
    labels = [""] * len(folders)
    for (label, stage), members in alike.items():
        settings = [
            _flat_settings(folders[number], stage) | {"ended_early": records[number].get("ended_early", False)}
            for number in members
        ]
        for number, differing in zip(members, differences(settings), strict=True):
            labels[number] = f"{label} ({', '.join(differing)})" if differing else label
    return labels


def differences(settings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The settings that are not the same in all of several runs, as ``key=value`` with the shortest distinct keys."""
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
    return [[f"{_short(key, differing)}={_shown(each.get(key))}" for key in differing] for each in settings]


def _short(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for n_parts in range(1, len(parts)):
        short = ".".join(parts[-n_parts:])
        if not any(other != key and f".{other}".endswith(f".{short}") for other in others):
            return short
    return key


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat_settings(folder: Path, stage: str) -> dict[str, Any]:
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    return dict(_flat({name: without_seed(config.get(name)) for name in MODEL_SETTINGS.get(stage, ())}))


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, settings


def without_seed(settings: Any) -> Any:
    """Settings without seeds, which a selection policy and an adapter have too, and without micro-batch sizes."""
    if not isinstance(settings, Mapping):
        return settings
    return {key: without_seed(each) for key, each in settings.items() if key not in ("seed", _MEMORY)}
