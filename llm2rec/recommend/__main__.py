"""``python -m llm2rec.recommend``: recommend items with a finished student, or export it."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from llm2rec.command import question
from llm2rec.config import build
from llm2rec.core.errors import DataError
from llm2rec.core.files import replaced_file
from llm2rec.recommend.export import EXPORTED, export_student
from llm2rec.recommend.names import By, Recommendation, Unknown
from llm2rec.recommend.recommender import Recommender
from llm2rec.recommend.settings import RecommendSettings

logger = logging.getLogger("llm2rec.recommend")

_LINES = 1024  # per batch


@question("recommend")
def main(cfg: Any) -> None:
    """Load a student, and recommend or export."""
    settings = build(cfg, RecommendSettings)
    settings.check()
    # The recommender checks these words.
    recommender = Recommender.load(
        settings.run,
        revision=settings.revision,
        search=settings.search,  # type: ignore[arg-type]
        index=settings.index,
        items=settings.items,
        llm=settings.llm,
    )
    choices: dict[str, Any] = {"by": settings.by, "unknown": settings.unknown, "mask_seen": settings.mask_seen}
    if settings.history is not None:
        found = recommender.recommend_one(settings.history, settings.k, **choices)
        sys.stdout.write(format_table(found) + "\n")
    elif settings.histories is not None and settings.output is None:
        recommend_lines(recommender, Path(settings.histories), sys.stdout, settings.k, **choices)
    elif settings.histories is not None and settings.output is not None:
        output = Path(settings.output)
        with replaced_file(output) as aside, open(aside, "w", encoding="utf-8") as file:
            n_histories = recommend_lines(recommender, Path(settings.histories), file, settings.k, **choices)
        logger.info("wrote recommendations for %d histories to %s", n_histories, output)
    elif settings.export is not None:
        folder, formats = Path(settings.export), tuple(settings.formats)
        mask_seen = recommender.mask_seen if settings.mask_seen is None else settings.mask_seen
        options: dict[str, Any] = {"k": settings.k, "mask_seen": mask_seen, "formats": formats}
        export_student(recommender.model, recommender.names, folder, **options)
        logger.info("wrote %s", ", ".join(str(folder / EXPORTED[name]) for name in formats))


def recommend_lines(
    recommender: Recommender, file: Path, output: TextIO, k: int, *, by: By, unknown: Unknown, mask_seen: bool | None
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
    n_histories = 0
    for batch in _batches(file):
        histories = []
        for number, given in batch:
            try:
                # Looked up here too, so that errors can name the line.
                recommender.names.items(given["history"], by, unknown)
            except DataError as error:
                raise type(error)(f"{file}, line {number}: {error}") from error
            histories.append(given["history"])
        found = recommender.recommend(histories, k, by=by, unknown=unknown, mask_seen=mask_seen)
        for (_, given), items in zip(batch, found, strict=True):
            line = {**given, "recommendations": [vars(item) for item in items]}
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
        n_histories += len(found)
    return n_histories


def _batches(file: Path) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Parsed lines with their numbers, in batches; empty lines are skipped."""
    if not file.is_file():
        raise DataError(
            f"`histories` is {str(file)!r}, which is not a file; give one with a JSON list or object a line."
        )
    batch = []
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}, line {number} is not UTF-8 ({error.reason}); save the file as UTF-8."
                ) from error
            if line.strip():
                batch.append((number, _parsed(line, f"{file}, line {number}")))
            if len(batch) == _LINES:
                yield batch
                batch = []
    if batch:
        yield batch


def _parsed(line: str, where: str) -> dict[str, Any]:
    """A line as an object with a list under ``history``."""
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter: thousands of nested brackets
        raise DataError(f"{where} is not JSON ({error}): {line.strip()[:60]!r}.") from error
    given = value if isinstance(value, dict) else {"history": value}
    if not isinstance(given.get("history"), list):
        raise DataError(f'{where} is {line.strip()[:60]!r}, expected a list, or an object with a list under "history".')
    return given


def format_table(found: Sequence[Recommendation]) -> str:
    """Recommendations as a table for a terminal."""
    cells = [("", "score", "id", "title")]
    cells += [(str(place), f"{item.score:.4f}", item.item_id, item.title) for place, item in enumerate(found, start=1)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(
        "  ".join([row[0].rjust(widths[0]), row[1].rjust(widths[1]), row[2].ljust(widths[2]), row[3]]) for row in cells
    )


if __name__ == "__main__":
    main()
