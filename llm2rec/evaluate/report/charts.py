"""Charts as inline SVG, for any width, so that phones get their own drawing.

Colours are CSS classes (``s0`` to ``s6``) that the page defines for light and dark mode. They are distinguishable
without red and green, and each has its own marker shape, so that a chart is readable without colour. Matplotlib's SVG
would be five times the size, with fixed colours in inline styles and element ids that repeat within a page.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["N_COLOURS", "Dot", "Line", "forest", "grouped", "lines", "scatter"]

N_COLOURS = 7
_N_MARKS = 5
_LETTER = 7.0  # mean letter width in the widest common font
_LINE = 15.0  # height of a further line of a text
_ROOMY = 500  # from this width on, intervals are also written beside the chart


@dataclass(frozen=True)
class Dot:
    """A value with an interval.

    Attributes:
        name: Its name.
        value: The value.
        low: Lower end of its interval; None if there is no interval.
        high: Upper end.
        slot: Number of its colour and marker.
        x: Position on the x axis of a `scatter`.
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
        name: Its name.
        points: x and y, by ascending x; at least one.
        best: The x of the point to ring.
        slot: Number of its colour and marker.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    best: float
    slot: int = 0


@dataclass(frozen=True)
class _Scale:
    """A linear or logarithmic scale from values to pixels."""

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
        """About ``n`` round numbers inside the scale, at least 3."""
        ticks: list[float] = []
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1,), (1, 3), (1, 2, 5)):  # a decade
                powers = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                ticks = [each for each in powers if self.low <= each <= self.high]
                if len(ticks) >= 3:
                    break
        while len(ticks) < 3:  # also for a logarithmic scale with a small range
            step = _round_step((self.high - self.low) / n)
            ticks = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
            n += 1
        return ticks


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _span(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that shows all values, with a margin."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
        if low == high:  # all values are 0
            return 0.0, 1.0
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - margin), (high if zero and high == 0 else high + margin)


def _tick(value: float) -> str:
    """The label of a tick, without trailing zeros."""
    return f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}".replace("-", "\u2212")


