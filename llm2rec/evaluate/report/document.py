"""The report as data, before it becomes HTML or Markdown. All texts are plain and unescaped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

__all__ = ["Block", "Code", "Document", "Facts", "Figure", "Note", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: The text.
        is_note: Whether it is a note, such as how to read a figure or why a part is missing.
    """

    kind: ClassVar = "text"  # by which the templates choose
    text: str
    is_note: bool = False


Note = partial(Text, is_note=True)


@dataclass(frozen=True)
class Code:
    """A command to copy.

    Attributes:
        name: Its caption.
        text: The command.
    """

    kind: ClassVar = "code"
    name: str
    text: str


@dataclass(frozen=True)
class Facts:
    """A list of names with values.

    Attributes:
        pairs: Names and values.
    """

    kind: ClassVar = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        caption: Its caption.
        header: Column names.
        rows: Cells.
        is_text: Whether the cells hold words, not numbers.
    """

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers as a table.

    Attributes:
        title: Its title.
        description: What the chart shows, in words.
        draw: A function of `llm2rec.evaluate.report.charts` with its data bound.
        table: The numbers.
    """

    kind: ClassVar = "figure"
    title: str
    description: str
    draw: Callable[..., str]
    table: Table

    def svg(self, width: int) -> str:
        """The chart as an SVG element, ``width`` CSS pixels wide."""
        return self.draw(title=self.title, description=self.description, width=width)


Block = Text | Code | Facts | Table | Figure


@dataclass(frozen=True)
class Section:
    """A section of the document.

    Attributes:
        name: Its anchor.
        title: Its title.
        blocks: Its content.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole document.

    Attributes:
        title: Its title.
        subtitle: The line below the title.
        sections: Its sections; the first is set apart as the summary.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
