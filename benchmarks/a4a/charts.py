"""Curves against samples seen as inline SVG, and sheets of pictures as data URIs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.a4a.driver import title
from benchmarks.a4a.summary import Cell

COLOURS = ("#2f6db5", "#d9822b", "#14866d", "#b0578d", "#8a939c", "#7a5cc4")  # read on white as on black
WIDTH, HEIGHT, LEFT, TOP = 420, 230, 46, 16


def colour(methods: Sequence[str], method: str) -> str:
    return COLOURS[methods.index(method) % len(COLOURS)]


def legend(methods: Sequence[str]) -> str:
    keys = (
        f'<span class="key"><i style="background:{colour(methods, method)}"></i>{escape(title(method))}</span>'
        for method in methods
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def curves(lines: Mapping[str, Sequence[tuple[float, Cell]]], x_label: str, y_label: str) -> str:
    """A line per method with a band of one standard deviation; the x axis is linear."""
    methods = list(lines)
    points = [(x, value) for line in lines.values() for x, cell in line for value in (*cell.values, cell.mean)]
    x_most = max(x for x, _ in points) or 1.0
    low, high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    if low == 0.0 and min(y for _, y in points) > 0.5 * high:  # losses: from zero they would look alike
        low = min(y for _, y in points) - 0.1 * (high - min(y for _, y in points))
    span = (high - low) * 1.05 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / x_most * (WIDTH - LEFT - 12), TOP + HEIGHT * (1 - (y - low) / span)

    shapes = []
    for tick in range(5):
        value = low + span * tick / 4
        _, y = at(0, value)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text class="tick right" x="{LEFT - 5}" y="{y + 4:.1f}">{value:.3g}</text>')
    for x in sorted({x for line in lines.values() for x, _ in line}):
        shapes.append(f'<text class="tick" x="{at(x, 0)[0]:.1f}" y="{TOP + HEIGHT + 16}">{x:g}</text>')
    for method, line in lines.items():
        ink = colour(methods, method)
        upper = [at(x, cell.mean + cell.std) for x, cell in line]
        lower = [at(x, cell.mean - cell.std) for x, cell in reversed(line)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*upper, *lower))
        path = " ".join("{:.1f},{:.1f}".format(*at(x, cell.mean)) for x, cell in line)
        shapes.append(f'<polygon points="{band}" fill="{ink}" fill-opacity=".13"/>')
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        for x, cell in line:
            cx, cy = at(x, cell.mean)
            tip = escape(f"{title(method)}, {x:g}: {cell.text(3)}")
            shapes.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3.5" fill="{ink}"><title>{tip}</title></circle>')
    middle = LEFT + (WIDTH - LEFT) / 2
    shapes.append(f'<text class="label" x="{middle:.0f}" y="{TOP + HEIGHT + 34}">{escape(x_label)}</text>')
    shapes.append(f'<text class="label" x="{middle:.0f}" y="11">{escape(y_label)}</text>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {TOP + HEIGHT + 42}" style="max-width:{WIDTH}px" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}">{"".join(shapes)}</svg>'
    )


def picture(rgb: str, height: int, width: int) -> str:
    """base64 of RGB bytes (height, width, 3) as a data URI of a PNG."""
    pixels = base64.b64decode(rgb)
    rows = b"".join(b"\0" + pixels[3 * width * row : 3 * width * (row + 1)] for row in range(height))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()
