"""Plots as SVG: a scatter with its frontier, a histogram, a map of errors. Colours are the page's, by class; every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

import numpy as np

from r1q.benchmarks.report_axes import Scale, scale_of
from r1q.benchmarks.report_labels import Box, place_labels, shorten, text_width
from r1q.core.untrusted import printable

WIDTH, HEIGHT = 380.0, 310.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 46.0
Span = tuple[float, float]
# The page's colours and the marks' styles; a plot on its own brings them along.
COLOURS = """:root {
  --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --soft: #5b6470; --line: #dfe2e6; --grid: #eceef0;
  --accent: #2563c9; --float: #16191d; --dim: #9aa5b4; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #a3acb8; --line: #333a42; --grid: #2a3037;
    --accent: #7fb0ff; --float: #f1f3f5; --dim: #76818f; --bad: #ff9a92;
  }
}"""
MARKS = """svg { font: 12.5px system-ui, sans-serif; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.tick, .title { fill: var(--soft); } .title { font-size: 12px; }
.label { fill: var(--ink); stroke: var(--card); stroke-width: 3px; paint-order: stroke; }
.leader { stroke: var(--dim); } .whisker { stroke: var(--dim); stroke-width: 1.5; }
.frontier { fill: none; stroke: var(--accent); stroke-dasharray: 4 4; opacity: .7; }
.point { fill: var(--card); stroke: var(--accent); stroke-width: 2; }
.point.best { fill: var(--accent); } .point.float { fill: var(--float); stroke: var(--float); }
.bar { fill: var(--accent); opacity: .55; } .outline { fill: none; stroke: var(--float); stroke-width: 1.6; }
.cell { fill: var(--accent); }"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One artifact in a plot: its place, the 95 % intervals of it where they are known, and what a pointer over it is told."""

    label: str
    x: float
    y: float
    told: str
    x_span: Span | None = None
    y_span: Span | None = None
    is_float: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis shows; `up`: more of it is better; `log`: by decades; `zero`: from nothing."""

    title: str
    up: bool
    log: bool = False
    zero: bool = False


def scatter(name: str, points: Sequence[Point], x: Axis, y: Axis) -> tuple[str, list[str]]:
    """Return the SVG of `points` with labels and the line of those that no other beats, and the labels that found no room."""
    svg = _svg(name, WIDTH, HEIGHT)
    across = scale_of(_ends(points, "x"), LEFT, WIDTH - RIGHT, log=x.log, zero=x.zero)
    down = scale_of(_ends(points, "y"), HEIGHT - BOTTOM, TOP, log=y.log, zero=y.zero)
    _axes(svg, across, down, x.title, y.title)
    places = [(across.place(point.x), down.place(point.y)) for point in points]
    best = frontier(points, x, y)
    if len(best) > 1:
        line = " ".join(f"{places[i][0]:.1f},{places[i][1]:.1f}" for i in best)
        _add(svg, "polyline", "frontier", points=line)
    labels = [shorten(printable(point.label)) for point in points]
    lines = [
        line for point, place in zip(points, places, strict=True) for line in _whiskers(point, place, across, down)
    ]
    for whisker in lines:
        _add(svg, "line", "whisker", x1=whisker.left, y1=whisker.top, x2=whisker.right, y2=whisker.bottom)
    boxes = place_labels(places, labels, Box(LEFT, TOP - 4, WIDTH - 2, HEIGHT - BOTTOM - 2), lines)
    for index, (point, (left, top)) in enumerate(zip(points, places, strict=True)):
        kind = "point float" if point.is_float else "point best" if index in best else "point"
        mark = _add(svg, "circle", kind, cx=left, cy=top, r=4.5)
        Xml.SubElement(mark, "title").text = printable(point.told)
        if (placed := boxes[index]) is not None:
            box = placed.box
            if placed.led:
                near = (min(max(left, box.left), box.right), min(max(top, box.top), box.bottom))
                _add(svg, "line", "leader", x1=left, y1=top, x2=near[0], y2=near[1])
            _text(svg, labels[index], (box.left + box.right) / 2, box.bottom - 4, "label", "middle")
    return _written(svg), [label for label, box in zip(labels, boxes, strict=True) if box is None]


def frontier(points: Sequence[Point], x: Axis, y: Axis) -> list[int]:
    """Return the indices, by x, of the points that no other equals in one measure and beats in the other."""

    def beats(one: Point, other: Point) -> bool:
        ahead = [(a - b) * (1 if up else -1) for a, b, up in ((one.x, other.x, x.up), (one.y, other.y, y.up))]
        return min(ahead) >= 0 and max(ahead) > 0

    kept = [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda i: points[i].x)


def histogram(name: str, own: Sequence[int], other: Sequence[int] | None, title: str) -> str:
    """Return the SVG of how many answers had how many thinking tokens: bars for `own`, an outline for the float model's."""
    height = 210.0
    svg = _svg(name, WIDTH, height)
    most = max((*own, *(other or ())))
    bins = np.linspace(0, most + 1, min(24, most + 1) + 1)
    bars = np.histogram(own, bins)[0]
    line = np.histogram(other, bins)[0] if other else np.zeros(len(bars), dtype=np.int64)
    across = Scale(0.0, float(most + 1), LEFT, WIDTH - RIGHT, log=False)
    down = scale_of([float(max(bars.max(), line.max(), 1))], height - BOTTOM, TOP, log=False, zero=True)
    _axes(svg, across, down, title, "answers", height=height)
    for start, stop, count in zip(bins, bins[1:], bars, strict=False):
        left, right, top = across.place(float(start)), across.place(float(stop)), down.place(float(count))
        bar = _add(svg, "rect", "bar", x=left + 0.5, y=top, width=right - left - 1, height=height - BOTTOM - top)
        Xml.SubElement(bar, "title").text = f"{math.ceil(start)} to {math.ceil(stop) - 1} tokens: {count} answers"
    if other:
        steps = [(across.place(float(at)), down.place(float(n))) for i, n in enumerate(line) for at in bins[i : i + 2]]
        _add(svg, "polyline", "outline", points=" ".join(f"{left:.1f},{top:.1f}" for left, top in steps))
    return _written(svg)


def heat(
    name: str, cells: Mapping[tuple[int, str], tuple[float, str]], kinds: Mapping[str, str], low: float, high: float
) -> str:
    """Return the SVG of errors by (layer, kind): a row a layer, a column a kind, the darker the larger, by decades.

    `cells` holds the error and what a pointer is told; `kinds` the columns' short names in order; `low` and `high` are the ends of the
    colours, the same for every map of a page.
    """
    layers = sorted({layer for layer, _ in cells})
    side = max(5.0, min(20.0, 460 / len(layers)))
    left, top, gap = 36.0, 22.0, 1.0
    wide = (WIDTH - left - 4) / len(kinds)
    svg = _svg(name, WIDTH, top + side * len(layers) + 4)
    for column, short in enumerate(kinds.values()):
        size = min(12.0, 12.0 * (wide - 2) / max(1.0, text_width(short)))
        _text(svg, short, left + (column + 0.5) * wide, top - 7, "tick", "middle", size)
    for row, layer in enumerate(layers):
        if side >= 12 or row % math.ceil(12 / side) == 0:
            _text(svg, str(layer), left - 6, top + (row + 0.5) * side + 4, "tick", "end")
        for column, kind in enumerate(kinds):
            if (layer, kind) not in cells:
                continue
            error, told = cells[layer, kind]
            share = 0.0 if error <= low or high <= low else math.log(error / low) / math.log(high / low)
            cell = _add(
                svg, "rect", "cell", x=left + column * wide, y=top + row * side, width=wide - gap, height=side - gap
            )
            cell.set("fill-opacity", f"{0.08 + 0.92 * min(1.0, share):.2f}")
            Xml.SubElement(cell, "title").text = printable(told)
    return _written(svg)


def _ends(points: Sequence[Point], axis: str) -> list[float]:
    """Return the values of an axis with the ends of their intervals, which shall be seen too."""
    spans = [getattr(point, f"{axis}_span") for point in points]
    return [getattr(point, axis) for point in points] + [end for span in spans if span is not None for end in span]


def _whiskers(point: Point, place: tuple[float, float], across: Scale, down: Scale) -> Iterator[Box]:
    """Yield the lines of a point's intervals, as boxes without a width."""
    left, top = place
    if point.x_span is not None:
        low, high = (across.place(end) for end in point.x_span)
        yield Box(low, top, high, top)
    if point.y_span is not None:
        low, high = (down.place(end) for end in point.y_span)
        yield Box(left, high, left, low)


def _axes(svg: Xml.Element, across: Scale, down: Scale, x: str, y: str, height: float = HEIGHT) -> None:
    floor, middle = height - BOTTOM, (TOP + height - BOTTOM) / 2
    for value, words in down.ticks():
        top = down.place(value)
        _add(svg, "line", "grid", x1=LEFT, y1=top, x2=WIDTH - RIGHT, y2=top)
        _text(svg, words, LEFT - 6, top + 4, "tick", "end")
    for value, words in across.ticks():
        left = across.place(value)
        _add(svg, "line", "grid", x1=left, y1=TOP, x2=left, y2=floor)
        _text(svg, words, left, floor + 16, "tick", "middle")
    _add(svg, "line", "axis", x1=LEFT, y1=floor, x2=WIDTH - RIGHT, y2=floor)
    _text(svg, x, (LEFT + WIDTH - RIGHT) / 2, height - 8, "title", "middle")
    turned = _text(svg, y, 13, middle, "title", "middle")
    turned.set("transform", f"rotate(-90 13 {middle:.1f})")


def _svg(name: str, width: float, height: float) -> Xml.Element:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": printable(name)}
    return Xml.Element("svg", size)


def _add(parent: Xml.Element, tag: str, kind: str, **places: float | str) -> Xml.Element:
    given = {name: place if isinstance(place, str) else f"{place:.1f}" for name, place in places.items()}
    return Xml.SubElement(parent, tag, {"class": kind, **given})


def _text(
    parent: Xml.Element, text: str, left: float, bottom: float, kind: str, anchor: str, size: float | None = None
) -> Xml.Element:
    element = _add(parent, "text", kind, x=left, y=bottom)
    element.set("text-anchor", anchor)
    if size is not None:
        element.set("font-size", f"{size:.1f}")
    element.text = printable(text)
    return element


def _written(svg: Xml.Element) -> str:
    return Xml.tostring(svg, encoding="unicode", short_empty_elements=True)


def standalone(svg: str, scale: float = 1.5) -> str:
    """Return a plot of this module as a file of its own, on a card of its own: readable on a light page and on a dark one."""
    root = Xml.fromstring(svg)
    _, _, width, height = (float(part) for part in root.get("viewBox", "0 0 1 1").split())
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("width", f"{width * scale:g}")
    root.set("height", f"{height * scale:g}")
    style = Xml.Element("style")
    style.text = f"{COLOURS}\n{MARKS}\n.card {{ fill: var(--card); stroke: var(--line); }}"
    sides = {"x": "0.5", "y": "0.5", "width": f"{width - 1:g}", "height": f"{height - 1:g}", "rx": "6"}
    root.insert(0, Xml.Element("rect", {"class": "card", **sides}))
    root.insert(0, style)
    return _written(root) + "\n"
