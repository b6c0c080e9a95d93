"""Plots as inline SVG: no file beside the page, and text that can be searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.frame.summary import Spread

COLOURS = ("#2f6db5", "#d9822b", "#14866d", "#b0578d", "#8a939c", "#7a5cc4")
LABELS, WIDTH, LANE, MARGIN = 270, 760, 20, 34  # pixels
HEIGHT = 220
TICKS = 5


def dots(title: str, rows: Sequence[tuple[str, Spread]]) -> str:
    """A row per name: a dot at the mean, a whisker of one standard deviation."""
    if not rows:
        return ""
    low, high = _range([spread for _, spread in rows])
    scale = (WIDTH - LABELS - MARGIN) / (high - low)
    bottom = MARGIN + LANE * len(rows)
    shapes = []
    for tick in range(TICKS):
        value = low + (high - low) * tick / (TICKS - 1)
        x = LABELS + (value - low) * scale
        shapes.append(_line(x, MARGIN - 8, x, bottom, "#ddd"))
        shapes.append(_text(x, MARGIN - 14, f"{value:.3g}", "middle"))
    for index, (name, spread) in enumerate(rows):
        y, x = MARGIN + LANE * (index + 0.5), LABELS + (spread.mean - low) * scale
        shapes.append(_text(LABELS - 10, y + 4, name, "end"))
        if spread.std:
            shapes.append(_line(x - spread.std * scale, y, x + spread.std * scale, y, COLOURS[0]))
        shapes.append(_dot(x, y, COLOURS[0], f"{name}: {spread.text(3)}"))
    return _figure(title, WIDTH, bottom + 8, shapes)


def lines(title: str, x_label: str, curves: Mapping[str, Sequence[tuple[float, Spread]]]) -> str:
    """A line per name through its means, with whiskers of one standard deviation."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    low, high = _range([spread for _, spread in points])
    left, right = min(x for x, _ in points), max(x for x, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1.0) * (WIDTH / 2 - 2 * MARGIN)
        return 2 * MARGIN + across, MARGIN + HEIGHT * (high - y) / (high - low)

    shapes = []
    for tick in range(TICKS):
        value = low + (high - low) * tick / (TICKS - 1)
        y = at(left, value)[1]
        shapes += [_line(2 * MARGIN, y, WIDTH / 2, y, "#ddd"), _text(2 * MARGIN - 8, y + 4, f"{value:.3g}", "end")]
    for x in sorted({x for x, _ in points}):
        shapes.append(_text(at(x, low)[0], MARGIN + HEIGHT + 18, f"{x:g}", "middle"))
    shapes.append(_text(WIDTH / 4 + MARGIN, MARGIN + HEIGHT + 36, x_label, "middle"))
    for (name, curve), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(x, spread.mean) for x, spread in curve))
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, spread in curve:
            if spread.std:
                shapes.append(_line(*at(x, spread.mean - spread.std), *at(x, spread.mean + spread.std), colour))
            shapes.append(_dot(*at(x, spread.mean), colour, f"{name}, {x:g}: {spread.text(3)}"))
        last = at(*((curve[-1][0], curve[-1][1].mean)))
        shapes.append(_text(last[0] + 10, last[1] + 4, name, "start"))
    return _figure(title, WIDTH, MARGIN + HEIGHT + 44, shapes)


def _range(spreads: Sequence[Spread]) -> tuple[float, float]:
    """What the axis shows: all whiskers, with some room."""
    low = min(each.mean - (each.std or 0.0) for each in spreads)
    high = max(each.mean + (each.std or 0.0) for each in spreads)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _figure(title: str, width: float, height: float, shapes: Sequence[str]) -> str:
    content = "\n".join(shapes)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'font-size="12" aria-label="{escape(title)}">\n{content}\n</svg></figure>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _dot(x: float, y: float, colour: str, tip: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(tip)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'
