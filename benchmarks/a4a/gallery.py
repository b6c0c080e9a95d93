"""The page of a run on real models: tables, curves against samples seen, and a sheet of images per adapter."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.a4a import charts
from benchmarks.a4a.report import STYLE
from benchmarks.a4a.summary import Cell, select
from benchmarks.a4a.table_1 import table_1

SCORES = {
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
    "ida": "IDA, faces found",
    "ida_as_zero": "IDA, none as 0",
    "faces": "faces found",
}


def page(results: dict[str, Any], folder: Path) -> str:
    """One HTML page with everything in it."""
    style = STYLE.read_text(encoding="utf-8")
    body = [f"<h1>A4A on real models: preset {escape(results['preset'])}</h1>"]
    if (beside := table_1(results)) is not None:
        body.append(beside.html())
    for target in dict.fromkeys(row["target"] for row in results["sweep"]):
        body.append(f"<h2>{escape(target)}</h2>{_table(results, target)}")
        body += [_curves(results, target, score) for score in SCORES]
        body += [_sheet(folder, path) for path in sorted((folder / "images").glob(f"{target}-*.jpg"))]
    clip = escape(results["settings"]["clip"])
    body.append(
        f"<p>CLIP model: {clip}. IDA by insightface's antelopev2, whose weights are for non-commercial research only.</p>"
    )
    head = (
        f'<meta charset="utf-8"><title>xadapt: benchmarks/a4a {escape(results["preset"])}</title><style>{style}</style>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{"".join(body)}</main></body></html>\n'


def _table(results: dict[str, Any], target: str) -> str:
    """Every score by method and λ, over seeds."""
    rows = select(results["sweep"], target=target)
    shown = [score for score in SCORES if any(score in row for row in rows)]
    lines = []
    for method, scale in dict.fromkeys((row["method"], row["scale"]) for row in rows):
        own = select(rows, method=method, scale=scale)
        cells = "".join(f"<td>{Cell(tuple(row[score] for row in own)).text(4)}</td>" for score in shown)
        lines.append(f"<tr><td>{escape(_title(method))}</td><td>{scale:g}</td>{cells}</tr>")
    heads = "".join(f"<th>{SCORES[score]}</th>" for score in shown)
    return f'<div class="scroll"><table><tr><th>method</th><th>λ</th>{heads}</tr>{"".join(lines)}</table></div>'


def _curves(results: dict[str, Any], target: str, score: str) -> str:
    rows = [row for row in select(results["rows"], target=target) if score in row]
    lines = {
        method: [
            (samples, Cell(tuple(row[score] for row in select(rows, method=method, samples=samples))))
            for samples in sorted({row["samples"] for row in select(rows, method=method)})
        ]
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    if not lines:
        return ""
    return f"<figure>{charts.legend(list(lines))}{charts.curves(lines, 'samples seen', SCORES[score])}</figure>"


def _sheet(folder: Path, path: Path) -> str:
    coded = base64.b64encode(path.read_bytes()).decode()
    caption = f"{escape(path.stem)}: the reference, then an image per prompt."
    return f'<figure><img style="max-width:100%" src="data:image/jpeg;base64,{coded}"><figcaption>{caption}</figcaption></figure>'


def _title(method: str) -> str:
    from benchmarks.a4a.driver import title

    return title(method)
