"""The results as one HTML page that needs nothing but itself: style and plots are inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import benchmarks.tiny
from benchmarks.zoo import charts
from benchmarks.zoo.analysis import MEASURES, Analysis, Grid, analyse
from benchmarks.zoo.carry import ROWS
from benchmarks.zoo.headings import (
    FIT_COLUMNS,
    POLICY_COLUMNS,
    SCORES,
    SIBLINGS,
    SPACES,
    TITLES,
    fit_cells,
    policy_cells,
    row_heading,
    sibling_heading,
)
from benchmarks.zoo.notes import notes, provenance_line
from benchmarks.zoo.results import Results
from benchmarks.zoo.sentences import RANK

STYLE = Path(benchmarks.tiny.__file__).with_name("page.css")
_FAMILIES = {
    **{"copy": "copy", "auto": "choice", "auto_train": "choice"},
    **{"distil": "retrained", "lora_x": "bare", "prolora": "bare"},
}
MORE = " .aligned { fill: var(--tied); background: var(--tied); } main { max-width: 1100px; }"


def html(results: Results) -> str:
    """The whole page."""
    found = analyse(results)
    body = [
        "<h1>The zoo: how far an adapter, and a choice among ways of carrying it, may be trusted</h1>",
        f'<p class="soft">{escape(provenance_line(results).replace("`", ""))}</p>',
        "<h2>What holds and what does not</h2>",
        _list(found.sentences),
        "<h2>How it was measured</h2>",
        _list(notes(results)),
    ]
    for part, lines in found.policies.items():
        body += [
            f"<h2>{TITLES[part]}: policies</h2>",
            "<p>A policy names, from what is known without labels, the way of carrying each adapter. Its regret is how many points of the "
            "task's score it stays below the best choice in hindsight.</p>",
            _figure(
                charts.regrets(lines, f"{part}: mean regret by policy"),
                "Mean regret over all cells, in points; less is better.",
            ),
            _table(("policy", *POLICY_COLUMNS), ((line.name, *policy_cells(line)) for line in lines)),
        ]
        if found.fits[part]:
            body += [
                "<h3>Thresholds fitted on one half of siblings and tasks</h3>",
                _table(("rule", *FIT_COLUMNS), ((name, *fit_cells(one)) for name, one in found.fits[part].items())),
            ]
    body += _trust(found)
    for grid in found.grids:
        body += [
            f"<h2>{TITLES[grid.part]}: {SPACES[grid.space]}</h2>",
            f"<p>{escape(SCORES[grid.part])}; mean over the tasks ± deviation of the seeds. In green what is best of the ways that need no "
            "training on the target, * where every call was refused, which counts as bare.</p>",
            _scores(grid),
        ]
    body += [_kept(found), *(_siblings(part) for part in found.policies)]
    style = STYLE.read_text(encoding="utf-8") + MORE
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>xadapt: benchmarks/zoo</title><style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _trust(found: Analysis) -> list[str]:
    classes = {row: _css(row) for row in ROWS}
    body = ["<h2>verify without labels against the true scores</h2>"]
    for part in found.policies:
        points = [point for point in found.points if point.part == part and point.row in classes]
        if len(points) > 1:
            caption = f"{TITLES[part]}: {len(points)} carried adapters. Spearman’s ρ {found.ranks[part]['trust']:.2f}; at least {RANK} is asked."
            rows = dict.fromkeys(point.row for point in points)
            keys = "".join(
                f'<span class="key"><i class="{classes[row]}"></i>{escape(row_heading(row))}</span>' for row in rows
            )
            body.append(
                _figure(f'<p class="legend">{keys}</p>' + charts.scatter(points, classes, f"{part}: trust"), caption)
            )
    lines = ((part, *(f"{ranks[name]:.2f}" for name in MEASURES)) for part, ranks in found.ranks.items() if ranks)
    return [
        *body,
        "<p>Rank correlation with what is left of the score on the source:</p>",
        _table(("part", *MEASURES.values()), lines),
    ]


def _css(row: str) -> str:
    if row.startswith("pinv"):
        return row.removeprefix("pinv_")
    return "aligned" if row.startswith("aligned") else _FAMILIES.get(row, "bare")


def _scores(grid: Grid) -> str:
    heads = "".join(f"<th>{escape(row_heading(column))}</th>" for column in grid.columns)
    lines = []
    for sibling, entries in grid.rows.items():
        free = {row: entry.mean for row, entry in entries.items() if row in ROWS and not ROWS[row].trains}
        best = round(max(free.values(), default=0.0), 2)
        worth = sibling != "source" and "bare" in entries and best > entries["bare"].mean + 0.05
        cells = []
        for column in grid.columns:
            marked = worth and column in free and round(free[column], 2) == best
            text = entries[column].text() if column in entries else ""
            cells.append(f"<td{' class=best' if marked else ''}>{text}</td>")
        first = " class=first" if sibling == "source" else ""
        lines.append(f"<tr{first}><td>{escape(sibling_heading(grid.part, sibling))}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr><th>sibling</th>{heads}</tr>{"".join(lines)}</table></div>'


def _kept(found: Analysis) -> str:
    tables = [
        _table((part, *map(row_heading, rows)), [("old tasks", *(entry.text() for entry in rows.values()))])
        for part, rows in found.kept.items()
    ]
    text = "<p>Mean score on the tasks, or the plain style, of pre-training with the adapter on, over all siblings and spaces.</p>"
    return f"<h2>What the models could do before</h2>{text}{''.join(tables)}"


def _siblings(part: str) -> str:
    lines: Mapping[str, tuple[str, str]] = SIBLINGS[part]
    return f"<h2>{TITLES[part]}: the siblings</h2>" + _list(f"{heading}: {what}" for heading, what in lines.values())


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in lines)
    return f'<div class="scroll"><table><tr>{top}</tr>{rows}</table></div>'


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
