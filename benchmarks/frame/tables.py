"""Tables as text, once, and in three syntaxes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

BOLD = "**"


@dataclass(frozen=True)
class Table:
    """Cells are plain text, `**…**` around a whole cell makes it bold. `notes` stand below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.title!r} has {len(row)} cells, and there are {len(self.columns)} columns."
                )

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rows = [line(self.columns), "|" + "---|" * len(self.columns), *map(line, self.rows)]
        notes = ["\n".join(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([f"## {self.title}", "\n".join(rows), *notes])

    def latex(self) -> str:
        """A booktabs tabular with a caption."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(_latex_cell, cells)) + r" \\"

        body = "\n".join(map(line, self.rows))
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(' '.join([self.title + '.', *self.notes]))}}}\n"
            f"\\begin{{tabular}}{{{'l' * len(self.columns)}}}\n\\toprule\n{line(self.columns)}\n\\midrule\n{body}\n"
            "\\bottomrule\n\\end{tabular}\n\\end{table}"
        )

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<h2>{html.escape(self.title)}</h2>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>\n{notes}"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd }}
img {{ image-rendering: pixelated }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML page of its own: tables, and whatever else a driver shows (images as data URIs)."""
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def _bold(cell: str) -> str | None:
    return cell[2:-2] if len(cell) > 4 and cell.startswith(BOLD) and cell.endswith(BOLD) else None


def _latex_cell(cell: str) -> str:
    bold = _bold(cell)
    return _latex(cell) if bold is None else f"\\textbf{{{_latex(bold)}}}"


def _latex(text: str) -> str:
    text = text.replace("\\", "\0")
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    for character, command in {
        "\0": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }.items():
        text = text.replace(character, command)
    for character, command in {
        "±": r"$\pm$",
        "→": r"$\rightarrow$",
        "−": "$-$",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }.items():
        text = text.replace(character, command)
    return text


def _html_cell(cell: str) -> str:
    bold = _bold(cell)
    return f"<td>{html.escape(cell)}</td>" if bold is None else f"<td><b>{html.escape(bold)}</b></td>"
