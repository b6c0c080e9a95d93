"""Results on disk: finished cells while a run is under way, one JSON, one Markdown and one HTML file when it is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.tiny.summary import COLUMNS, Part, Table, findings, table

SCHEMA = 1
Results = dict[str, Any]


class Cells:
    """Finished pieces of an unfinished run, one JSON file each, so that the same command goes on where it stopped.

    A piece is taken again only if it was made with the same settings and versions (`made_with`). `clear` when the run is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, made_with: object) -> Any | None:
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["content"] if stored["made_with"] == _plain(made_with) else None

    def put(self, name: str, made_with: object, content: Any) -> None:
        text = json.dumps({"made_with": made_with, "content": content})
        write_together({self.folder / f"{name}.json": text})

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _plain(value: object) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def write_together(files: dict[Path, str]) -> None:
    """Write all files or none: everything into temporary neighbours first, then one `os.replace` each."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_text(text, encoding="utf-8")
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def write_results(results: Results, folder: Path, html: Callable[[Results], str]) -> dict[str, Path]:
    """`<preset>.json`, `.md` and `.html` in `folder`; returns their paths by suffix."""
    paths = {suffix: folder / f"{results['preset']}.{suffix}" for suffix in ("json", "md", "html")}
    write_together(
        {
            paths["json"]: json.dumps(results, indent=1, ensure_ascii=False) + "\n",
            paths["md"]: markdown(results),
            paths["html"]: html(results),
        }
    )
    return paths


def tables(results: Results) -> list[Table]:
    """One table per part, in the order of the results."""
    return [table(Part(**part), results["rows"]) for part in results["parts"]]


def markdown(results: Results) -> str:
    """The tables and what they say, for a reader of the repository."""
    blocks = [f"# benchmarks/tiny: {results['preset']}", _provenance(results)]
    for summary in tables(results):
        blocks += [f"## {summary.part.title}", summary.part.note, _reading(summary), _markdown_table(summary)]
        blocks += ["\n".join(f"* {sentence}" for sentence in said(results, summary))]
    if results["notes"]:
        blocks += ["## Notes", "\n".join(f"* {note}" for note in results["notes"])]
    if results["learning_rates"]:
        blocks += ["## Learning rates, chosen on the source alone", _learning_rates(results["learning_rates"])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def said(results: Results, summary: Table) -> list[str]:
    """What a table says; of a short run nothing, whose scores mean nothing."""
    if results["preset"] == "short":
        return ["A short run: a few steps of everything, to see that it runs. Its scores mean nothing."]
    return findings(summary)


def _reading(summary: Table) -> str:
    direction = "higher is better" if summary.part.higher_is_better else "lower is better"
    seeds = len(summary.seeds)
    spread = "one seed" if seeds == 1 else f"mean ± sample standard deviation over {seeds} seeds"
    return f"{summary.part.score}; {direction}; {spread}. Bold: the best adapter of the row that needs no training on the target."


def _markdown_table(summary: Table) -> str:
    lines = ["| sibling | " + " | ".join(COLUMNS.get(column, column) for column in summary.columns) + " |"]
    lines.append("|---" * (len(summary.columns) + 1) + "|")
    for sibling, cells in summary.rows.items():
        entries = []
        for column in summary.columns:
            text = cells[column].text(summary.part.digits) if column in cells else ""
            entries.append(f"**{text}**" if column in cells and cells[column].best else text)
        lines.append(f"| {summary.part.heading(sibling)} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _learning_rates(tried: Iterable[dict[str, Any]]) -> str:
    lines = ["| part | seed | space | learning rate | validation loss | |", "|---|---|---|---|---|---|"]
    for row in tried:
        chosen = "chosen" if row["chosen"] else ""
        cells = [row["part"], row["seed"], row["space"], f"{row['learning_rate']:g}", f"{row['loss']:.4f}", chosen]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _provenance(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    hardware, git = results["hardware"], results["git"]
    revision = f"{git['revision'][:12]}{' with changes' if git['modified'] else ''}" if git["revision"] else "unknown"
    return (
        f"{results['when']}, {results['seconds']:.0f} s on {hardware['processor']} with {hardware['threads_used']} thread(s). "
        f"{versions}. Revision {revision}. Written by `{results['command']}`; edit nothing here by hand."
    )
