"""Labels that show how runs differ, and sentences on runs whose rankings differ from the evaluation's."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2rec.core.files import read_object
from llm2rec.core.run import read_record

__all__ = ["MODEL_SETTINGS", "labels_of", "unlike", "without_seed"]

MODEL_SETTINGS = {
    "student": ("dataset", "student", "metrics"),
    "distill": ("dataset", "student", "distill", "active", "metrics"),
    "teacher": ("dataset", "llm", "teacher", "metrics"),
    "ensemble": ("dataset", "ensemble", "llm", "runs", "metrics"),
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


def unlike(folders: Sequence[Path], mask_seen: bool) -> list[str]:
    """Sentences that name the runs whose rankings treat the items of a user's past unlike an evaluation.

    Args:
        folders: Run folders.
        mask_seen: Whether the evaluation leaves these items out.

    Raises:
        CheckpointError: If a record is damaged.
        DataError: If a configuration is damaged.
    """
    trained = [_name(folder) for folder in folders if _validated_mask(folder) is (not mask_seen)]
    ranking = [_name(each) for each in folders if not mask_seen and _option(each / "teacher", "exclude_history")]
    sentences = []
    if trained:
        were, here = ("kept", "leaves them out") if mask_seen else ("left out", "keeps them")
        sentences.append(
            f"Validation of {', '.join(trained)} {were} the items of a user's past, which this evaluation {here}: "
            "train and evaluate with one value of metrics.mask_seen."
        )
    if ranking:
        sentences.append(
            f"The teachers of {', '.join(ranking)} leave out the history that they read, while this evaluation keeps "
            "the items of a user's past for all others: metrics.mask_seen=true compares on the same terms."
        )
    return sentences


def _name(folder: Path) -> str:
    """The name of a run's folder, with that of its sweep."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdecimal() else folder.name


def _validated_mask(folder: Path) -> bool | None:
    """Whether the validation of a run left out the items of a user's past; None if it is not recorded."""
    found = read_record(folder).get("mask_seen") if (folder / "run.json").is_file() else None
    if found is None:  # earlier versions recorded it in the configuration alone
        found = (_option(folder, "metrics") or {}).get("mask_seen")
    return found if isinstance(found, bool) else None


def _option(folder: Path, name: str) -> Any:
    """An entry of a folder's ``config.json``; None if there is none."""
    file = folder / "config.json"
    return read_object(file).get(name) if file.is_file() else None


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
