"""A document as data: what the report says, before it becomes HTML or Markdown. All texts are plain, unescaped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Block", "Code", "Document", "Facts", "Figure", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: What it says.
        is_note: Whether it is an aside, such as how to read what is near, or why something is left out.
    """

    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Code:
    """A command to copy.

    Attributes:
        name: What it makes.
        text: The command.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Names with their values.

    Attributes:
        pairs: Names and values.
    """

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Cells.
        is_text: Whether its cells are words, not numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_text: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawing, with its numbers for those who want or need them.

    Attributes:
        title: What it shows.
        description: What a reader would see in it, in words.
        draw: Gives the drawing as an SVG element, for a width.
        table: Its numbers.
    """

    title: str
    description: str
    draw: Callable[[int], str]
    table: Table


Block = Text | Code | Facts | Table | Figure


@dataclass(frozen=True)
class Section:
    """A part of a document.

    Attributes:
        name: Its anchor.
        title: Its title.
        blocks: What it holds.
    """

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole document.

    Attributes:
        title: Its title.
        subtitle: A line below it.
        sections: Its parts.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
