"""Numbers of columns in files are those of the columns in memory."""

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from llm2rec.data.columns import MappedNumbers, column_numbers, list_lengths


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def stored(request, tmp_path):
    """A table of several blocks a file, lists of different lengths, empty ones among them."""
    generator = np.random.default_rng(0)
    lists = [generator.integers(1000, size=size).astype(np.int32) for size in generator.integers(0, 6, size=3500)]
    table = Dataset.from_dict({"number": np.arange(3500) * 7 - 3, "list": lists})
    table.save_to_disk(str(tmp_path / "table"), num_shards=request.param)
    return load_from_disk(str(tmp_path / "table")), lists


def test_numbers_are_found_by_their_positions(stored):
    table, lists = stored
    flat = np.concatenate(lists)
    for column, expected in (("number", np.arange(3500) * 7 - 3), ("list", flat)):
        numbers = column_numbers(table, column)
        assert isinstance(numbers, MappedNumbers)
        assert len(numbers) == len(expected)
        index = np.random.default_rng(1).permutation(len(expected)).reshape(-1, 2 if len(expected) % 2 == 0 else 1)
        found = numbers[index]
        np.testing.assert_array_equal(found, expected[index])
        np.testing.assert_array_equal(numbers[np.arange(len(expected))], expected)
    assert numbers[np.zeros((0, 3), np.int64)].shape == (0, 3)
    np.testing.assert_array_equal(list_lengths(table, "list"), [len(each) for each in lists])


def test_rows_that_were_chosen_are_read_as_chosen(stored):
    table, lists = stored
    chosen = [5, 3400, 2, 2]
    for part, rows in ((table.select(chosen), chosen), (table.select(range(10, 20)), range(10, 20))):
        numbers = column_numbers(part, "list")
        expected = np.concatenate([lists[row] for row in rows])
        np.testing.assert_array_equal(numbers[np.arange(len(expected))], expected)
        assert len(numbers) == len(expected)


def test_tables_in_memory_and_empty_ones_have_numbers_too():
    table = Dataset.from_dict({"number": [4, 5, 6]})
    assert column_numbers(table, "number")[np.array([2, 0])].tolist() == [6, 4]
    empty = table.select([])
    assert len(column_numbers(empty, "number")) == 0
