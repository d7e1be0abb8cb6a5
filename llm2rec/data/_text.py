"""Texts of items: titles and further columns in one, cleaned and cut."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["clean_text", "joined_text"]

_SCRIPTS = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAGS = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)


def clean_text(value: object) -> str:
    """Turn a value into text without HTML and with single spaces.

    Args:
        value: Text, a number, None, or lists and mappings of them, whose elements are joined.
    """
    if isinstance(value, Mapping):
        value = [f"{name}: {each}" for name, each in ((name, clean_text(each)) for name, each in value.items()) if each]
    if isinstance(value, list | tuple | np.ndarray):
        return " ".join(filter(None, map(clean_text, value)))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = _TAGS.sub(" ", _SCRIPTS.sub(" ", html.unescape(str(value))))
    return " ".join(html.unescape(text).split())  # entities are often escaped twice


def joined_text(parts: Iterable[str], length: int) -> str:
    """Join texts of an item, without repeats, and cut them after a whole word.

    Args:
        parts: Clean texts, the title first; empty ones are left out.
        length: Most characters.
    """
    text = ". ".join(dict.fromkeys(filter(None, parts)))
    return text if len(text) <= length else text[: length + 1].rpartition(" ")[0] or text[:length]
