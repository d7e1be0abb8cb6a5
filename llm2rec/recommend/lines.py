"""Histories and recommendations as JSON lines, and recommendations as a table."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from llm2rec.core.errors import DataError
from llm2rec.recommend.names import By, Unknown
from llm2rec.recommend.recommender import Recommendation, Recommender

__all__ = ["answer_lines", "format_table"]

_LINES = 1024  # per batch


def answer_lines(
    recommender: Recommender, file: Path, output: TextIO, k: int, *, by: By, unknown: Unknown, mask_seen: bool
) -> int:
    """Recommend for a file of histories, batch by batch, so that memory does not grow with the file.

    Args:
        recommender: The recommender.
        file: One JSON value a line: a list of ids or titles, or an object with such a list under ``history``.
        output: Receives one JSON object a line, in the same order: the input object (if it was one) with
            ``recommendations``, a list of objects with ``item_id``, ``title`` and ``score``.
        k: How many items.
        by: See `Recommender.recommend`, as for the rest.
        unknown: As above.
        mask_seen: As above.

    Returns:
        Number of histories.

    Raises:
        DataError: If the file does not exist, or a line is not a valid history; names file and line.
    """
    n_answered = 0
    for questions in _blocks(file):
        histories = []
        for number, question in questions:
            try:
                # Looked up here too, so that errors can name the line.
                recommender.names.items(question["history"], by, unknown)
            except DataError as error:
                raise type(error)(f"{file}, line {number}: {error}") from error
            histories.append(question["history"])
        answers = recommender.recommend(histories, k, by=by, unknown=unknown, mask_seen=mask_seen)
        for (_, question), answer in zip(questions, answers, strict=True):
            line = {**question, "recommendations": [vars(item) for item in answer]}
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
        n_answered += len(answers)
    return n_answered


def _blocks(file: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Questions with their line numbers, some lines at a time; empty lines are passed over."""
    if not file.is_file():
        raise DataError(
            f"`histories` is {str(file)!r}, which is not a file; give one with a JSON list or object a line."
        )
    block = []
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not UTF-8 ({error.reason}); save the file as UTF-8."
                ) from error
            if line.strip():
                block.append((number, _question(line, f"{file}, line {number}")))
            if len(block) == _LINES:
                yield block
                block = []
    if block:
        yield block


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter: thousands of brackets within brackets
        raise DataError(f"{where} is not JSON ({error}): {line.strip()[:60]!r}.") from error
    question = value if isinstance(value, dict) else {"history": value}
    if not isinstance(question.get("history"), list):
        raise DataError(f'{where} is {line.strip()[:60]!r}, expected a list, or an object with a list under "history".')
    return question


def format_table(answer: Sequence[Recommendation]) -> str:
    """One answer for a terminal."""
    cells = [("", "score", "id", "title")]
    cells += [(str(place), f"{item.score:.4f}", item.item_id, item.title) for place, item in enumerate(answer, start=1)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(
        "  ".join([row[0].rjust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]]) for row in cells
    )
