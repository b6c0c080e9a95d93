"""From stored cells to one table of rows, and from tables to files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.frame.files import DiskFull, is_disk_full, write_whole
from benchmarks.frame.sweep import version_mix
from benchmarks.frame.tables import Table, page

if TYPE_CHECKING:
    import pyarrow


def rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One per entry of a result's "rows": the row itself, the settings as `settings.…`, and where it came from.

    A cell without "rows" is a row of its own if its result holds numbers.
    """
    found = []
    for record in records:
        about = {
            "cell": record["name"],
            "kind": record["kind"],
            "seconds": record["seconds"],
            "when": record["when"],
            "revision": record["git"]["revision"],
            **{f"versions.{name}": number for name, number in record["versions"].items()},
            **{f"hardware.{name}": value for name, value in record["hardware"].items()},
            **flat(record["settings"], "settings."),
        }
        plain = {key: value for key, value in record["result"].items() if isinstance(value, str | int | float)}
        for row in record["result"].get("rows", [plain] if plain else []):
            found.append({**about, **row})
    return found


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; lists as text, so that they fit into one column."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return found


def parquet(records: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """The rows as columns. A column with values of several types becomes text; what a row lacks is null."""
    import pyarrow  # half a second, and --help needs none of it

    found = rows(records)
    names = dict.fromkeys(name for row in found for name in row)
    columns = {name: [row.get(name) for row in found] for name in names}
    return pyarrow.table({name: _of_one_type(values) for name, values in columns.items()})


def _of_one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        return values
    return [None if value is None else str(value) for value in values]


def write_all(
    name: str,
    title: str,
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    tables: Sequence[Table],
    more_html: Sequence[str] = (),
) -> list[Path]:
    """`<name>.parquet`, `.md`, `.tex`, `.html` in `folder`; their paths."""
    notes = [provenance_note(records), *mix_notes(records)]
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in ("parquet", "md", "tex", "html")}
    folder.mkdir(parents=True, exist_ok=True)
    _write_parquet(paths["parquet"], records)
    write_whole(paths["md"], "\n\n".join([f"# {title}", *notes, *(table.markdown() for table in tables)]) + "\n")
    write_whole(paths["tex"], "\n\n".join(table.latex() for table in tables) + "\n")
    html = [*(f"<p>{note}</p>" for note in notes), *(table.html() for table in tables), *more_html]
    write_whole(paths["html"], page(title, html))
    return list(paths.values())


def mix_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning for tables whose cells were not made with the same versions."""
    mix = version_mix([dict(record) for record in records])
    if not mix:
        return []
    parts = [f"{name} {', '.join(f'{number} ({n})' for number, n in counts.items())}" for name, counts in mix.items()]
    return [f"Warning: these cells were made with different versions: {'; '.join(parts)}. Run them again to be sure."]


def provenance_note(records: Sequence[Mapping[str, Any]]) -> str:
    """When, where, with what, in one paragraph."""
    if not records:
        return "No cell has finished yet."
    last = max(records, key=lambda record: record["when"])
    used = {name: number for record in (*records, last) for name, number in record["versions"].items() if number}
    versions = ", ".join(f"{name} {number}" for name, number in used.items())
    machines = sorted({_machine(record["hardware"]) for record in records})
    revisions = sorted({_revision(record["git"]) for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    return (
        f"{len(records)} cells, the last at {last['when']}; {hours:.2f} hours of work on {'; '.join(machines)}. {versions}. "
        f"Revision {', '.join(revisions)}. Written by the driver; edit nothing here by hand."
    )


def _machine(hardware: Mapping[str, Any]) -> str:
    return str(hardware.get("gpu") or f"{hardware['processor']} with {hardware['threads_used']} thread(s)")


def _revision(git: Mapping[str, Any]) -> str:
    return f"{git['revision'][:12]}{' with changes' if git['modified'] else ''}" if git["revision"] else "unknown"


def _write_parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow.parquet

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pyarrow.parquet.write_table(parquet(records), temporary)
        os.replace(temporary, path)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(path.parent) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
