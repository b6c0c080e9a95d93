"""The shortest LoraConfig that says which layers are adapted, at which rank and alpha."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeVar

from peft import LoraConfig

V = TypeVar("V", int, float)


def minimal_config(
    layers: Mapping[str, tuple[int, float]], modules: Iterable[str] | None = None, **options: Any
) -> LoraConfig:
    """The most common rank and alpha as defaults, patterns for the exceptions, targets as short as they can be.

        minimal_config({"layers.0.q_proj": (8, 16), "layers.1.q_proj": (4, 16)}, ["layers.0.q_proj", …])

    Args:
        layers: (rank, alpha) by module path, of every adapted layer.
        modules: the base's module names: at least every linear, convolution and embedding, at best all of `named_modules()`.
            Without them the targets are the full paths.
        options: further arguments of `LoraConfig`.

    Raises:
        ValueError: `layers` is empty, or names a module the base does not have.
    """
    if not layers:
        raise ValueError("minimal_config() got no layers; give it (rank, alpha) for at least one module path.")
    everything = None if modules is None else {name for name in modules if name}
    if everything is not None and (unknown := sorted(layers.keys() - everything)):
        raise ValueError(f"{len(unknown)} adapted layers are no modules of the base, {unknown[0]!r} for one.")
    ranks = {path: rank for path, (rank, _) in layers.items()}
    alphas = {path: int(alpha) if alpha == int(alpha) else alpha for path, (_, alpha) in layers.items()}
    r, lora_alpha = _most_common(ranks), _most_common(alphas)
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # annotated int, but any number works
        rank_pattern=_pattern(ranks, r),
        alpha_pattern=_pattern(alphas, lora_alpha),
        target_modules=sorted(layers) if everything is None else _targets(layers.keys(), everything),
        **options,
    )


def _most_common(values: Mapping[str, V]) -> V:
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value))  # the smaller at a tie: one answer, in any order


def _targets(adapted: Set[str], modules: Set[str]) -> list[str] | str:
    """Suffixes that match these layers and nothing else, as PEFT matches: whole parts of the name, from its end.

    A path that is the end of a longer one ("proj_out" beside "blocks.0.proj_out") matches that one too, so no list of
    names can tell them apart. PEFT takes a regular expression instead.
    """
    containers = {name[:dot] for name in modules for dot in _dots(name)}
    taken = {suffix for other in (modules | containers) - adapted for suffix in _ends(other)}
    free = {suffix for path in adapted for suffix in _ends(path)} - taken
    suffixes, paths = set[str](), set[str]()
    for path in adapted:
        short = _shortest(path, free)
        (suffixes if short else paths).add(short or path)
    if not paths:
        return sorted(suffixes)
    anchored = [re.escape(path) for path in sorted(paths)]
    if suffixes:
        anchored.append(rf"(.*\.)?({'|'.join(re.escape(suffix) for suffix in sorted(suffixes))})")
    return "|".join(anchored)


def _pattern(values: Mapping[str, V], default: V) -> dict[str, V]:
    """Keys that give every layer its value by PEFT's rules: each is a regular expression for the end of a path."""
    owners: dict[str, set[V]] = {}
    for path, value in values.items():
        for suffix in _ends(path):
            owners.setdefault(suffix, set()).add(value)
    pure = {suffix for suffix, owned in owners.items() if len(owned) == 1}
    pattern: dict[str, V] = {}
    for exception in sorted(path for path, value in values.items() if value != default):
        short = _shortest(exception, pure)
        pattern[_as_key(short, values) if short else f"^{re.escape(exception)}"] = values[exception]
    return pattern


def _as_key(suffix: str, paths: Iterable[str]) -> str:
    """The suffix as it reads, unless one of its dots would match another character of some path."""
    pattern = re.compile(rf"(.*\.)?({suffix})$") if _is_plain(suffix) else None
    if pattern and all(f".{path}".endswith(f".{suffix}") for path in paths if pattern.match(path)):
        return suffix
    return re.escape(suffix)


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.]+", name) is not None


def _shortest(path: str, fits: Set[str]) -> str:
    """The shortest suffix of a path among those that fit, or "". None starts with a number: "0" alone would say nothing of `to_out.0`,
    and would match a container the caller's list of modules leaves out."""
    for suffix in _ends(path):
        if (suffix == path or not suffix.split(".")[0].isdigit()) and suffix in fits:
            return suffix
    return ""


def _ends(path: str) -> list[str]:
    """What PEFT may match a path by: its last part, its last two, …, all of it."""
    return [*(path[dot + 1 :] for dot in reversed(_dots(path))), path]


def _dots(path: str) -> list[int]:
    return [place for place, letter in enumerate(path) if letter == "."]
