"""The report of an evaluation as files: ``report.html``, ``report.md`` and ``report.json``."""

from dataclasses import asdict
from pathlib import Path

from llm2rec.core.files import replaced_file, write_json
from llm2rec.evaluate.report.gathering import Findings
from llm2rec.evaluate.report.html_page import html_page
from llm2rec.evaluate.report.markdown_page import markdown_page
from llm2rec.evaluate.report.sections import document_of

__all__ = ["write_pages"]


def write_pages(folder: Path, findings: Findings) -> None:
    """Write the report in its three forms.

    Args:
        folder: Run folder of the evaluation.
        findings: What it says.
    """
    document = document_of(findings)
    write_json(folder / "report.json", asdict(findings))
    for name, text in (("report.md", markdown_page(document)), ("report.html", html_page(document))):
        with replaced_file(folder / name) as aside:
            aside.write_text(text, encoding="utf-8")
