"""Render and write the report: ``report.html``, ``report.md`` and ``report.json``."""

import html
import re
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from llm2rec.core.files import replaced_file, write_json
from llm2rec.evaluate.report.document import Document
from llm2rec.evaluate.report.findings import Findings
from llm2rec.evaluate.report.sections import document_of

__all__ = ["render", "write_pages"]


def write_pages(folder: Path, findings: Findings) -> None:
    """Write the report as HTML, Markdown and JSON.

    Args:
        folder: Run folder of the evaluation.
        findings: Content of the report.
    """
    document = document_of(findings)
    write_json(folder / "report.json", asdict(findings))
    for name in ("report.md", "report.html"):
        with replaced_file(folder / name) as temporary:
            temporary.write_text(render(document, name), encoding="utf-8")


def render(document: Document, name: str) -> str:
    """Render a document by one of the templates.

    Args:
        document: The document; markup in its texts is escaped.
        name: ``report.html`` or ``report.md``.

    Returns:
        The page, with a newline at its end.
    """
    templates = Environment(
        loader=PackageLoader("llm2rec.evaluate.report"),
        autoescape=lambda template: template is not None and template.endswith(".html.j2"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"shown": _shown, "plain": _plain, "paragraph": _paragraph, "fence": _fence}
    return templates.get_template(f"{name}.j2").render(document=document)


def _shown(text: str) -> str:
    """A text for HTML; numbers stay on one line with their sign and unit."""
    return re.sub(r"(?<=<) (?=[\d.])| (?=%|< [\d.])", "\u00a0", text)


def _plain(text: str) -> str:
    """A text as one line of Markdown without markup."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _paragraph(text: str) -> str:
    """The same, where Markdown could take the beginning for a list."""
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", _plain(text))


def _fence(code: str) -> str:
    """A fence longer than any run of backticks in the code."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
