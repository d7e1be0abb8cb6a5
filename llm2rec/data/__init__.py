"""Datasets: raw interactions in, items, sequences, splits and examples in one form out. Independent of any model."""

from llm2rec.data.agreement import TitleAgreement, title_agreement
from llm2rec.data.amazon import AmazonReviews
from llm2rec.data.amazon_2014 import Amazon2014
from llm2rec.data.masking import masks_seen
from llm2rec.data.movielens import MovieLens100K
from llm2rec.data.prepare import prepare
from llm2rec.data.recdata import RecData, load
from llm2rec.data.spec import DatasetSpec, RawData
from llm2rec.data.summary import doubts, format_statistics, tie_doubt
from llm2rec.data.tables import CsvTables
from llm2rec.data.toy import Toy

__all__ = [
    "SCHEMAS",
    "Amazon2014",
    "AmazonReviews",
    "CsvTables",
    "DatasetSpec",
    "MovieLens100K",
    "RawData",
    "RecData",
    "TitleAgreement",
    "Toy",
    "doubts",
    "format_statistics",
    "load",
    "masks_seen",
    "prepare",
    "tie_doubt",
    "title_agreement",
]

SCHEMAS: dict[str, type[DatasetSpec]] = {
    "amazon_beauty": Amazon2014,
    "amazon_games": AmazonReviews,
    "amazon_office": Amazon2014,
    "amazon_sports": Amazon2014,
    "amazon_toys": Amazon2014,
    "csv": CsvTables,
    "movielens": MovieLens100K,
    "toy": Toy,
}
"""Schema of each file in `conf/dataset`, by file name."""
