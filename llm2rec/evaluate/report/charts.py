"""Figures as inline SVG, drawn by hand: a few kinds, each for any width, so that a phone gets a drawing of its own.

Colours are classes (``s0`` to ``s6``) that the page defines, one set for light and one for dark. They are told apart
without red and green, and each comes with a mark of its own shape, so that no colour is needed to read a figure.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["N_COLOURS", "Dot", "Line", "forest", "grouped", "lines", "scatter"]

N_COLOURS = 7
_N_MARKS = 5
_LETTER = 7.0  # mean width of a letter, with the widest of the usual fonts
_ROOMY = 500  # width from which intervals are written out beside a drawing, not only drawn


@dataclass(frozen=True)
class Dot:
    """A value with an interval.

    Attributes:
        name: What it is of.
        value: The value.
        low: Lower end of its interval; None for none.
        high: Upper end.
        slot: Which colour and mark.
        x: Where it stands on the other axis, of a `scatter`.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    slot: int = 0
    x: float = 0.0


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: What it is of.
        points: x and y, by ascending x; at least one.
        best: The x of the point to mark.
        slot: Which colour and mark.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    best: float
    slot: int = 0


@dataclass(frozen=True)
class _Scale:
    """Maps numbers to places on the paper, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.stop - self.start)

    def ticks(self, n: int) -> list[float]:
        """Round numbers inside the scale, about ``n`` of them, at least 3."""
        found: list[float] = []
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1,), (1, 3), (1, 2, 5)):  # a decade
                powers = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                found = [each for each in powers if self.low <= each <= self.high]
                if len(found) >= 3:
                    break
        while len(found) < 3:  # of a logarithm, too, where it spans little
            step = _round_step((self.high - self.low) / n)
            found = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
            n += 1
        return found


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _span(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all values, with some air."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:  # nothing but zeros
            return 0.0, 1.0
    air = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - air), (high if zero and high == 0 else high + air)


def _told(value: float) -> str:
    """A number for a tick, without needless zeros."""
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\u2212")


class _Paper:
    """Collects the parts of one drawing; everything written on it is escaped."""

    def __init__(self, width: int) -> None:
        self.width, self.parts = width, list[str]()

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start", room: float = 1e9) -> None:
        longest = max(2, int(room / _LETTER))
        text = text if len(text) <= longest else text[: longest - 1] + "\u2026"
        of_kind = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}"{of_kind} text-anchor="{anchor}">{escape(text, quote=False)}</text>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def mark(self, x: float, y: float, slot: int, size: float = 4.5) -> None:
        """The mark of a slot: circle, square, triangle, diamond or triangle on its head."""
        kind, shape = f"mark s{slot % N_COLOURS}", (slot + slot // N_COLOURS) % _N_MARKS
        if shape == 0:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{kind}"/>')
            return
        tall = 1.25 * size
        corners = {
            1: [(-size, -size), (size, -size), (size, size), (-size, size)],
            2: [(0, -tall), (tall, size), (-tall, size)],
            3: [(0, -1.15 * tall), (1.15 * tall, 0), (0, 1.15 * tall), (-1.15 * tall, 0)],
            4: [(0, tall), (tall, -size), (-tall, -size)],
        }[shape]
        path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
        self.parts.append(f'<polygon points="{path}" class="{kind}"/>')

    def whisker(self, scale: Callable[[float], float], dot: Dot, y: float) -> None:
        """A dot with its interval along x; without interval a stalk from 0."""
        colour = f"s{dot.slot % N_COLOURS}"
        if dot.low is not None and dot.high is not None:
            self.line(scale(dot.low), y, scale(dot.high), y, f"whisker {colour}")
        else:
            self.line(scale(0), y, scale(dot.value), y, f"stalk {colour}")
        self.mark(scale(dot.value), y, dot.slot)

    def legend(self, y: float, named: Sequence[tuple[str, int]]) -> float:
        """Marks and what they stand for, as many a line as fit; returns where it ends."""
        columns = max(1, int(self.width // (34 + _LETTER * max(len(name) for name, _ in named))))
        wide = self.width / columns
        for number, (name, slot) in enumerate(named):
            x, row = (number % columns) * wide, y + 20 * (number // columns)
            self.mark(x + 7, row - 4, slot)
            self.text(x + 20, row, name, room=wide - 24)
        return y + 20 * (-(-len(named) // columns))

    def across(self, scale: _Scale, top: float, bottom: float, name: str, zero: bool) -> float:
        """Lines of the x axis from ``top`` to ``bottom``, its numbers and name; returns where it ends."""
        for tick in scale.ticks(max(3, self.width // 110)):
            self.line(scale(tick), top, scale(tick), bottom, "zero" if zero and tick == 0 else "grid")
            self.text(scale(tick), bottom + 16, _told(tick), kind="tick", anchor="middle")
        middle = max((scale.start + scale.stop) / 2, _LETTER * len(name) / 2)  # a long name begins at the edge
        self.text(min(middle, self.width / 2), bottom + 35, name, kind="axis", anchor="middle", room=self.width)
        return bottom + 44

    def svg(self, height: float, title: str, description: str) -> str:
        """The drawing, with a name and a description for those who cannot see it."""
        label = escape(f"{title}. {description}", quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{self.width}" '
            f'height="{height:.0f}" viewBox="0 0 {self.width} {height:.0f}">'
            f"<title>{escape(title, quote=False)}</title><desc>{escape(description, quote=False)}</desc>"
            + "".join(self.parts)
            + "</svg>"
        )


def _numbers(dot: Dot, form: str, ends: bool = True) -> str:
    told = "" if not ends or dot.low is None or dot.high is None else f" [{dot.low:{form}}, {dot.high:{form}}]"
    return f"{dot.value:{form}}{told}".replace("-", "\u2212")


def forest(
    dots: Sequence[Dot], *, axis: str, title: str, description: str, zero: bool = False, form: str = ".2f", width: int
) -> str:
    """Values with intervals below each other, each under its name.

    Args:
        dots: At least one.
        axis: Name and unit of the numbers.
        title: What is shown.
        description: What a reader would see, in words.
        zero: Whether 0 is on the axis, as a line of its own.
        form: How numbers are written.
        width: Of the drawing.

    Returns:
        An SVG element.
    """
    paper, ends = _Paper(width), [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    scale = _Scale(*_span(ends, zero=zero), 8, width - 8)
    bottom = 8 + 42 * len(dots)
    height = paper.across(scale, 4, bottom, axis, zero)
    for number, dot in enumerate(dots):
        y, told = 42 * number + 20, _numbers(dot, form)
        paper.text(14, y, dot.name, kind="name", room=width - _LETTER * len(told) - 24)
        paper.text(width - 2, y, told, kind="number", anchor="end")
        paper.whisker(scale, dot, y + 15)
    return paper.svg(height, title, description)


def grouped(
    groups: Sequence[tuple[str, Sequence[Dot]]],
    *,
    axis: str,
    title: str,
    description: str,
    zero: bool = True,
    form: str = ".2f",
    width: int,
) -> str:
    """The same names in several groups, one group below the other, with one legend; arguments as of `forest`.

    A group may lack some of the names.
    """
    paper = _Paper(width)
    dots = [dot for _, each in groups for dot in each]
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    roomy = width >= _ROOMY
    numbers_room = max(len(_numbers(dot, form, roomy)) for dot in dots) * _LETTER + 14
    scale = _Scale(*_span(ends, zero=zero), 8, width - numbers_room)
    y = 0.0
    for name, each in groups:
        paper.text(2, y + 18, name, kind="name", room=width - 4)
        for number, dot in enumerate(each):
            row = y + 36 + 20 * number
            paper.whisker(scale, dot, row)
            paper.text(width - 2, row + 4, _numbers(dot, form, roomy), kind="number", anchor="end")
        y += 34 + 20 * len(each)
    inner, paper.parts = paper.parts, []
    bottom = paper.across(scale, 24, y, axis, zero)
    paper.parts += inner  # upon the grid
    named = dict.fromkeys((dot.name, dot.slot) for dot in dots)  # each once, in order
    height = paper.legend(bottom + 18, list(named))
    return paper.svg(height, title, description)


def _plane(
    paper: _Paper, xs: Sequence[float], ys: Sequence[float], x_axis: str, y_axis: str, *, log: bool = False
) -> tuple[_Scale, _Scale, float]:
    """Two axes; returns their scales and where the drawing goes on below them."""
    top, bottom = 30.0, 30 + min(300.0, 0.62 * paper.width)
    y_scale = _Scale(*_span(ys), bottom, top)
    ticks = y_scale.ticks(5)
    left = 12 + _LETTER * max((len(_told(tick)) for tick in ticks), default=1)
    low, high = (min(xs) / 1.5, max(xs) * 1.5) if log else _span(xs)
    x_scale = _Scale(low, high, left, paper.width - 10, log)
    paper.text(2, 14, y_axis, kind="axis", room=paper.width)
    for tick in ticks:
        paper.line(left, y_scale(tick), paper.width - 4, y_scale(tick), "grid")
        paper.text(left - 6, y_scale(tick) + 4, _told(tick), kind="tick", anchor="end")
    return x_scale, y_scale, paper.across(x_scale, top, bottom, x_axis, zero=False)


def lines(curves: Sequence[Line], *, x_axis: str, y_axis: str, title: str, description: str, width: int) -> str:
    """Curves with marks along them, the best point of each ringed; arguments as of `forest`."""
    paper = _Paper(width)
    xs, ys = ([point[axis] for curve in curves for point in curve.points] for axis in (0, 1))
    x_scale, y_scale, y = _plane(paper, xs, ys, x_axis, y_axis)
    for curve in curves:
        places = [(x_scale(a), y_scale(b)) for a, b in curve.points]
        paper.curve(places, f"curve s{curve.slot % N_COLOURS}")
        apart = max(1, len(places) // 8)
        for number, (a, b) in enumerate(places):
            if number % apart == (curve.slot * 2) % apart:
                paper.mark(a, b, curve.slot, 3.2)
            if curve.points[number][0] == curve.best:
                paper.parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="7" class="ring s{curve.slot % N_COLOURS}"/>')
                paper.mark(a, b, curve.slot, 3.2)
    named = list(dict.fromkeys((curve.name, curve.slot) for curve in curves))  # seeds of one entry look alike
    return paper.svg(paper.legend(y + 18, named), title, description)


def scatter(dots: Sequence[Dot], *, x_axis: str, y_axis: str, title: str, description: str, width: int) -> str:
    """Dots in a plane, their intervals upright, x by its logarithm; arguments as of `forest`."""
    paper, xs = _Paper(width), [dot.x for dot in dots]
    ys = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    x_scale, y_scale, y = _plane(paper, xs, ys, x_axis, y_axis, log=True)
    for dot in dots:
        x = x_scale(dot.x)
        if dot.low is not None and dot.high is not None:
            paper.line(x, y_scale(dot.low), x, y_scale(dot.high), f"whisker s{dot.slot % N_COLOURS}")
        paper.mark(x, y_scale(dot.value), dot.slot, 5.5)
    return paper.svg(paper.legend(y + 18, [(dot.name, dot.slot) for dot in dots]), title, description)
