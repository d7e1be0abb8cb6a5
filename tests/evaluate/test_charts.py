"""Charts are well-formed SVG inside their view box, with accessible texts and distinguishable colours."""

import re
from importlib import resources
from xml.etree import ElementTree

import numpy as np
import pytest

from llm2rec.evaluate.report.charts import N_COLOURS, Dot, Line, _Scale, forest, grouped, lines, scatter

NAMES = ["popularity", 'a <b> & "c"', "gru4rec + dllm2rec (ilora_hybrid-llama3_8b), with a name that goes on and on"]
DOTS = [Dot(name, 1.5 - i, 0.2 - i, 2.75 - i, slot=i, x=10.0**i) for i, name in enumerate(NAMES)]
CURVES = [
    Line(name, tuple((10.0 * s, (i + 1) * s / 7) for s in range(1, 9)), 40, slot=i) for i, name in enumerate(NAMES)
]
CURVES += [Line("one point", ((30.0, 2.0),), 30, slot=3)]
SAID = {"title": "Gain <of> all", "description": 'Higher is "better".'}
DRAWN = {
    "forest": lambda width: forest(DOTS, axis="NDCG (%)", zero=True, width=width, **SAID),
    "forest of zeros": lambda width: forest([Dot("x", 0, 0, 0)], axis="shared (%)", zero=True, width=width, **SAID),
    "forest of one": lambda width: forest([Dot("x", 0, 0, 0)], axis="NDCG (%)", width=width, **SAID),
    "grouped": lambda width: grouped([("few", DOTS), ("many", DOTS)], axis="gain (points)", width=width, **SAID),
    "stalks": lambda width: grouped(
        [("all", [Dot("expert 1", 25.0), Dot("expert 2", 75.0)])], axis="%", width=width, **SAID
    ),
    "lines": lambda width: lines(CURVES, x_axis="steps", y_axis="NDCG (%)", width=width, **SAID),
    "scatter": lambda width: scatter(DOTS, x_axis="time (ms)", y_axis="NDCG (%)", width=width, **SAID),
}


def numbers(element):
    """Coordinates of an element, by axis."""
    for name, value in element.attrib.items():
        if name in ("x", "x1", "x2", "cx"):
            yield "x", float(value)
        elif name in ("y", "y1", "y2", "cy"):
            yield "y", float(value)
        elif name == "points":
            for pair in value.split():
                yield from zip("xy", map(float, pair.split(",")), strict=True)


@pytest.mark.parametrize("width", [340, 768])
@pytest.mark.parametrize("kind", DRAWN)
def test_a_chart_is_well_formed_inside_its_view_box_and_described(kind, width):
    drawing = ElementTree.fromstring(DRAWN[kind](width))
    bounds = {"x": width, "y": float(drawing.get("height"))}
    assert drawing.get("viewBox") == f"0 0 {width} {bounds['y']:.0f}"
    for element in drawing.iter():
        for axis, place in numbers(element):
            assert 0 <= place <= bounds[axis], ElementTree.tostring(element)
    tag = "{http://www.w3.org/2000/svg}"
    texts = " ".join(text.text for text in drawing.iter(f"{tag}text"))
    if kind in ("forest", "grouped", "lines", "scatter"):
        assert [name for name in NAMES if name not in texts] == []
    assert drawing.get("role") == "img"
    assert drawing.get("aria-label") == 'Gain <of> all. Higher is "better".'
    assert drawing.find(f"{tag}title").text == "Gain <of> all"
    assert drawing.find(f"{tag}desc").text == 'Higher is "better".'
    axes = [text.text for text in drawing.iter(f"{tag}text") if text.get("class") == "axis"]
    assert axes
    assert all("%" in axis or "(" in axis or axis == "steps" for axis in axes)


def test_whiskers_are_at_their_values():
    drawing = ElementTree.fromstring(
        forest([Dot("a", 2, 1, 4), Dot("b", 3, 0, 4)], axis="%", zero=True, width=416, **SAID)
    )
    scale = _Scale(0, 4.16, 8, 408)  # a margin of 4 % on the side that does not end at 0
    whiskers = [each for each in drawing.iter() if each.get("class", "").startswith("whisker")]
    for whisker, (low, high) in zip(whiskers, [(1, 4), (0, 4)], strict=True):
        assert float(whisker.get("x1")) == pytest.approx(scale(low), abs=0.06)
        assert float(whisker.get("x2")) == pytest.approx(scale(high), abs=0.06)


@pytest.mark.parametrize(
    ("low", "high", "n", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 12, 3, [0, 5, 10]),
        (-1.7, 1.7, 3, [-1, 0, 1]),
        (96, 104, 4, [96, 98, 100, 102, 104]),
    ],
)
def test_ticks_are_round(low, high, n, expected):
    assert _Scale(low, high, 0, 1).ticks(n) == pytest.approx(expected)


def test_ticks_of_a_logarithm_are_round():
    assert _Scale(0.2, 9, 0, 1, log=True).ticks(4) == pytest.approx([0.3, 1, 3])
    assert _Scale(0.4, 60, 0, 1, log=True).ticks(4) == pytest.approx([1, 3, 10, 30])
    assert _Scale(0.4, 2.5, 0, 1, log=True).ticks(4) == pytest.approx([0.5, 1, 2])
    assert _Scale(0.2, 3000, 0, 1, log=True).ticks(4) == pytest.approx([1, 10, 100, 1000])
    assert _Scale(0.2, 0.45, 0, 1, log=True).ticks(4) == pytest.approx([0.2, 0.3, 0.4])  # no three powers


STYLE = (resources.files("llm2rec.evaluate.report") / "templates" / "report.css.j2").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--(\w+):(#\w{6});", rule)) for rule in re.findall(r":root\{([^}]*)\}", STYLE))


def luminance(colour):
    parts = linear(colour)
    return float(parts @ [0.2126, 0.7152, 0.0722])


def linear(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Red-blind and green-blind vision, on linear RGB (Viénot, Brettel and Mollon 1999).
BLIND = {
    "red": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "green": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def lab(parts):
    """Linear RGB in CIELAB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ parts / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(np.maximum(xyz, 0)), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
class TestColours:
    def test_text_and_marks_stand_out(self, colours):
        for ground in ("paper", "card"):
            assert contrast(colours["ink"], colours[ground]) > 7
            assert contrast(colours["soft"], colours[ground]) > 4.5
            assert contrast(colours["accent"], colours[ground]) > 4.5
        for slot in range(N_COLOURS):
            assert contrast(colours[f"s{slot}"], colours["paper"]) > 3

    @pytest.mark.parametrize("eyes", BLIND)
    def test_colours_are_distinguishable_for_the_colour_blind(self, colours, eyes):
        seen = [lab(np.array(BLIND[eyes]) @ linear(colours[f"s{slot}"])) for slot in range(N_COLOURS)]
        apart = {(i, j): np.linalg.norm(seen[i] - seen[j]) for i in range(N_COLOURS) for j in range(i)}
        assert min(apart.values()) > 10, min(apart, key=apart.get)


def test_the_legend_names_each_dot_once():
    first, second = Dot("early", 1.0, slot=0), Dot("late", 2.0, slot=1)
    drawn = grouped([("few", [first]), ("many", [first, second])], axis="gain", width=800, **SAID)
    assert drawn.count(">early<") == drawn.count(">late<") == 1