class _Canvas:
    """The elements of one chart; all texts are escaped."""

    def __init__(self, width: int) -> None:
        self.width, self.parts = width, list[str]()

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> None:
        of_kind = f' class="{kind}"' if kind else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}"{of_kind} text-anchor="{anchor}">{escape(text, quote=False)}</text>'
        )

    def wrapped(self, x: float, y: float, parts: Sequence[str], *, kind: str = "", anchor: str = "start") -> None:
        """Lines of text, one below the other; see `_wrapped`."""
        for number, part in enumerate(parts):
            self.text(x, y + _LINE * number, part, kind=kind, anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def mark(self, x: float, y: float, slot: int, size: float = 4.5) -> None:
        """The marker of a slot: circle, square, triangle, diamond or inverted triangle."""
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
        """A dot with its horizontal interval, or without an interval a line from 0."""
        colour = f"s{dot.slot % N_COLOURS}"
        if dot.low is not None and dot.high is not None:
            self.line(scale(dot.low), y, scale(dot.high), y, f"whisker {colour}")
        else:
            self.line(scale(0), y, scale(dot.value), y, f"stalk {colour}")
        self.mark(scale(dot.value), y, dot.slot)

    def legend(self, y: float, named: Sequence[tuple[str, int]]) -> float:
        """The legend, with as many columns as fit; returns the y of its end."""
        columns = max(1, int(self.width // (34 + _LETTER * max(len(name) for name, _ in named))))
        wide = self.width / columns
        for start in range(0, len(named), columns):
            parts = [_wrapped(name, wide - 24) for name, _ in named[start : start + columns]]
            for number, (_, slot) in enumerate(named[start : start + columns]):
                self.mark(number * wide + 7, y - 4, slot)
                self.wrapped(number * wide + 20, y, parts[number])
            y += 20 + _LINE * (max(map(len, parts)) - 1)
        return y

    def across(self, scale: _Scale, top: float, bottom: float, name: str, zero: bool) -> float:
        """Grid lines of the x axis from ``top`` to ``bottom``, tick labels and name; returns the y of its end."""
        for tick in scale.ticks(max(3, self.width // 110)):
            self.line(scale(tick), top, scale(tick), bottom, "zero" if zero and tick == 0 else "grid")
            self.text(scale(tick), bottom + 16, _tick(tick), kind="tick", anchor="middle")
        parts = _wrapped(name, self.width)
        middle = max(
            (scale.start + scale.stop) / 2, _LETTER * max(map(len, parts)) / 2
        )  # a long one starts at the edge
        self.wrapped(min(middle, self.width / 2), bottom + 35, parts, kind="axis", anchor="middle")
        return bottom + 44 + _LINE * (len(parts) - 1)

    def svg(self, height: float, title: str, description: str) -> str:
        """The SVG element, with title and description for screen readers."""
        label = escape(f"{title}. {description}", quote=True)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{self.width}" '
            f'height="{height:.0f}" viewBox="0 0 {self.width} {height:.0f}">'
            f"<title>{escape(title, quote=False)}</title><desc>{escape(description, quote=False)}</desc>"
            + "".join(self.parts)
            + "</svg>"
        )


def _wrapped(text: str, room: float) -> list[str]:
    """Split a text into lines that fit into ``room`` pixels, at spaces where there are any."""
    return textwrap.wrap(text, max(2, int(room / _LETTER))) or [""]


def _numbers(dot: Dot, form: str, ends: bool = True) -> str:
    interval = "" if not ends or dot.low is None or dot.high is None else f" [{dot.low:{form}}, {dot.high:{form}}]"
    return f"{dot.value:{form}}{interval}".replace("-", "\u2212")


def forest(
    dots: Sequence[Dot], *, axis: str, title: str, description: str, zero: bool = False, form: str = ".2f", width: int
) -> str:
    """A forest plot: values with intervals, one below the other.

    Args:
        dots: At least one.
        axis: Name and unit of the x axis.
        title: Title for screen readers.
        description: Description for screen readers.
        zero: Whether the axis includes 0, marked by a line.
        form: Number format.
        width: Width in CSS pixels.

    Returns:
        An SVG element.
    """
    canvas, ends = _Canvas(width), [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    scale = _Scale(*_span(ends, zero=zero), 8, width - 8)
    numbers = [_numbers(dot, form) for dot in dots]
    names = [_wrapped(dot.name, width - _LETTER * len(own) - 24) for dot, own in zip(dots, numbers, strict=True)]
    height = canvas.across(scale, 4, 8 + sum(42 + _LINE * (len(name) - 1) for name in names), axis, zero)
    y = 20.0
    for dot, own, name in zip(dots, numbers, names, strict=True):
        canvas.wrapped(14, y, name, kind="name")
        canvas.text(width - 2, y, own, kind="number", anchor="end")
        y += _LINE * (len(name) - 1)
        canvas.whisker(scale, dot, y + 15)
        y += 42
    return canvas.svg(height, title, description)


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
    """A forest plot in groups with one legend; a group may lack some of the names. Arguments as in `forest`."""
    canvas = _Canvas(width)
    dots = [dot for _, each in groups for dot in each]
    ends = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    roomy = width >= _ROOMY
    numbers_room = max(len(_numbers(dot, form, roomy)) for dot in dots) * _LETTER + 14
    scale = _Scale(*_span(ends, zero=zero), 8, width - numbers_room)
    y = 0.0
    for name, each in groups:
        parts = _wrapped(name, width - 4)
        canvas.wrapped(2, y + 18, parts, kind="name")
        y += _LINE * (len(parts) - 1)
        for number, dot in enumerate(each):
            row = y + 36 + 20 * number
            canvas.whisker(scale, dot, row)
            canvas.text(width - 2, row + 4, _numbers(dot, form, roomy), kind="number", anchor="end")
        y += 34 + 20 * len(each)
    inner, canvas.parts = canvas.parts, []
    bottom = canvas.across(scale, 24, y, axis, zero)
    canvas.parts += inner  # above the grid
    named = dict.fromkeys((dot.name, dot.slot) for dot in dots)  # each once, in order
    height = canvas.legend(bottom + 18, list(named))
    return canvas.svg(height, title, description)


def _plane(
    canvas: _Canvas, xs: Sequence[float], ys: Sequence[float], x_axis: str, y_axis: str, *, log: bool = False
) -> tuple[_Scale, _Scale, float]:
    """Draw two axes; returns their scales and the y of their end."""
    parts = _wrapped(y_axis, canvas.width)
    top = 30.0 + _LINE * (len(parts) - 1)
    bottom = top + min(300.0, 0.62 * canvas.width)
    y_scale = _Scale(*_span(ys), bottom, top)
    ticks = y_scale.ticks(5)
    left = 12 + _LETTER * max((len(_tick(tick)) for tick in ticks), default=1)
    low, high = (min(xs) / 1.5, max(xs) * 1.5) if log else _span(xs)
    x_scale = _Scale(low, high, left, canvas.width - 10, log)
    canvas.wrapped(2, 14, parts, kind="axis")
    for tick in ticks:
        canvas.line(left, y_scale(tick), canvas.width - 4, y_scale(tick), "grid")
        canvas.text(left - 6, y_scale(tick) + 4, _tick(tick), kind="tick", anchor="end")
    return x_scale, y_scale, canvas.across(x_scale, top, bottom, x_axis, zero=False)


def lines(curves: Sequence[Line], *, x_axis: str, y_axis: str, title: str, description: str, width: int) -> str:
    """Curves with markers, the best point of each ringed. Arguments as in `forest`."""
    canvas = _Canvas(width)
    xs, ys = ([point[axis] for curve in curves for point in curve.points] for axis in (0, 1))
    x_scale, y_scale, y = _plane(canvas, xs, ys, x_axis, y_axis)
    for curve in curves:
        places = [(x_scale(a), y_scale(b)) for a, b in curve.points]
        canvas.curve(places, f"curve s{curve.slot % N_COLOURS}")
        apart = max(1, len(places) // 8)
        for number, (a, b) in enumerate(places):
            if number % apart == (curve.slot * 2) % apart:
                canvas.mark(a, b, curve.slot, 3.2)
            if curve.points[number][0] == curve.best:
                canvas.parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="7" class="ring s{curve.slot % N_COLOURS}"/>')
                canvas.mark(a, b, curve.slot, 3.2)
    named = list(dict.fromkeys((curve.name, curve.slot) for curve in curves))  # once for all seeds of an entry
    return canvas.svg(canvas.legend(y + 18, named), title, description)


def scatter(dots: Sequence[Dot], *, x_axis: str, y_axis: str, title: str, description: str, width: int) -> str:
    """A scatter plot with vertical intervals and a logarithmic x axis. Arguments as in `forest`."""
    canvas, xs = _Canvas(width), [dot.x for dot in dots]
    ys = [end for dot in dots for end in (dot.value, dot.low, dot.high) if end is not None]
    x_scale, y_scale, y = _plane(canvas, xs, ys, x_axis, y_axis, log=True)
    for dot in dots:
        x = x_scale(dot.x)
        if dot.low is not None and dot.high is not None:
            canvas.line(x, y_scale(dot.low), x, y_scale(dot.high), f"whisker s{dot.slot % N_COLOURS}")
        canvas.mark(x, y_scale(dot.value), dot.slot, 5.5)
    return canvas.svg(canvas.legend(y + 18, [(dot.name, dot.slot) for dot in dots]), title, description)
