"""Texts of items: what is removed, what stays, where they are cut."""

import numpy as np
import pytest

from llm2rec.data._text import clean_text, joined_text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<p>Two<br/>lines</p>", "Two lines"),
        ("&lt;b&gt;bold&lt;/b&gt; &amp;nbsp;&amp;quot;x&amp;quot;", 'bold "x"'),
        ("3 < 5 and 7 > 2, a<-b", "3 < 5 and 7 > 2, a<-b"),
        ("<script type='x'>var a = '<b>';</script>left<!-- no\n <i> --><STYLE>p {}</STYLE>", "left"),
        ("\u3000wide\t\n spaces \xa0", "wide spaces"),
        (["One", ["two", None], ""], "One two"),
        (np.array(["One", "two"], dtype=object), "One two"),
        ({"Brand": "Acme", "Size": None, "Parts": [1, 2]}, "Brand: Acme Parts: 1 2"),
        (None, ""),
        (float("nan"), ""),
        (1.5, "1.5"),
    ],
)
def test_a_value_becomes_clean_text(value, expected):
    assert clean_text(value) == expected


@pytest.mark.parametrize(
    ("length", "expected"),
    [(100, "A title. Acme. Long words"), (25, "A title. Acme. Long words"), (24, "A title. Acme. Long"),
     (19, "A title. Acme. Long"), (18, "A title. Acme."), (1, "A")],
)  # fmt: skip
def test_texts_are_joined_once_and_cut_after_a_word(length, expected):
    assert joined_text(["A title", "", "Acme", "A title", "Long words"], length) == expected


def test_a_word_longer_than_the_limit_is_cut():
    assert joined_text(["abcdef", "g"], 4) == "abcd"
