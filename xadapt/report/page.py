"""The page as a whole. It carries its own data, so that the next verb adds its part to the same page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from xadapt.files import beside, check_place
from xadapt.strict_json import as_json

from .sections import check_section, transfer_section, verify_section

STYLE = Path(__file__).with_name("style.css")
_DATA = re.compile(r'<script type="application/json" id="xadapt">(.*?)</script>', re.DOTALL)

Parts = Mapping[str, Any]
"""`check`, `transfers` (a list) and `verify`, each as the `as_dict` of its result."""


def write_report(
    path: str | os.PathLike[str],
    *,
    check: Mapping[str, Any] | None = None,
    transfers: Sequence[Mapping[str, Any]] | None = None,
    verify: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the page, whole or not at all. Of a page that is there already, the parts that are not given stay.

    Raises:
        ValueError: `path` is something that is no such page.
    """
    path = Path(path)
    given = {"check": check, "transfers": transfers, "verify": verify}
    parts = {**parts_of(path), **{name: part for name, part in given.items() if part is not None}}
    text = render(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def check_report(path: Path) -> None:
    """Refuses a place that no page can be written to, before anything is measured for it.

    Raises:
        ValueError: it is one.
    """
    check_place(path)
    parts_of(path)


def parts_of(path: Path) -> dict[str, Any]:
    """The data in a page that is there; nothing where none is.

    Raises:
        ValueError: there is something else.
    """
    if not path.exists():
        return {}
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a report is one .html file.")
    found = _DATA.search(path.read_text(encoding="utf-8", errors="replace"))
    try:
        parts = json.loads(found[1]) if found else None
    except ValueError:
        parts = None
    if not isinstance(parts, dict):
        raise ValueError(f"{path} exists and is no report of xadapt; choose another name.")
    return parts


def render(parts: Parts) -> str:
    """The page of these parts."""
    sections = []
    if parts.get("check"):
        sections.append(check_section(parts["check"]))
    sections += [transfer_section(one) for one in parts.get("transfers") or ()]
    if parts.get("verify"):
        sections.append(verify_section(parts["verify"]))
    one: Mapping[str, Any] = next(
        (part for part in (parts.get("check"), *(parts.get("transfers") or ()), parts.get("verify")) if part), {}
    )
    title = f"{one.get('adapter', 'an adapter')}: {one.get('source', '')} → {one.get('target', '')}"
    # In a script element only "</script" would end it.
    data = as_json(parts, ensure_ascii=False).replace("<", "\\u003c")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style>"
    )
    body = "\n".join(sections) or "<p>Nothing has been measured yet.</p>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n'
        f'<script type="application/json" id="xadapt">{data}</script></body></html>\n'
    )
