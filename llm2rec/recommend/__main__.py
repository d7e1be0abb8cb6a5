"""``python -m llm2rec.recommend``: recommend items with a finished student, or export it."""

import logging
import sys
from pathlib import Path
from typing import Any

from llm2rec.core.files import replaced_file
from llm2rec.recommend.export import EXPORTED, export_student
from llm2rec.recommend.lines import answer_lines, format_table
from llm2rec.recommend.recommender import Recommender
from llm2rec.recommend.settings import RecommendSettings
from llm2rec.stage import build, question

logger = logging.getLogger("llm2rec.recommend")


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
    )
    choices: dict[str, Any] = {"by": settings.by, "unknown": settings.unknown, "mask_seen": settings.mask_seen}
    if settings.history is not None:
        answer = recommender.recommend_one(settings.history, settings.k, **choices)
        sys.stdout.write(format_table(answer) + "\n")
    elif settings.histories is not None and settings.output is None:
        answer_lines(recommender, Path(settings.histories), sys.stdout, settings.k, **choices)
    elif settings.histories is not None and settings.output is not None:
        output = Path(settings.output)
        with replaced_file(output) as aside, open(aside, "w", encoding="utf-8") as file:
            n_answered = answer_lines(recommender, Path(settings.histories), file, settings.k, **choices)
        logger.info("wrote recommendations for %d histories to %s", n_answered, output)
    elif settings.export is not None:
        folder, formats = Path(settings.export), tuple(settings.formats)
        options: dict[str, Any] = {"k": settings.k, "mask_seen": settings.mask_seen, "formats": formats}
        export_student(recommender.model, recommender.names, folder, **options)
        logger.info("wrote %s", ", ".join(str(folder / EXPORTED[name]) for name in formats))


if __name__ == "__main__":
    main()
