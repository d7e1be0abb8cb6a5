"""Titles that belong to their items are recognised."""

import os
import random
import subprocess
import sys

import pytest
from data_files import csv_pair

from llm2rec.data import CsvTables, Toy, prepare, title_agreement
from llm2rec.data.agreement import TitleAgreement


def dataset(folder, titles, sequences):
    """Prepare sequences of item numbers with the titles given."""
    visits = [f"u{user},i{item},{time}" for user, each in enumerate(sequences) for time, item in enumerate(each)]
    files = csv_pair(folder, visits, [f"i{item},{title}" for item, title in enumerate(titles)])
    return prepare(CsvTables(**files), folder / "prepared")


def sequences_of_kinds(n_users=300, n_items=120, kinds=6):
    generator = random.Random(0)
    return [
        [generator.randrange(n_items // kinds) * kinds + kind for _ in range(9)]
        for kind in (generator.randrange(kinds) for _ in range(n_users))
    ]


KINDS = {
    "words": ["Xbox 360", "Nintendo DS", "PlayStation", "PC", "Wii U", "Dreamcast"],
    "no spaces": ["ゼルダの伝説", "ファイナルファンタジー", "星のカービィ", "逆転裁判", "真・三國無双", "桃太郎電鉄"],
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_titles_of_what_follows_are_alike_until_they_are_mixed_up(tmp_path, kinds):
    generator = random.Random(1)
    titles = [f"{generator.randrange(10**6)}{kinds[item % 6]}" for item in range(120)]
    right = title_agreement(dataset(tmp_path / "right", titles, sequences_of_kinds()))
    assert right.pairs > 2000
    assert right.errors > 20
    assert right.following > 2 * right.by_chance
    assert right.doubt() is None
    generator.shuffle(titles)
    wrong = title_agreement(dataset(tmp_path / "wrong", titles, sequences_of_kinds()))
    assert abs(wrong.following - wrong.by_chance) < 0.02
    assert f"over {wrong.pairs:,} pairs): do the titles belong to these item ids?" in wrong.doubt()


def test_the_last_digit_is_the_same_in_every_process(tmp_path):
    folder = prepare(Toy(), tmp_path).folder
    program = "import sys; from llm2rec.data import load, title_agreement; print(title_agreement(load(sys.argv[1])))"
    found = [
        subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    ]
    assert found[0].startswith("TitleAgreement(pairs=")
    assert found == found[:1] * 3


def test_few_pairs_and_toys_leave_no_doubt(tmp_path):
    few = title_agreement(dataset(tmp_path / "few", [str(n) for n in range(120)], sequences_of_kinds(n_users=100)))
    assert few.pairs < 2000
    assert few.doubt() is None
    toy = title_agreement(prepare(Toy(), tmp_path / "toy"))
    assert toy.errors > 20
    assert TitleAgreement(2000, 0.1, 0.1, 4.9).doubt()
    assert TitleAgreement(1999, 0.1, 0.1, 4.9).doubt() is None
    assert TitleAgreement(2000, 0.1, 0.1, 5.0).doubt() is None


@pytest.mark.parametrize("titles", [["the same"] * 120, ["a", "b"] * 60])
def test_titles_without_information_do_not_crash(tmp_path, titles):
    found = title_agreement(dataset(tmp_path / "d", titles, sequences_of_kinds()))
    assert found.following == found.by_chance == 0 or found.doubt() is not None
