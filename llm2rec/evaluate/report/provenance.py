"""The section of the report on how to reproduce it."""

import shlex

from llm2rec.evaluate.report.document import Block, Code, Facts, Note, Table
from llm2rec.evaluate.report.findings import Findings

__all__ = ["date_of", "provenance"]


def date_of(iso: str) -> str:
    """A time in ISO 8601 with a space and without seconds."""
    return iso.replace("T", " ")[:16] + iso[16:]


def provenance(findings: Findings) -> list[Block]:
    """Versions, runs and the commands that made them."""
    about = findings.about
    git, versions = about["git"], about["versions"]
    changed = ", with uncommitted changes" if git["dirty"] else ""
    commit = "unknown" if git["commit"] is None else git["commit"] + changed
    header = ["run", "entry", "stage", "seed", "started", "commit"]
    rows = [
        [
            run.name,
            run.entry,
            run.stage,
            "" if run.seed is None else str(run.seed),
            "not recorded" if run.started is None else date_of(run.started),
            run.commit or "not recorded",
        ]
        for run in findings.runs
    ]
    commands: list[Block] = [
        Code("This evaluation", shlex.join(["python", "-m", "llm2rec.evaluate", *about["overrides"]])),
        *[
            Code(f"{run.name}, {run.entry}", run.command)
            if run.command is not None
            else Note(f"{run.name}, {run.entry}: the command is not recorded.")
            for run in findings.runs
        ],
    ]
    launcher = (
        "Commands are for one process; a launcher such as accelerate launch is not recorded. A + marks a commit with "
        "uncommitted changes. Each run folder holds the full configuration."
    )
    return [
        Facts([("Commit", commit), *versions.items()]),
        Table("Runs", header, rows, is_text=True),
        *commands,
        Note(launcher),
    ]
