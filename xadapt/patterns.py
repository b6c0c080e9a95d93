"""A config's patterns by layer, said so that the order of their keys no longer matters.

PEFT takes the first key that matches a layer, and writes a config with its keys sorted: read again, another key may be the first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from xadapt.peft_internals import check_target_module_exists

PATTERNS = ("rank_pattern", "alpha_pattern")


def settled(config: Any, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Those of a config's patterns that would say something else of these layers once their keys are sorted, by option: the values
    that they give now, each under its layer's whole path. Empty where the order does not matter.

    Args:
        config: of any PEFT type; it stays as it is.
        paths: of the layers that the adapter is on; asked for only if a pattern has several keys.
    """
    given = {name: getattr(config, name, None) or {} for name in PATTERNS}
    several = {name: pattern for name, pattern in given.items() if len(pattern) > 1}
    if not several or config.peft_type == "OSF":  # which searches its keys anywhere in a path
        return {}
    layers = list(paths)
    return {
        name: {f"^{re.escape(path)}": value for path, value in _chosen(pattern, pattern, layers).items()}
        for name, pattern in several.items()
        if _chosen(pattern, pattern, layers) != _chosen(pattern, sorted(pattern), layers)
    }


def targeted(config: Any, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What PEFT holds the patterns' keys against on a model of these modules: the paths of target layers and target parameters."""
    tied = getattr(config, "target_modules_to_tie", None) or ()
    parameters = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
    for path, module in modules.items():
        if path in tied or (getattr(config, "target_modules", None) and check_target_module_exists(config, path)):
            yield path
        own = (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)) if parameters else ()
        yield from (name for name in own if f".{name}".endswith(parameters))


def _chosen(pattern: Mapping[str, Any], keys: Iterable[str], paths: Collection[str]) -> dict[str, Any]:
    """What the keys, in this order, give to each layer that one of them matches."""
    ordered = list(keys)
    found = {path: first_key(ordered, path) for path in paths}
    return {path: pattern[key] for path, key in found.items() if key is not None}


def first_key(keys: Iterable[str], path: str) -> str | None:
    """The key of a pattern that PEFT takes for a layer, the first that matches the end of its path; None where none does.

    PEFT's `get_pattern_key`, with each key compiled once: there are as many keys as layers in some files.
    """
    ordered = tuple(keys)
    return next((key for key, found in zip(ordered, _compiled(ordered), strict=True) if found.match(path)), None)


@lru_cache(maxsize=16)
def _compiled(keys: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(rf"(.*\.)?({key})$") for key in keys)
