"""Grids of images for the report: per subject, the source's and the target's rows, one method under the other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.dreambooth.measured import Measured, grouped, measured
from benchmarks.dreambooth.settings import Settings
from benchmarks.dreambooth.tables import chosen_rates_only, row_order
from benchmarks.frame.store import Store

COLUMNS = 8
SIDE = 112


def grids(settings: Settings, records: Sequence[dict[str, Any]], store: Store) -> list[str]:
    """HTML, one table of images per pair and subject, of the first seed there is."""
    found = chosen_rates_only(settings, measured(records))
    prompts = {record["name"]: record["settings"].get("prompts", []) for record in records}
    parts = []
    for (pair, subject), own in grouped(found, lambda each: (each.variant.pair, each.subject)).items():
        seed = min(each.seed for each in own)
        shown = [each for each in own if each.seed == seed and _files(store, each)]
        if shown:
            parts.append(_grid(f"{pair}: {subject}", shown, prompts[shown[0].artifacts], store))
    return ["<h2>Images</h2>", *parts] if parts else []


def _grid(title: str, shown: list[Measured], prompts: Sequence[str], store: Store) -> str:
    rows = []
    real = next((path for each in shown if (path := _real(store, each)) is not None), None)
    if real:
        cells = "".join(f"<td>{_image(path)}</td>" for path in real[:COLUMNS])
        rows.append(f"<tr><td>photographs</td><td></td>{cells}</tr>")
    for side in ("source", "target"):
        for each in sorted((one for one in shown if one.side == side), key=lambda one: row_order(one.variant)):
            name = " ".join(filter(None, [each.variant.method, each.variant.label]))
            rank = f" r{each.variant.rank}" if each.variant.rank else ""
            cells = "".join(f"<td>{_image(path)}</td>" for path in _files(store, each)[:COLUMNS])
            rows.append(f"<tr><td>{side}</td><td>{html.escape(name + rank)}</td>{cells}</tr>")
    head = "".join(f"<th>{html.escape(prompt)}</th>" for prompt in prompts[:COLUMNS])
    return f"<h3>{html.escape(title)}</h3>\n<table><tr><th></th><th></th>{head}</tr>\n" + "\n".join(rows) + "</table>"


def _files(store: Store, each: Measured) -> list[Path]:
    """One image per prompt, in the order of the prompts."""
    found = sorted((store.folder / "artifacts" / each.artifacts / "images").glob("[0-9]*-*.jpg"))
    first = {path.name.partition("-")[0]: path for path in reversed(found)}
    return [first[key] for key in sorted(first)]


def _real(store: Store, each: Measured) -> list[Path] | None:
    found = sorted((store.folder / "artifacts" / each.artifacts / "images").glob("real-*.jpg"))
    return found or None


def _image(path: Path) -> str:
    """A small JPEG inside the page."""
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        width, height = image.size
    shown = max(1, SIDE // max(width, height))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{width * shown}" height="{height * shown}" src="data:image/jpeg;base64,{data}">'
