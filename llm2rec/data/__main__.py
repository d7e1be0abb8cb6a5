"""``python -m llm2rec.data``: prepare a dataset and print its statistics."""

import logging

from llm2rec.config import Config
from llm2rec.core.run import Run
from llm2rec.data import doubts, format_statistics, tie_doubt, title_agreement
from llm2rec.data.masking import repeated_targets
from llm2rec.stage import open_data, stage

logger = logging.getLogger("llm2rec.data")


@stage("data", reads=())
def main(cfg: Config, run: Run) -> None:
    """Prepare the dataset."""
    data = open_data(cfg, run)
    statistics = {**data.statistics, "repeated_targets": repeated_targets(data)}  # earlier versions did not count them
    run.write_metrics("statistics", statistics)
    logger.info("%s\n%s", data.folder, format_statistics(statistics))
    for doubt in [*doubts(data.statistics), tie_doubt(data), title_agreement(data).doubt()]:
        if doubt is not None:
            logger.info("note: %s", doubt)


if __name__ == "__main__":
    main()
