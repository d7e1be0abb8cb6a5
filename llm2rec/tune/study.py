"""The folder of a search: its study in SQLite, its lock, its log."""

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import storage_errors

__all__ = ["locked", "logged", "open_study"]

_SEARCH = "search"  # attribute of the study that identifies the search


def open_study(file: Path, name: str, identity: Mapping[str, Any], *, prune: bool) -> optuna.Study:
    """Open the study of a search in an SQLite file, a new one or that of the same search.

    Args:
        file: The file.
        name: Name of the search.
        identity: What must be the same when it is continued.
        prune: Whether the median pruner stops trials.

    Raises:
        CheckpointError: If the file cannot be read.
        ConfigError: If it holds another search of this name.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # trials are logged by us
    try:
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            study = optuna.create_study(
                storage=optuna.storages.RDBStorage(f"sqlite:///{file}"),
                study_name=name,
                direction="maximize",
                pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} is not a file of a search ({reason}); restore it or name another.") from error
    earlier = study.user_attrs.get(_SEARCH, identity)
    if changed := [key for key, value in identity.items() if earlier.get(key) != value]:
        was = "; ".join(f"{key} was {earlier.get(key)}, now {identity[key]}" for key in changed)
        raise ConfigError(f"the search {name!r} was started with another configuration: {was}. Use another `name`.")
    study.set_user_attr(_SEARCH, dict(identity))
    return study


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a search; yields its file descriptor, which the trials inherit.

    Raises:
        ConfigError: If another process holds it.
    """
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"{folder} is in use by another search, or by a trial of a search that was killed; wait until it has "
            "ended, or use another `name`."
        ) from error
    try:
        yield lock
    finally:
        os.close(lock)


@contextmanager
def logged(logger: logging.Logger, file: Path) -> Iterator[None]:
    """Write the messages of a logger into a file too."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if not logger.isEnabledFor(logging.INFO):  # a notebook without logging
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
