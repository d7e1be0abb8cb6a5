"""``python -m llm2rec.tune``: search options of a stage on validation.

All options but those below are the stage's. Give an option several values to search it, in Hydra's syntax of sweeps:
``student.model.dropout=0.1,0.2,0.4``, ``'student.training.learning_rate=tag(log, interval(1e-4, 1e-2))'``,
``'student.model.n_blocks=range(1, 4)'``, ``student=sasrec,gru4rec``.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm2rec.command import question
from llm2rec.config import build
from llm2rec.core.paths import note_folder
from llm2rec.core.processes import sigterm_raises
from llm2rec.reporting import interrupt_as_error
from llm2rec.tune.search import Search
from llm2rec.tune.settings import TuneSettings


def main() -> None:
    """Search, with the command line split between the search and the stage."""
    own, of_stage = split_arguments(sys.argv[1:])
    if flags := [each for each in own if each in ("-m", "--multirun")]:
        sys.exit(f"ConfigError: `{flags[0]}` does not work with tune, which reads sweeps as its search space.")
    sys.argv[1:] = own

    @question("tune")
    def search(cfg: Any) -> None:
        settings = build(cfg, TuneSettings)
        with sigterm_raises(), interrupt_as_error(" Start the same command again to continue."):
            note_folder(Search(settings, of_stage, {}, Path.cwd()).run().folder)

    search()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments of the search itself, and those of the stage."""
    names = {each.name for each in fields(TuneSettings)}
    own, of_stage = list[str](), list[str]()
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+")
        is_own = argument.startswith("-") or key in names or key.startswith(("hydra.", "hydra/"))
        (own if is_own else of_stage).append(argument)
    return own, of_stage


if __name__ == "__main__":
    main()
