"""The table of a sweep: what each adapter does on each target, by method, beside bare and copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frame.tables import BOLD, Table
from benchmarks.sweep.settings import Settings


def tables(settings: Settings, records: Sequence[dict[str, Any]]) -> list[Table]:
    """A row for each adapter and target; refused transfers say so, and what loses to bare or copy is not bold."""
    transfers = {_key(record["settings"]): record for record in records if record["kind"] == "transferred"}
    verified = {_key(record["settings"]["transfer"]): record for record in records if record["kind"] == "verified"}
    rows = []
    for adapter in settings.adapters:
        for target in settings.targets:
            keys = {method: (adapter, target, method) for method in settings.methods}
            if not any(key in transfers for key in keys.values()):
                continue
            found = {method: _scores(verified.get(key)) for method, key in keys.items()}
            beside = {name: _first(found.values(), name) for name in ("bare", "copy")}
            best = max((value for value in beside.values() if value is not None), default=0.0)
            cells = [
                _cell(transfers.get(keys[method]), found[method].get("transferred"), best)
                for method in settings.methods
            ]
            rows.append([adapter, target, *(_number(beside[name]) for name in ("bare", "copy")), *cells])
    if not rows:
        return []
    notes = [
        "verify's score, 0 to 1: how much of the adapter's work on its source is done on the target. Bold: better than bare and copy."
    ]
    return [Table("Adapters on targets", ["adapter", "target", "bare", "copy", *settings.methods], rows, notes)]


def _key(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    return settings["adapter"], settings["target"], settings["method"]


def _scores(record: Mapping[str, Any] | None) -> dict[str, float]:
    rows = record["result"]["rows"] if record else []
    return {row["candidate"]: row["value"] for row in rows if row["metric"] == "score"}


def _first(found: Any, name: str) -> float | None:
    return next((scores[name] for scores in found if name in scores), None)


def _cell(record: Mapping[str, Any] | None, score: float | None, best: float) -> str:
    if record is None:
        return ""
    if record["result"]["refused"] is not None:
        return "refused"
    if score is None:
        return "written"
    text = f"{score:.3f}"
    return f"{BOLD}{text}{BOLD}" if score > best else text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
