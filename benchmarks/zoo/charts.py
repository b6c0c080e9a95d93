"""Plots as inline SVG. Colours are CSS classes of the page, so a plot follows its light or dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.zoo.analysis import TrustPoint
from benchmarks.zoo.policies import PolicyLine

SIZE, MARGIN = 380, 48


def scatter(points: Sequence[TrustPoint], classes: Mapping[str, str], title: str) -> str:
    """verify's score across, what is left of the task's score upwards, a dot per carried adapter. `classes`: CSS class by row."""
    shapes = []
    for step in range(6):
        at = step / 5
        shapes.append(f'<line class="grid" x1="{_x(at):.0f}" x2="{_x(at):.0f}" y1="{_y(0):.0f}" y2="{_y(1):.0f}"/>')
        shapes.append(f'<line class="grid" x1="{_x(0):.0f}" x2="{_x(1):.0f}" y1="{_y(at):.0f}" y2="{_y(at):.0f}"/>')
        shapes.append(f'<text class="tick" x="{_x(at):.0f}" y="{_y(0) + 16:.0f}">{at:.1f}</text>')
        shapes.append(f'<text class="tick right" x="{_x(0) - 6:.0f}" y="{_y(at) + 4:.0f}">{at:.1f}</text>')
    for point in points:
        tip = escape(f"{point.sibling}, {point.row}: score {point.trust['trust']:.2f}, retention {point.retention:.2f}")
        across, up = _x(min(max(point.trust["trust"], 0.0), 1.0)), _y(point.retention)
        shapes.append(
            f'<circle class="{classes[point.row]} point" cx="{across:.1f}" cy="{up:.1f}" r="2.4"><title>{tip}</title></circle>'
        )
    shapes.append(f'<text class="label" x="{_x(0.5):.0f}" y="{_y(0) + 36:.0f}">verify’s score, without labels</text>')
    shapes.append(
        f'<text class="label" transform="translate(12 {_y(0.5):.0f}) rotate(-90)">score on the target / on the source</text>'
    )
    return _svg(MARGIN + SIZE + 16, SIZE + MARGIN + 12, shapes, title)


def regrets(lines: Sequence[PolicyLine], title: str) -> str:
    """A bar per policy: its mean regret in points."""
    names, width, lane = 250, 860, 20
    most = max((line.everywhere.mean for line in lines), default=1.0) or 1.0
    scale = (width - names - 90) / most
    shapes = []
    for index, line in enumerate(lines):
        top = 6 + index * lane
        css = "choice" if line.name.startswith("auto") else "bare" if line.name == "bare" else "copy"
        shapes.append(f'<text class="name" x="{names - 10}" y="{top + 12}">{escape(line.name)}</text>')
        shapes.append(
            f'<rect class="{css}" x="{names}" y="{top}" width="{max(1.5, line.everywhere.mean * scale):.1f}" height="{lane - 5}"/>'
        )
        end = names + line.everywhere.mean * scale + 6
        shapes.append(f'<text x="{end:.0f}" y="{top + 12}">{line.everywhere.mean:.1f}</text>')
    return _svg(width, 12 + len(lines) * lane, shapes, title)


def _x(share: float) -> float:
    return MARGIN + share * SIZE


def _y(share: float) -> float:
    return 8 + SIZE - share * SIZE


def _svg(width: float, height: float, shapes: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" style="max-width:{width:.0f}px">'
        f"<title>{escape(title)}</title>{''.join(shapes)}</svg>"
    )
