"""Download public files."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

from llm2rec.core.errors import DataError

__all__ = ["download"]

_TIMEOUT_SECONDS = 30

_log = logging.getLogger(__name__)


def download(url: str, target: Path, what: str, remedy: str, md5: str | None = None) -> None:
    """Download a file to a temporary name, check it, and rename it.

    Args:
        url: Its address.
        target: Where it is kept; the folder is created.
        what: A name for it in messages.
        remedy: What to do without a network.
        md5: Checksum that it must have; None checks its length alone.

    Raises:
        DataError: If it cannot be downloaded, or is not what was published.
    """
    _log.info("downloading %s", url)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=".part")
    try:
        digest, n_bytes = hashlib.md5(usedforsecurity=False), 0
        with os.fdopen(handle, "wb") as out, urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as reply:
            expected = reply.headers.get("Content-Length")
            while chunk := reply.read(1 << 16):
                digest.update(chunk)
                out.write(chunk)
                n_bytes += len(chunk)
            out.flush()
            os.fsync(out.fileno())
        if md5 is not None and digest.hexdigest() != md5:
            raise DataError(
                f"{url} has md5 {digest.hexdigest()}, expected {md5}: the download is damaged or the file has changed. "
                f"Try again. {remedy}"
            )
        if expected is not None and n_bytes != int(expected):
            raise OSError(f"the connection ended after {n_bytes:,} of {int(expected):,} bytes")
        os.replace(aside, target)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{what} could not be downloaded from {url} ({error}). {remedy}") from error
    finally:
        Path(aside).unlink(missing_ok=True)
