"""MovieLens 100K in GroupLens' layout: a folder, a zip, or a download."""

from __future__ import annotations

import dataclasses
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import pandas as pd

from llm2rec.core.errors import DataError
from llm2rec.data._download import download
from llm2rec.data._files import decoded_lines, shorten
from llm2rec.data.spec import DatasetSpec, RawData, path_field, side_field

__all__ = ["ML_100K_MD5", "ML_100K_URL", "MovieLens100K"]

ML_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ML_100K_MD5 = "0e33842e24a9c977be4e0107933c0723"  # as published next to the archive

_INTERACTIONS = "u.data"
_ITEMS = "u.item"
_ENCODING = "iso-8859-1"


@dataclass
class MovieLens100K(DatasetSpec):
    """MovieLens 100K: 943 users, 1,682 movies, 100,000 ratings from 1 to 5.

    Attributes:
        raw_dir: A folder holding `u.data` and `u.item`, a folder holding `ml-100k/`, or GroupLens' zip. None uses
            the downloaded copy.
        download: Whether the zip may be downloaded where `raw_dir` is not given.
        url: Where the zip is downloaded from.
        md5: Checksum that a downloaded zip must have.
    """

    _target_: str = "llm2rec.data.movielens.MovieLens100K"
    name: str = "movielens"
    domain: str = "movie"
    raw_dir: str | None = path_field(None)
    download: bool = side_field(True)
    url: str = side_field(ML_100K_URL)
    md5: str = side_field(ML_100K_MD5)

    def obtain(self, raw_cache_dir: Path | None) -> MovieLens100K:
        """Return a spec with `raw_dir` set, after downloading the zip into `raw_cache_dir` if needed.

        Raises:
            DataError: If there is no `raw_dir` and the zip cannot be downloaded, or its checksum is wrong.
        """
        if self.raw_dir is not None:
            return self
        if raw_cache_dir is None:
            raise DataError(f"MovieLens 100K was not found, and there is no folder to download it to. {self._remedy()}")
        target = Path(raw_cache_dir) / "ml-100k.zip"
        if not target.exists():
            if not self.download:
                raise DataError(f"MovieLens 100K is not at {target} and `dataset.download` is false. {self._remedy()}")
            download(self.url, target, "MovieLens 100K", self._remedy(), self.md5)
        return dataclasses.replace(self, raw_dir=str(target))

    def raw_files(self) -> list[Path]:
        """Return the two files, or the zip that holds them.

        Raises:
            DataError: If they do not exist.
        """
        if self.raw_dir is None:
            raise DataError(f"MovieLens 100K has no `dataset.raw_dir` and has not been downloaded. {self._remedy()}")
        given = Path(self.raw_dir)
        if given.is_file():
            return [given]
        for folder in (given, given / "ml-100k"):
            files = [folder / _INTERACTIONS, folder / _ITEMS]
            if all(file.is_file() for file in files):
                return files
        what = "holds no u.data and u.item" if given.is_dir() else "does not exist"
        raise DataError(f"`dataset.raw_dir` {what}: {given}. {self._remedy()}")

    def read(self) -> RawData:
        """Read ratings and titles; titles stay as GroupLens writes them, year and trailing article included.

        Raises:
            DataError: If a file is missing or malformed.
        """
        files = self.raw_files()
        with _opened(files) as (interactions, items):
            return RawData(interactions=_read_interactions(interactions, files[0]), items=_read_items(items, files[-1]))

    def _remedy(self) -> str:
        return (
            f"Either connect to the network, so that it is downloaded from {self.url}, or give a local copy: "
            "dataset.raw_dir=FOLDER_OR_ZIP (a folder with u.data and u.item, or GroupLens' ml-100k.zip)."
        )


