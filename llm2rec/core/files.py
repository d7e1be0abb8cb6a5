"""Atomic writes (temporary file, flush, rename), JSON, hashes, and records without secrets."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm2rec.core.errors import DataError, StorageError
from llm2rec.core.logging import Progress

__all__ = [
    "check_hashes",
    "flush_folder",
    "opened_with_progress",
    "read_json",
    "read_object",
    "remove_leftovers",
    "replaced_file",
    "replaced_folder",
    "sha256_of_file",
    "storage_errors",
    "with_home",
    "without_secrets",
    "write_hashes",
    "write_json",
]

_HASHES = "manifest.json"
_CHUNK_BYTES = 1 << 20

_MASK = "***"
_SECRET_NAME = re.compile(r"(^|_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),  # Hugging Face
    re.compile(r"\b(?:gh[opsu]_|github_pat_)[A-Za-z0-9_]{8,}"),
    re.compile(r"\bAKIA[A-Z0-9]{12,}"),  # Amazon
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),  # user:password@ of an address
)

_REFUSALS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO
)  # fmt: skip

_NO_REASON = r"inline_container|PytorchStreamWriter failed|\d+ requested and \d+ written"
"""Messages of torch and NumPy for a failed write, which do not name the reason."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert write errors of any library into `StorageError`.

    Raises:
        StorageError: If the disk or quota is full, or a permission is missing.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if (reason := _refusal(error)) is None:
            raise
        raise StorageError(
            f"cannot write {path} ({reason}); existing files are unchanged. Free space, or make the folder writable, "
            "and run the same command again, with `resume=` the run's folder if it has one."
        ) from error


def _refusal(error: Exception) -> str | None:
    """Reason of a failed write, or None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        number = int(match[1])
    if number is not None:
        return os.strerror(number) if number in _REFUSALS else None
    return "the disk may be full" if re.search(_NO_REASON, str(error)) else None


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            _flush(aside)
            os.replace(aside, path)
            _flush(path.parent)  # the new name too, before anything relies on it
        finally:
            with suppress(OSError):  # a read-only folder: keep the original error
                aside.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block ends without an error.

    An existing folder is moved aside first, since a rename cannot replace a folder that is not empty.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            yield aside
            aside.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; results follow the umask
            flush_folder(aside)
            _put_in_place(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, path: Path) -> None:
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old)
    else:
        os.replace(aside, path)
    _flush(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder and everything in it to disk, before it is renamed."""
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed writers (`replaced_file`, `replaced_folder`) from a folder.

    Only for folders that no other process writes to.
    """
    for path in sorted(folder.rglob(".*")):  # parents before their contents
        if path.suffix in (".partial", ".old"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any, *, indent: int = 2) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity raise, since JSON has neither."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
    with replaced_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    to_plain: Callable[[], Any] | None = getattr(value, "item", None)  # NumPy and torch scalars
    if to_plain is not None:
        return to_plain()
    raise TypeError(f"cannot write {type(value).__name__} as JSON.")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If the file is missing, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore the original file.") from error
    except (ValueError, RecursionError) as error:  # the latter: thousands of nested brackets
        raise DataError(f"{path} is not JSON ({error}); restore the original file.") from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object with required keys.

    Args:
        path: The file.
        keys: Required keys.

    Raises:
        DataError: If the file is missing, is not JSON or not an object, or lacks a key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} contains a {type(value).__name__}, expected an object; restore the original file.")
    if missing := [key for key in keys if key not in value]:
        raise DataError(f"{path} lacks {', '.join(map(repr, missing))}; restore the original file.")
    return value


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with opened_with_progress(path, "hash") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened_with_progress(path: Path, what: str = "read") -> "Iterator[io.BufferedReader[Any]]":
    """Open a binary file for reading, and show the `Progress` of reading it.

    Args:
        path: The file.
        what: What is done with it.
    """
    raw = _CountedFile(path)
    size = os.fstat(raw.fileno()).st_size
    with io.BufferedReader(raw, _CHUNK_BYTES) as file, Progress(f"{what} {path.name}", size, "byte") as raw.progress:
        yield file


class _CountedFile(io.FileIO):
    """A file that counts how much of it was read."""

    progress: Progress
    _counted = 0

    def readinto(self, buffer: Any, /) -> int:
        """Read bytes into a buffer; returns their number."""
        n_bytes = super().readinto(buffer)
        if (position := self.seek(0, os.SEEK_CUR)) > self._counted:  # a reader may go back to the start
            self.progress.advance(position - self._counted)
            self._counted = position
        return n_bytes


def write_hashes(folder: Path, editable: tuple[str, ...] = ()) -> None:
    """Write hashes of all files of a folder into its ``manifest.json``, for `check_hashes`.

    Args:
        folder: The folder, complete except for this file.
        editable: Files without a hash, since users may edit them.
    """
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    write_json(
        folder / _HASHES, {"sha256": {name: sha256_of_file(folder / name) for name in files if name not in editable}}
    )


def check_hashes(folder: Path) -> None:
    """Compare the files of a folder with the hashes of `write_hashes`, which folders of earlier versions lack.

    Raises:
        DataError: If a file is missing or has changed, or the hashes themselves are damaged.
    """
    if not (folder / _HASHES).is_file():
        return
    for name, expected in read_object(folder / _HASHES, "sha256")["sha256"].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}; copy the whole folder again.")
        if sha256_of_file(folder / name) != expected:
            raise DataError(
                f"{folder / name} has changed since it was written (its hash differs from {_HASHES}); copy the whole "
                "folder again."
            )


def without_secrets(value: Any) -> Any:
    """Replace the home folder by ``~`` and mask secrets, in text or in nested plain values.

    Args:
        value: Text, numbers, lists and dictionaries.

    Returns:
        A masked copy.
    """
    if isinstance(value, str):
        return _masked(value)
    if isinstance(value, Mapping):
        return {
            key: _MASK if isinstance(each, str) and each and _SECRET_NAME.search(str(key)) else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    return value


def with_home(path: str) -> str:
    """Expand the ``~`` of `without_secrets` at the start of a path."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _masked(text: str) -> str:
    for secret in _SECRETS:
        text = secret.sub(_MASK, text)
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without a home folder, as in a container
        return text
    # Whole names only: /home/ann must not match /home/anna. A home of "/" is not replaced.
    return text if len(home) < 2 else re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])", "~", text)
