"""The user's own lines: a dict or a JSON file, checked against both bases before anything is mapped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from xadapt.errors import did_you_mean
from xadapt.strict_json import read_object

Override = Mapping[str, "str | None"]
_EXAMPLE = '{"layers.*.attention.dense": "layers.*.self_attn.o_proj", "lm_head": null}'


def read_override(override: Override | str | PathLike[str] | None) -> dict[str, str | None]:
    """A map given as a dict, or the JSON file that holds it.

    Raises:
        TypeError: it is neither, or a value is no path.
        ValueError: the file cannot be read, or gives a key twice.
    """
    if override is None:
        return {}
    if isinstance(override, str | PathLike):
        where, given = fspath(override), read_object(Path(override))
    elif isinstance(override, Mapping):
        where, given = "the map", dict(override)
    else:
        raise TypeError(f"A map is a dict or a JSON file, not {type(override).__name__}; for example {_EXAMPLE}.")
    for source, target in given.items():
        if not isinstance(source, str) or not (target is None or isinstance(target, str)):
            raise TypeError(
                f"{where}: {source!r} is mapped to {target!r}; give the path of a module of the target, or null to leave it "
                f"out. For example {_EXAMPLE}."
            )
    return given


def resolve(given: Mapping[str, str | None], source: Iterable[str], target: Iterable[str]) -> dict[str, str | None]:
    """Source path → target path of every line given, with each `*` replaced by the numbers that it stands for.

    Args:
        given: as `read_override` returns it.
        source: the paths of all the source's modules and layers.
        target: those of the target's.

    Raises:
        ValueError: a path is not there, or two lines disagree.
    """
    sources, targets = tuple(dict.fromkeys(source)), frozenset(target)
    found: dict[str, str | None] = {}
    for pattern, wanted in given.items():
        matches = [(path, match) for path in sources if (match := _regex(pattern).fullmatch(path))]
        if not matches:
            raise ValueError(f"The map names {pattern!r}, which the source has not. {_near(pattern, sources)}")
        if wanted is not None and wanted.count("*") not in (0, pattern.count("*")):
            raise ValueError(f"{pattern!r} → {wanted!r}: write as many * on both sides; each stands for one number.")
        for path, match in matches:
            place = _fill(wanted, match)
            if place is not None and place not in targets:
                raise ValueError(
                    f"The map sends {path!r} to {place!r}, which the target has not. {_near(place, tuple(targets))}"
                )
            if path in found and found[path] != place:
                raise ValueError(f"The map sends {path!r} both to {found[path]!r} and to {place!r}; keep one of them.")
            found[path] = place
    _check_once(found)
    return found


def _check_once(found: Mapping[str, Any]) -> None:
    owners: dict[str, str] = {}
    for path, place in found.items():
        if place is None:
            continue
        if place in owners:
            raise ValueError(
                f"The map sends both {owners[place]!r} and {path!r} to {place!r}; a target layer can take one of them."
            )
        owners[place] = path


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(map(re.escape, pattern.split("*"))))


def _fill(wanted: str | None, match: re.Match[str]) -> str | None:
    if wanted is None or "*" not in wanted:
        return wanted
    pieces = wanted.split("*")
    return pieces[0] + "".join(number + piece for number, piece in zip(match.groups(), pieces[1:], strict=True))


def _near(path: str, known: tuple[str, ...]) -> str:
    return did_you_mean(path, sorted(known), limit=5)