@contextmanager
def _opened(files: list[Path]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open interactions and items, from two files or straight out of one zip; nothing is unpacked."""
    if len(files) == 2:
        with files[0].open("rb") as interactions, files[1].open("rb") as items:
            yield interactions, items
        return
    path = files[0]
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path)
            yield (
                io.BytesIO(archive.read(_member(archive, _INTERACTIONS, path))),
                io.BytesIO(archive.read(_member(archive, _ITEMS, path))),
            )
    # Most of these come from damaged members, encryption, and compressions that zipfile does not support.
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, UnicodeDecodeError, struct.error, zlib.error) as error:
        raise DataError(
            f"{path} is not a readable zip ({error}). Give GroupLens' ml-100k.zip or the folder it unpacks to: "
            "dataset.raw_dir=FOLDER_OR_ZIP"
        ) from error


def _check_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Reject a zip with paths outside its folder: we only read, but such a file is malicious."""
    for member in archive.infolist():
        name = member.orig_filename
        parts = PurePosixPath(name.replace("\\", "/"))
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        escapes = parts.is_absolute() or ".." in parts.parts or bool(PureWindowsPath(name).drive)
        if escapes or is_link:
            kind = "is a symbolic link" if is_link else "points outside the archive's own folder"
            raise DataError(
                f"{path}: member {shorten(name)} {kind}; the archive is rejected. Use GroupLens' own ml-100k.zip."
            )


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> str:
    found = [each for each in archive.namelist() if each in (name, f"ml-100k/{name}")]
    if len(found) != 1:
        raise DataError(
            f"{path} holds {len(found)} members called {name} or ml-100k/{name}, expected one. "
            "Use GroupLens' own ml-100k.zip."
        )
    return found[0]


def _read_interactions(stream: IO[bytes], path: Path) -> pd.DataFrame:
    users: list[str] = []
    items: list[str] = []
    ratings: list[float] = []
    timestamps: list[int] = []
    for number, line in decoded_lines(stream, _where(path, _INTERACTIONS), _ENCODING):
        fields = line.split("\t")
        try:
            user, item, rating, timestamp = fields
            if not user.strip() or not item.strip():
                raise ValueError("empty id")
            stars = int(rating)
            if not 1 <= stars <= 5:
                raise ValueError("rating out of range")
            if not -(2**63) <= int(timestamp) < 2**63:
                raise ValueError("time beyond 64 bits")
            timestamps.append(int(timestamp))
        except ValueError as error:
            raise DataError(
                f"{_where(path, _INTERACTIONS)}, line {number}: {shorten(line)} is not a rating; expected user, item, "
                "rating (1 to 5) and unix time, separated by tabs. Correct the line or use GroupLens' own file."
            ) from error
        users.append(user)
        items.append(item)
        ratings.append(float(stars))
    return pd.DataFrame(
        {
            "user_id": pd.Series(users, dtype="str"),
            "item_id": pd.Series(items, dtype="str"),
            "timestamp": pd.Series(timestamps, dtype="int64"),
            "rating": pd.Series(ratings, dtype="float64"),
        }
    )


def _read_items(stream: IO[bytes], path: Path) -> pd.DataFrame:
    titles: dict[str, str] = {}
    where = _where(path, _ITEMS)
    for number, line in decoded_lines(stream, where, _ENCODING):
        fields = line.split("|")
        if len(fields) < 2 or not fields[0].strip():
            raise DataError(
                f"{where}, line {number}: {shorten(line)} is not a movie; expected id, title and more, separated by "
                "'|'. Correct the line or use GroupLens' own file."
            )
        if fields[0] in titles:
            raise DataError(f"{where}, line {number}: item {fields[0]!r} occurs twice; keep one line for each id.")
        titles[fields[0]] = " ".join(fields[1].split())
    return pd.DataFrame(
        {"item_id": pd.Series(list(titles), dtype="str"), "title": pd.Series(list(titles.values()), dtype="str")}
    )


def _where(path: Path, member: str) -> str:
    return str(path) if path.name == member else f"{path}:{member}"
