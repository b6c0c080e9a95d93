"""The results as tables on the terminal, as Markdown, and as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.a4a import charts
from benchmarks.a4a.driver import Results, title
from benchmarks.a4a.summary import (
    Cell,
    cell,
    curves,
    findings,
    heading,
    markdown_table,
    methods,
    model_table,
    pairs,
    select,
    table,
)
from benchmarks.tiny.results import write_together

STYLE = Path(__file__).parents[1] / "tiny" / "page.css"

WHAT = (
    "A tiny U-Net like SD1.5 has an IP-Adapter, trained on it and kept in the layout of published files. Tiny targets like SDXL and "
    "PixArt-α, trained apart on the same world, get one too: by A4A from that file, by A4A around random weights of the same shape (the "
    "control), by mapping layer to layer, or trained from scratch. All train through one loop with the same data."
)
SCORES = (
    "Similarity: mean cosine between the identity that a judge sees in the generated image and that of the reference (1 the same, 0 a stranger). "
    "Retrieval: the share whose nearest among the references is the right one. Prompt followed: the share that shows the scene asked for. The judge "
    "has learnt on real images alone; references are held out. Loss: of the denoiser, on unseen references. Learning rates are chosen for each "
    "method, target and regime by that loss, from one grid, on a seed that is used for nothing else."
)


def rates_note(results: Results) -> str:
    """The grid, and where the best rate lies at its edge."""
    grid = results["settings"]["learning_rate_grid"]
    edge = sum(row["rate"] in (grid[0], grid[-1]) for row in results["rates"] if row["chosen"])
    count = sum(row["chosen"] for row in results["rates"])
    return f"Grid: {', '.join(f'{rate:g}' for rate in grid)}; {edge} of {count} choices lie at one of its ends."


def show(results: Results, console: Console) -> None:
    """The tables, and what they say."""
    for name, (heads, rows) in _tables(results).items():
        shown = Table(title=name, title_justify="left")
        for number, head in enumerate(heads):
            shown.add_column(head, justify="left" if number == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for sentence in findings(results):
        console.print(f"• {sentence}", highlight=False)


def write_results(results: Results, folder: Path) -> dict[str, Path]:
    """`<preset>.json`, `.md` and `.html` in the folder, all or none."""
    paths = {suffix: folder / f"{results['preset']}.{suffix}" for suffix in ("json", "md", "html")}
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    write_together({paths["json"]: text, paths["md"]: markdown(results), paths["html"]: html(results)})
    return paths


def markdown(results: Results) -> str:
    blocks = [f"# benchmarks/a4a: {results['preset']}", _provenance(results), WHAT, SCORES, rates_note(results)]
    blocks += ["## What it says", "\n".join(f"* {sentence}" for sentence in findings(results))]
    for name, (heads, rows) in _tables(results).items():
        blocks += [f"## {name}", markdown_table(heads, rows)]
    return "\n\n".join(blocks) + "\n"


def html(results: Results) -> str:
    body = [
        "<h1>Carrying an IP-Adapter to another architecture, or training one there</h1>",
        f'<p class="soft">{escape(_provenance(results))}</p>',
        *(f"<p>{escape(text)}</p>" for text in (WHAT, SCORES, rates_note(results))),
        _list(findings(results)),
    ]
    for target, regime in pairs(results):
        names = methods(results, target, regime)
        body += [f"<h2>{escape(heading(target, regime))}</h2>", _table(*table(results, target, regime))]
        plots = [
            charts.curves(curves(results, target, regime, score), "samples seen", score)
            for score in ("similarity", "retrieval", "prompt", "loss")
        ]
        body.append(
            _figure(charts.legend(names) + _side_by_side(plots), "Mean over seeds; the band is one standard deviation.")
        )
        body.append(_pictures(results, target, regime))
        if methods(results, target, regime, ablations=True):
            body += ["<h3>Ablations of A4A</h3>", _table(*table(results, target, regime, ablations=True))]
    body += ["<h2>λ</h2>", _sweep(results), "<h2>The models</h2>", _table(*model_table(results)), _settings(results)]
    style = (
        STYLE.read_text(encoding="utf-8")
        + ".pair { display: flex; flex-wrap: wrap; gap: 12px; } .pair svg { flex: 1 1 380px; }"
    )
    style += " .sheet { image-rendering: pixelated; width: 420px; }"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>xadapt: benchmarks/a4a</title><style>{style}</style>"
    )
    content = "\n".join(filter(None, body))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def _tables(results: Results) -> dict[str, tuple[list[str], list[list[str]]]]:
    found = {}
    for target, regime in pairs(results):
        found[heading(target, regime)] = table(results, target, regime)
        if methods(results, target, regime, ablations=True):
            found[f"Ablations of A4A: {heading(target, regime)}"] = table(results, target, regime, ablations=True)
    found["Strength λ of A4A at the end"] = _sweep_table(results)
    found["The models"] = model_table(results)
    return found


def _sweep_table(results: Results) -> tuple[list[str], list[list[str]]]:
    scales = results["settings"]["scales"]
    rows = []
    for target, regime in pairs(results):
        for score in ("similarity", "prompt"):
            own = select(results["sweep"], target=target, regime=regime)
            cells = [Cell(tuple(row[score] for row in select(own, scale=scale))).text() for scale in scales]
            rows.append([f"{heading(target, regime)}: {score}", *cells])
    return ["", *(f"λ = {scale:g}" for scale in scales)], rows


def _sweep(results: Results) -> str:
    figures = []
    for target, regime in pairs(results):
        own = select(results["sweep"], target=target, regime=regime)
        scales = results["settings"]["scales"]
        lines = {
            "a4a": [(scale, Cell(tuple(row["similarity"] for row in select(own, scale=scale)))) for scale in scales]
        }
        figures.append(charts.curves(lines, "λ", f"similarity: {heading(target, regime)}"))
    return _side_by_side(figures) + _table(*_sweep_table(results))


def _pictures(results: Results, target: str, regime: str) -> str:
    sheets = select(results["images"], target=target, regime=regime)
    figures = []
    for one in sheets:
        address = charts.picture(one["rgb"], one["height"], one["width"])
        last = max(row["step"] for row in select(results["rows"], target=target, regime=regime))
        score = cell(results, "similarity", target=target, regime=regime, method=one["method"], step=last).text()
        name = title(one["method"])
        image = f'<img class="sheet" alt="{escape(name)}" src="{address}">'
        figures.append(_figure(image, f"{name}. Similarity {score}."))
    if not figures:
        return ""
    text = "Each row: a held-out reference, then four prompts with two sampling seeds each. Seed of the run: the first."
    return f"<h3>What they draw</h3><p>{text}</p>" + _side_by_side(figures)


def _settings(results: Results) -> str:
    settings = json.dumps(results["settings"], indent=1, ensure_ascii=False)
    return (
        f"<h2>Again</h2><p><code>{escape(results['command'])}</code> from a checkout writes this page, the tables as Markdown, and every "
        f"number as JSON.</p><details><summary>Settings</summary><pre>{escape(settings)}</pre></details>"
    )


def _provenance(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    hardware, git = results["hardware"], results["git"]
    revision = f"{git['revision'][:12]}{' with changes' if git['modified'] else ''}" if git["revision"] else "unknown"
    seeds = len(results["settings"]["seeds"])
    return (
        f"{results['when']}, {seeds} seed(s), {results['seconds']:.0f} s of processor time on {hardware['processor']} with "
        f"{hardware['threads_used']} thread(s). {versions}. Revision {revision}. Written by `{results['command']}`; edit nothing here by hand."
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{lines}</table></div>'


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _side_by_side(parts: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(parts)}</div>'
