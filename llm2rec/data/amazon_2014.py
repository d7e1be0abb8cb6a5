"""The 5-core review files of 2014, the standard sets of sequential recommendation: Beauty, Toys and others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llm2rec.core.errors import DataError
from llm2rec.data._download import download
from llm2rec.data.amazon import AmazonFiles
from llm2rec.data.spec import MISSING, path_field, side_field

__all__ = ["AMAZON_2014_URL", "Amazon2014"]

AMAZON_2014_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


@dataclass
class Amazon2014(AmazonFiles):
    """A category of the Amazon reviews of 2014: the 5-core of users and products, with all products' metadata.

    Reviews are `reviews_CATEGORY_5.json.gz` and metadata `meta_CATEGORY.json.gz`. `unixReviewTime` is a day. Ties are
    in the order of the standard preprocessing, by product code; products without a title are titled with that code, so
    that the set is the standard one (Toys: 19,412 users, 11,924 products, 167,597 reviews).

    Attributes:
        category: As in the files' names: `Toys_and_Games`, `Beauty`, `Office_Products`, `Sports_and_Outdoors`.
        raw_dir: A folder with both files, gzipped or unpacked. None uses the downloaded copies.
        download: Whether the files may be downloaded where `raw_dir` is not given.
        url: The folder that they are downloaded from.
    """

    _target_: str = "llm2rec.data.amazon_2014.Amazon2014"
    name: str = MISSING
    domain: str = "product"
    k_core: int = 5
    missing_title: str = "id"
    ties: str = "item"
    category: str = MISSING
    raw_dir: str | None = path_field(None)
    download: bool = side_field(True)
    url: str = side_field(AMAZON_2014_URL)

    FILE_OPTIONS: ClassVar[tuple[str, str]] = ("raw_dir=FOLDER", "raw_dir=FOLDER")

    @property
    def file_names(self) -> tuple[str, str]:
        """Names of the gzipped files of reviews and of metadata."""
        return f"reviews_{self.category}_5.json.gz", f"meta_{self.category}.json.gz"

    def obtain(self, raw_cache_dir: Path | None) -> Amazon2014:
        """Return a spec with `raw_dir` set, after downloading what `raw_cache_dir` lacks.

        Raises:
            DataError: If there is no `raw_dir` and a file cannot be downloaded.
        """
        if self.raw_dir is not None:
            return self
        if raw_cache_dir is None:
            raise DataError(f"{self._what()} were not found, and there is no folder for downloads. {self._remedy()}")
        folder = Path(raw_cache_dir) / "amazon-2014"
        for name in self.file_names:
            if not (folder / name).exists():
                if not self.download:
                    raise DataError(f"{folder / name} does not exist and `dataset.download` is false. {self._remedy()}")
                download(f"{self.url}/{name}", folder / name, self._what(), self._remedy())
        return dataclasses.replace(self, raw_dir=str(folder))

    def raw_files(self) -> list[Path]:
        """Return the two files.

        Raises:
            DataError: If one is missing.
        """
        if self.raw_dir is None:
            raise DataError(f"{self._what()} have no `dataset.raw_dir` and are not downloaded. {self._remedy()}")
        found = []
        for name in self.file_names:
            places = [Path(self.raw_dir) / each for each in (name, name.removesuffix(".gz"))]
            there = next((place for place in places if place.is_file()), None)
            if there is None:
                raise DataError(f"`dataset.raw_dir` holds no {name}: {self.raw_dir}. {self._remedy()}")
            found.append(there)
        return found

    def _what(self) -> str:
        return f"Amazon reviews of {self.category}"

    def _remedy(self) -> str:
        return (
            f"Either connect to the network, so that they are downloaded from {self.url}, or give a local copy: "
            f"dataset.raw_dir=FOLDER (with {' and '.join(self.file_names)}, also unpacked)."
        )
