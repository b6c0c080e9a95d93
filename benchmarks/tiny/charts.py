"""Plots as inline SVG, pictures as data URIs. Colours are CSS classes of the page, so a plot follows its light or dark theme."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from benchmarks.tiny.summary import COLUMNS, Table

LABELS = 230  # pixels for the names at the left of a bar chart
WIDTH = 860
LANE = 11  # height of a bar with its gap
GAP = 14  # between the groups
GAP_GREY = 144  # between pictures: seen beside black as beside white


def bars(table: Table) -> str:
    """A group of horizontal bars per sibling, one bar per adapter, a dot per seed; a whisker shows the spread."""
    part = table.part
    values = [value for cells in table.rows.values() for cell in cells.values() for value in cell.values]
    most = 1.0 if part.higher_is_better and max(values) <= 1.0 else max(values) * 1.05
    scale = (WIDTH - LABELS - 20) / most
    shapes: list[str] = []
    top = 22.0
    for sibling, cells in table.rows.items():
        shown = [column for column in table.columns if column in cells]
        middle = top + len(shown) * LANE / 2 + 4
        shapes.append(f'<text class="name" x="{LABELS - 10}" y="{middle:.0f}">{escape(part.heading(sibling))}</text>')
        for column in shown:
            cell = cells[column]
            end = LABELS + max(cell.mean, 0.0) * scale
            tip = escape(f"{COLUMNS.get(column, column)}: {cell.text(part.digits)}")
            shapes.append(
                f'<rect class="{column}" x="{LABELS}" y="{top:.1f}" width="{max(end - LABELS, 1.5):.1f}" height="{LANE - 3}">'
                f"<title>{tip}</title></rect>"
            )
            centre = top + (LANE - 3) / 2
            if cell.std:
                low, high = (LABELS + min(max(cell.mean + sign * cell.std, 0.0), most) * scale for sign in (-1, 1))
                shapes.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{centre}" y2="{centre}"/>')
            if len(cell.values) > 1:
                shapes += [
                    f'<circle class="seed" cx="{LABELS + value * scale:.1f}" cy="{centre}" r="2"/>'
                    for value in cell.values
                ]
            top += LANE
        top += GAP
    step = next(size for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, math.inf) if most / size <= 6)
    for number in range(int(most / step + 1e-9) + 1):
        x = LABELS + number * step * scale
        shapes.insert(
            0, f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{top - GAP:.0f}"/>'
        )  # behind the bars
        shapes.append(f'<text class="tick" x="{x:.1f}" y="11">{number * step:.1f}</text>')
    return _svg(WIDTH, top, shapes, f"{part.score} by sibling and adapter")


def legend(columns: Sequence[str]) -> str:
    """Colour keys for a bar chart."""
    keys = (
        f'<span class="key"><i class="{column}"></i>{escape(COLUMNS.get(column, column))}</span>' for column in columns
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def moved(choices: Sequence[dict[str, Any]], clearly: float, rounding: float) -> str:
    """Per layer how far its inputs and its outputs moved, over the regions in which the choice falls on each space."""
    size, margin = 420, 46
    most = 1.15 * max(max(row["inputs_moved"], row["outputs_moved"]) for row in choices)
    scale = size / most

    def at(inputs: float, outputs: float) -> tuple[float, float]:
        return margin + inputs * scale, size + 10 - outputs * scale

    def area(css: str, corners: Sequence[tuple[float, float]]) -> str:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*corner) for corner in corners))
        return f'<polygon class="{css} region" points="{points}"/>'

    floor = clearly * rounding
    wedge = [(0.0, floor), (rounding, floor), (most / clearly, most), (0.0, most)]
    shapes = [area("input", wedge), area("output", [(y, x) for x, y in wedge])]
    for (x, y), text in ((at(0.02 * most, 0.95 * most), "input"), (at(0.98 * most, 0.03 * most), "output")):
        shapes.append(
            f'<text class="{"where" if text == "input" else "where right"}" x="{x:.0f}" y="{y:.0f}">{text} space</text>'
        )
    x, y = at(0.80 * most, 0.84 * most)
    shapes.append(f'<text class="where middle" x="{x:.0f}" y="{y:.0f}">copy the LoRA</text>')
    for row in choices:
        x, y = at(row["inputs_moved"], row["outputs_moved"])
        tip = escape(
            f"{row['sibling']} {row['layer']}: inputs {row['inputs_moved']:.2f}, outputs {row['outputs_moved']:.2f}"
        )
        shapes.append(
            f'<circle class="{row["space"]} point" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
        )
    x0, y0 = at(0, 0)
    shapes.append(f'<path class="axis" d="M{x0},10 V{y0} H{x0 + size}"/>')
    for step in range(int(most * 2) + 1):
        (x, _), (_, y) = at(step / 2, 0), at(0, step / 2)
        shapes.append(f'<text class="tick" x="{x:.0f}" y="{y0 + 15:.0f}">{step / 2:.1f}</text>')
        shapes.append(f'<text class="tick right" x="{x0 - 6:.0f}" y="{y + 4:.0f}">{step / 2:.1f}</text>')
    shapes.append(
        f'<text class="label" x="{x0 + size / 2:.0f}" y="{y0 + 34:.0f}">how far the inputs moved (relative)</text>'
    )
    shapes.append(
        f'<text class="label" transform="translate(12 {10 + size / 2:.0f}) rotate(-90)">how far the outputs moved (relative)</text>'
    )
    shapes += _names(choices, at)
    return _svg(size + margin + 130, size + 52, shapes, "how far the features of each layer moved")


def learning_rates(tried: Sequence[dict[str, Any]]) -> str:
    """Loss on the source (logarithmic) against the learning rate, one small plot per space; the chosen rate is filled."""
    spaces = list(dict.fromkeys(row["space"] for row in tried))
    rates = sorted({row["learning_rate"] for row in tried})
    losses = [max(row["loss"], 1e-9) for row in tried]
    least, most = min(losses) / 1.1, max(losses) * 1.1
    wide, high, shapes = 230, 120, []
    for number, space in enumerate(spaces):
        left = 52 + number * (wide + 52)
        points = []
        mine = [row for row in tried if row["space"] == space]
        for row in sorted(mine, key=lambda row: row["learning_rate"]):
            x = left + (rates.index(row["learning_rate"]) + 0.5) * wide / len(rates)
            y = 24 + high * math.log(most / max(row["loss"], 1e-9)) / math.log(most / least)
            points.append(f"{x:.1f},{y:.1f}")
            tip = f"<title>learning rate {row['learning_rate']:g}: loss {row['loss']:.4f}</title>"
            css = "copy" if space == "lora" else space
            shapes.append(
                f'<circle class="{css}{"" if row["chosen"] else " hollow"}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{tip}</circle>'
            )
            shapes.append(f'<text class="tick" x="{x:.1f}" y="{24 + high + 18}">{row["learning_rate"]:g}</text>')
        shapes.insert(0, f'<polyline class="line" points="{" ".join(points)}"/>')
        shapes.append(f'<path class="axis" d="M{left},24 V{24 + high} H{left + wide}"/>')
        name = "LoRA" if space in ("lora", "copy") else COLUMNS.get(space, space)
        shapes.append(f'<text class="label" x="{left + wide / 2:.0f}" y="13">{escape(name)}</text>')
        shapes.append(f'<text class="tick right" x="{left - 4}" y="28">{most:.2g}</text>')
        shapes.append(f'<text class="tick right" x="{left - 4}" y="{28 + high}">{least:.2g}</text>')
    return _svg(52 + len(spaces) * (wide + 52), high + 50, shapes, "loss on the source by learning rate")


def sheet(grey: str, height: int, width: int, tile: int = 8, zoom: int = 3, gap: int = 2) -> str:
    """Square pictures that lie side by side without gaps, set apart and enlarged: a data URI of a PNG.

    `grey`: base64 of the grey levels (height, width), one byte each.
    """
    pixels = np.frombuffer(base64.b64decode(grey), np.uint8).reshape(height // tile, tile, width // tile, tile)
    pictures = pixels.swapaxes(1, 2).repeat(zoom, axis=2).repeat(zoom, axis=3)
    framed = np.pad(pictures, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=GAP_GREY).swapaxes(1, 2)
    return png(framed.reshape(framed.shape[0] * framed.shape[1], -1))


def png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """Grey levels (height, width) as a data URI of a PNG."""
    height, width = pixels.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey
    scanlines = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: stored as it is
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunks).decode()


def _names(choices: Sequence[dict[str, Any]], at: Any) -> list[str]:
    """Each sibling's name beside its outermost point, moved down where two would overlap."""
    outermost: dict[str, tuple[float, float]] = {}
    for row in choices:
        here = at(row["inputs_moved"], row["outputs_moved"])
        there = outermost.get(row["sibling"])
        if there is None or here[0] - here[1] > there[0] - there[1]:
            outermost[row["sibling"]] = here
    placed: list[tuple[float, float]] = []
    texts = []
    for sibling, (x, y) in sorted(outermost.items(), key=lambda item: item[1][1]):
        while any(abs(y - other_y) < 12 and abs(x - other_x) < 60 for other_x, other_y in placed):
            y += 4
        placed.append((x, y))
        texts.append(f'<text class="tag" x="{x + 7:.0f}" y="{y + 4:.0f}">{escape(sibling)}</text>')
    return texts


def _svg(width: float, height: float, shapes: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" aria-label="{escape(title)}">'
        f"{''.join(shapes)}</svg>"
    )
