"""Read files of users: existence, compression, hashes, and lines with their numbers."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from llm2rec.core.errors import DataError
from llm2rec.core.files import opened_with_progress, sha256_of_file

__all__ = ["data_suffix", "digest_of_files", "existing_file", "marked_encoding", "numbered_lines", "opened", "shorten"]

_CHUNK_BYTES = 1 << 20

# That of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)


def shorten(text: object, limit: int = 120) -> str:
    """Quote a value for an error message, cut so that a broken megabyte line stays readable."""
    shown = repr(text)
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"


def existing_file(path: str | Path, option: str) -> Path:
    """Check that a file exists.

    Args:
        path: The path that the user gave.
        option: The option that holds it, for the message.

    Raises:
        DataError: If there is no such file.
    """
    found = Path(path)
    if not found.is_file():
        kind = "is a folder" if found.is_dir() else "does not exist"
        raise DataError(f"`dataset.{option}` {kind}: {found}. Give the path of a file: dataset.{option}=PATH")
    return found


def data_suffix(path: Path) -> str:
    """Return the suffix that decides the format of a file: the last one before a trailing `.gz`, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def digest_of_files(paths: Sequence[Path]) -> str:
    """Hash the content of files, in order.

    The suffix counts because it decides how a file is read; the rest of the name and the folder do not.

    Returns:
        A sha256 in hexadecimal.
    """
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{data_suffix(path)}:{sha256_of_file(path)}\n".encode())
    return whole.hexdigest()


def opened(raw: IO[bytes]) -> IO[bytes]:
    """Open the content of a binary file, which may be gzipped.

    Compression is recognised by the content, not the name, since published files are often renamed.
    """
    buffered = io.BufferedReader(raw, _CHUNK_BYTES) if isinstance(raw, io.RawIOBase) else raw
    is_gzip = buffered.read(2) == b"\x1f\x8b"
    buffered.seek(0)
    return cast(IO[bytes], gzip.open(buffered)) if is_gzip else buffered


def marked_encoding(content: IO[bytes], encoding: str) -> str:
    """Return the encoding that a byte-order mark at the start of a file names; without a mark the one given."""
    start = content.read(4)
    content.seek(0)
    return next((named for mark, named in _MARKS if start.startswith(mark)), encoding)


def numbered_lines(path: Path, encoding: str = "utf-8", remedy: str = "") -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines of a text file, gzipped or plain, with their numbers from 1.

    Args:
        path: The file.
        encoding: Of its text; a byte-order mark goes first.
        remedy: What to do if the text has another encoding; by default, to save it in this one.

    Raises:
        DataError: If the file is not text in this encoding, or its compression is broken.
    """
    with opened_with_progress(path) as raw:
        yield from decoded_lines(raw, path, encoding, remedy)


def decoded_lines(
    raw: IO[bytes], path: Path | str, encoding: str = "utf-8", remedy: str = ""
) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines of an open binary file with their numbers from 1; `path` is for messages.

    Raises:
        DataError: If the content is not text in this encoding, or its compression is broken.
    """
    stream, number = opened(raw), 0
    try:
        encoding = marked_encoding(stream, encoding)
        # Split on "\n" alone, in bytes: str.splitlines would also split at characters that titles may hold.
        for number, line in enumerate(_lines(stream, encoding), start=1):
            text = line.decode(encoding).rstrip("\r\n")
            if number == 1:
                text = text.removeprefix("\ufeff")
            if text.strip():
                yield number, text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: not {encoding} text ({error.reason}); {remedy or f'save the file as {encoding}'}."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip data breaks off or is damaged after line {number}; fetch the file again."
        ) from error


def _lines(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """Lines of a binary file, also in encodings whose line end takes more than one byte (UTF-16)."""
    end = "\n".encode(encoding)
    if end == b"\n":
        yield from stream
        return
    with io.TextIOWrapper(stream, encoding=encoding, newline="\n") as text:
        for line in text:
            yield line.encode(encoding)
