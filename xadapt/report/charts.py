"""Plots as inline SVG. Colours are classes of the page's style, so a plot follows its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 860, 200, 46


def columns(values: Sequence[tuple[str, float]], title: str, lowest: bool = False) -> str:
    """A column per layer, in order; with `lowest`, the fifth of the layers with the lowest values stands out."""
    finite = [(path, value) for path, value in values if math.isfinite(value)]
    if not finite:
        return ""
    most = max(1e-9, *(value for _, value in finite)) * 1.05
    least = min(0.0, *(value for _, value in finite))
    scale = HEIGHT / (most - least)
    step = (WIDTH - MARGIN - 10) / len(finite)
    ranked = sorted(value for _, value in finite)
    limit = ranked[max(1, round(0.2 * len(ranked))) - 1] if lowest else -math.inf
    zero = 10 + most * scale
    shapes = []
    for number in range(5):
        value = least + (most - least) * number / 4
        y = zero - value * scale
        shapes.append(f'<line class="grid" x1="{MARGIN}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text class="tick right" x="{MARGIN - 6}" y="{y + 4:.1f}">{value:.2f}</text>')
    for index, (path, value) in enumerate(finite):
        x, top = MARGIN + index * step, zero - max(value, 0.0) * scale
        css = "low" if value <= limit else "bar"
        shapes.append(
            f'<rect class="{css}" x="{x:.2f}" y="{top:.1f}" width="{max(step * 0.8, 0.5):.2f}" height="{max(abs(value) * scale, 1):.1f}">'
            f"<title>{escape(path)}: {value:.3f}</title></rect>"
        )
    return _svg(WIDTH, HEIGHT + 20, shapes, f"{title} by layer")


def shares(ways: Mapping[str, int]) -> str:
    """One bar in parts: how many layers go each way."""
    total, x, shapes = sum(ways.values()) or 1, 0.0, []
    for way, count in ways.items():
        width = WIDTH * count / total
        shapes.append(
            f'<rect class="{_css(way)}" x="{x:.1f}" y="0" width="{max(width - 2, 1):.1f}" height="22"><title>{count} layers</title></rect>'
        )
        x += width
    keys = "".join(
        f'<span class="key"><i class="{_css(way)}"></i>{escape(way)}: {count}</span>' for way, count in ways.items()
    )
    return _svg(WIDTH, 22, shapes, "layers by how they can be carried") + f'<p class="legend">{keys}</p>'


def moved(layers: Sequence[Mapping[str, Any]]) -> str:
    """A dot per layer: how far its inputs moved, and how far its outputs did."""
    points = [
        layer for layer in layers if layer.get("inputs_moved") is not None and layer.get("outputs_moved") is not None
    ]
    if not points:
        return ""
    size = 380
    most = 1.1 * max(0.1, *(max(point["inputs_moved"], point["outputs_moved"]) for point in points))
    shapes = [f'<path class="axis" d="M{MARGIN},10 V{size + 10} H{MARGIN + size}"/>']
    shapes.append(f'<line class="grid" x1="{MARGIN}" y1="{size + 10}" x2="{MARGIN + size}" y2="10"/>')
    for number in range(5):
        value = most * number / 4
        place = size * number / 4
        shapes.append(f'<text class="tick" x="{MARGIN + place:.0f}" y="{size + 26}">{value:.2f}</text>')
        shapes.append(f'<text class="tick right" x="{MARGIN - 6}" y="{size + 14 - place:.0f}">{value:.2f}</text>')
    for point in points:
        x, y = MARGIN + size * point["inputs_moved"] / most, 10 + size * (1 - point["outputs_moved"] / most)
        tip = escape(
            f"{point['source']}: inputs {point['inputs_moved']:.3f}, outputs {point['outputs_moved']:.3f}, {point['way']}"
        )
        shapes.append(
            f'<circle class="{_css(point["way"])}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{tip}</title></circle>'
        )
    shapes.append(f'<text class="label" x="{MARGIN + size / 2:.0f}" y="{size + 44}">how far the inputs moved</text>')
    shapes.append(
        f'<text class="label" transform="translate(12 {10 + size / 2:.0f}) rotate(-90)">how far the outputs moved</text>'
    )
    return _svg(size + MARGIN + 20, size + 52, shapes, "how far each layer's features moved")


def verified(rows: Sequence[Mapping[str, Any]]) -> str:
    """Score, direction and retention of the bare target, the copy and the transferred adapter."""
    shown = [row for row in rows if row["agreement"]]
    kinds = (("score", "score"), ("direction", "direction"), ("retention", "retention"))
    shapes, top, left = [], 6.0, 110
    span = WIDTH - left - 70
    for key, label in kinds:
        values = [(row["name"], row["retention"] if key == "retention" else row["agreement"][key]) for row in shown]
        values = [(name, value) for name, value in values if value is not None]
        if not values:
            continue
        shapes.append(f'<text class="name" x="{left - 10}" y="{top + 8 * len(values) + 4:.0f}">{label}</text>')
        for name, value in values:
            width = max(1.5, span * max(0.0, min(1.0, value)))
            shapes.append(
                f'<rect class="{_css(name)}" x="{left}" y="{top:.0f}" width="{width:.1f}" height="13"><title>{escape(name)}</title></rect>'
            )
            shapes.append(f'<text class="tag" x="{left + width + 6:.0f}" y="{top + 11:.0f}">{value:.3f}</text>')
            top += 16
        top += 12
    keys = "".join(
        f'<span class="key"><i class="{_css(row["name"])}"></i>{escape(row["name"])}</span>' for row in shown
    )
    return _svg(WIDTH, top, shapes, "what arrives on the target") + f'<p class="legend">{keys}</p>'


def _css(name: str) -> str:
    return name.replace(" ", "-")


def _svg(width: float, height: float, shapes: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" aria-label="{escape(title)}">'
        f"{''.join(shapes)}</svg>"
    )
