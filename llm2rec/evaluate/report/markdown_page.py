"""A document as Markdown: figures become the tables of their numbers."""

import html
import re
from collections.abc import Sequence

from llm2rec.evaluate.report.document import Block, Code, Document, Facts, Figure, Table, Text

__all__ = ["markdown_page"]

_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def markdown_page(document: Document) -> str:
    """Write a document as Markdown (GitHub's, for its tables).

    Args:
        document: The document; markup in its texts is shown, not followed.

    Returns:
        The page, with a newline at its end.
    """
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """A text in one line that means what it says."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _paragraph(text: str) -> str:
    """A text that is no list, whatever it begins with."""
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", _plain(text))


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"> {_paragraph(block.text)}" if block.is_note else _paragraph(block.text)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        return f"{_plain(block.name)}:\n\n{fence}bash\n{block.text}\n{fence}"
    if isinstance(block, Facts):
        return "\n".join(f"- **{_plain(name)}**: {_plain(value)}" for name, value in block.pairs)
    if isinstance(block, Figure):
        return f"**{_plain(block.title)}.** {_plain(block.description)}\n\n{_rows(block.table)}"
    return f"**{_plain(block.caption)}**\n\n{_rows(block)}"


def _rows(table: Table) -> str:
    ruler = ["---", *["---" if table.is_text else "---:"] * (len(table.header) - 1)]
    return "\n".join(map(_line, [list(map(_plain, table.header)), ruler, *[list(map(_plain, r)) for r in table.rows]]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
