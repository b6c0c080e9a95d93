"""The results as one HTML page that needs nothing but itself: style, plots and pictures are inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.tiny import charts
from benchmarks.tiny.results import Results, said, tables
from benchmarks.tiny.settings import EXPLANATIONS, SIBLINGS
from benchmarks.tiny.summary import COLUMNS, REAL, Table, is_source

STYLE = Path(__file__).with_name("page.css")

CARRIED = """
<p>An adapter is trained once, on a <b>source</b> model, and carried as it is to <b>siblings</b> of that model. Each sibling is a row;
each way of carrying a column. <b>bare</b> is the sibling without an adapter, <b>LoRA copy</b> the ordinary LoRA applied as it is, and
<b>retrained</b> a LoRA trained on that very sibling: what training again would buy.</p>
"""
SPACES = """
<p>A LoRA changes a weight, so it is tied to the coordinates in which the layer reads <i>and</i> to those in which it writes.
An <b>input</b> adapter changes what the layer reads, before the weight, and is tied to the first only; an <b>output</b> adapter changes
what it returns, and is tied to the second only. So which one carries over is a matter of what differs between the two models.</p>
"""
BY_LAYER = """
<p>That can be measured before anything is trained: <b>by layer</b> does, and puts the adapter of each layer where the features stayed.</p>
"""

CHOICE = """
<p>Unlabelled lines of the old tasks go through both models. Each dot is one layer on one sibling: how far the features that it reads moved, and how
far those that it returns. Where one side moved clearly further than the other, the basis there has changed, and the adapter is
put on the side that stayed. Where both moved alike there is nothing to gain in feature space, and the LoRA is copied.</p>
"""


def html(results: Results) -> str:
    """The whole page."""
    summaries = tables(results)
    pair = results["preset"] == "pair"
    body = [
        f"<h1>{'An adapter between two checkpoints' if pair else 'What becomes of an adapter on a sibling of its model'}</h1>",
        f'<p class="soft">{_provenance(results)}</p>',
        CARRIED + SPACES + (BY_LAYER if results["choices"] else ""),
    ]
    for summary in summaries:
        body += [
            f"<h2>{escape(summary.part.title)}</h2>",
            f"<p>{escape(summary.part.note)}</p>" if summary.part.note else "",
            _list(said(results, summary)),
            _table(summary),
            _figure(charts.legend(summary.columns) + charts.bars(summary), _caption(summary)),
            _choices(summary, results),
            _pictures(summary, results),
        ]
    body += [_notes(results), _learning_rates(results), _siblings(results), _reproduce(results)]
    title = "xadapt: " + ("a pair of checkpoints" if pair else "benchmarks/tiny")
    style = STYLE.read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )


def _table(summary: Table) -> str:
    heads = "".join(f"<th>{escape(COLUMNS.get(column, column))}</th>" for column in summary.columns)
    rows = []
    for sibling, cells in summary.rows.items():
        entries = []
        for column in summary.columns:
            cell = cells.get(column)
            text = cell.text(summary.part.digits) if cell else ""
            entries.append(f"<td{' class=best' if cell and cell.best else ''}>{text}</td>")
        first = " class=first" if is_source(sibling) else ""
        rows.append(f"<tr{first}><td>{escape(summary.part.heading(sibling))}</td>{''.join(entries)}</tr>")
    return f'<div class="scroll"><table><tr><th>sibling</th>{heads}</tr>{"".join(rows)}</table></div>'


def _caption(summary: Table) -> str:
    part = summary.part
    seeds = len(summary.seeds)
    spread = "One seed." if seeds == 1 else f"Mean and sample standard deviation over {seeds} seeds; a dot per seed."
    direction = "higher" if part.higher_is_better else "lower"
    return (
        f"{part.score[0].upper() + part.score[1:]}, {direction} is better. {spread} "
        "Green in the table: the best adapter of the row that needs no training on the target."
    )


def _choices(summary: Table, results: Results) -> str:
    first = summary.seeds[0] if summary.seeds else None
    rows = [row for row in results["choices"] if row["part"] == summary.part.name and row["seed"] == first]
    if not rows:
        return ""
    lm = results["settings"]["lm"]
    caption = (
        f"Seed {first}. One side must have moved {lm['clearly']:g} times as far as the other, where less than {lm['rounding']:g} counts "
        f"as {lm['rounding']:g}. Both numbers are the same for every sibling and layer."
    )
    rows = [{**row, "sibling": summary.part.heading(row["sibling"])} for row in rows]
    return (
        "<h3>How the choice by layer is made</h3>"
        + CHOICE
        + _figure(charts.moved(rows, lm["clearly"], lm["rounding"]), caption)
    )


def _pictures(summary: Table, results: Results) -> str:
    """What each model draws with each adapter, of the first seed."""
    drawn = {
        (image["adapter"], image["sibling"]): charts.sheet(image["grey"], image["height"], image["width"])
        for image in results["images"]
    }
    siblings = [sibling for sibling in summary.rows if ":" not in sibling]  # without the checks
    if not drawn or results["images"][0]["part"] != summary.part.name:
        return ""
    heads = "".join(f"<th class=text>{escape(summary.part.heading(sibling))}</th>" for sibling in siblings)
    lines = []
    for adapter in (REAL, *summary.columns):
        name = "real images" if adapter == REAL else escape(COLUMNS.get(adapter, adapter))
        cells = "".join(
            f'<td><img alt="digits, {name}, {escape(sibling)}" src="{drawn[adapter, sibling]}"></td>'
            if (adapter, sibling) in drawn
            else "<td></td>"
            for sibling in siblings
        )
        lines.append(f"<tr><td>{name}</td>{cells}</tr>")
    rows = f"<tr><th></th>{heads}</tr>{''.join(lines)}"
    style = f"--columns: {max(len(siblings), 2)}"
    grid = f'<div class="scroll"><table class="digits" style="{style}">{rows}</table></div>'
    caption = f"Digits 0 to 9, two of each, in the style asked for: inverted and turned by a quarter. Seed {summary.seeds[0]}."
    return "<h3>What they draw</h3>" + _figure(grid, caption)


def _notes(results: Results) -> str:
    return f"<h2>Notes</h2>{_list(results['notes'])}" if results["notes"] else ""


def _learning_rates(results: Results) -> str:
    tried = results["learning_rates"]
    if not tried:
        return ""
    text = (
        "<p>A learning rate that suits one space better than another can manufacture either result, so each space has its own, chosen "
        "by the loss on the source; no target is looked at.</p>"
    )
    figures = []
    for part in dict.fromkeys(row["part"] for row in tried):
        seed = next(row["seed"] for row in tried if row["part"] == part)
        rows = [row for row in tried if row["part"] == part and row["seed"] == seed]
        figures.append(
            _figure(
                charts.learning_rates(rows), f"{part}, seed {seed}: loss on the source, logarithmic. Filled: chosen."
            )
        )
    return f"<h2>Learning rates</h2>{text}{''.join(figures)}"


def _siblings(results: Results) -> str:
    rows = results["siblings"]
    if not rows:
        return ""
    lines = []
    for row in rows:
        if row["seed"] == rows[0]["seed"]:
            name = SIBLINGS.get(row["sibling"], row["sibling"])
            weights = "other layers" if row["weights_moved"] is None else f"{row['weights_moved']:.3f}"
            what = escape(EXPLANATIONS.get(row["sibling"], ""))
            lines.append(
                f"<tr><td>{escape(name)}</td><td class=text>{what}</td><td>{row['old_tasks']:.2f}</td><td>{weights}</td></tr>"
            )
    heads = "<th>sibling</th><th class=text>what was done</th><th>old tasks</th><th>weights moved</th>"
    return (
        "<h2>The siblings</h2><p>The first three compute the very function of the source, however far their weights moved. "
        f"Old tasks: exact match on the tasks of pre-training. Weights moved: ‖W − W_source‖ / ‖W_source‖. Seed {rows[0]['seed']}.</p>"
        f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
    )


def _reproduce(results: Results) -> str:
    settings = json.dumps(results["settings"], indent=1, ensure_ascii=False)
    return (
        f"<h2>Again</h2><p><code>{escape(results['command'])}</code> from a checkout writes this page, the tables as Markdown, and every "
        f"number as JSON.</p><details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
    )


def _provenance(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    hardware, git = results["hardware"], results["git"]
    revision = (
        f"revision {git['revision'][:12]}{' with changes' if git['modified'] else ''}"
        if git["revision"]
        else "revision unknown"
    )
    threads = "1 thread" if hardware["threads_used"] == 1 else f"{hardware['threads_used']} threads"
    return escape(
        f"{results['when']} · {results['seconds']:.0f} s on {hardware['processor']}, {threads} · {versions} · {revision}"
    )


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
