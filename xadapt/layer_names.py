"""Many layers in few words: those whose names differ in numbers alone are told together."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
LEFT_OUT = "…"
_NUMBER = re.compile(r"(?:(?<![\w–])-)?\d+(?:\.\d+)?")


def pattern_of(path: str) -> str:
    """A layer's name without its numbers: "layers.3.q_proj" → "layers.*.q_proj"."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Those with one key together, in the order in which the keys come up."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def together(paths: Sequence[str], without: Iterable[str] = ()) -> str:
    """Layers of one pattern as one name: "layers.0–2.q_proj".

    Where several numbers differ, the name spans each by itself, which may be more layers than there are.

    Args:
        without: parts of the names to leave out, as "…"; the last of them always stays.
    """
    hidden = set(without)
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    last = max((place for place, values in enumerate(columns) if not values[0].isdigit()), default=0)
    parts: list[str] = []
    for place, values in enumerate(columns):
        if values[0] in hidden and place < last:
            if parts and parts[-1] != LEFT_OUT:
                parts.append(LEFT_OUT)
        else:
            parts.append(_spans(sorted(set(map(int, values)))) if values[0].isdigit() else values[0])
    return ".".join(parts).replace(f".{LEFT_OUT}.", LEFT_OUT)


def differing(paths: Sequence[str], others: Sequence[str], without: Iterable[str] = ()) -> str:
    """What tells `others` from `paths`, both of one pattern each: their numbers where only these do, else their name."""
    if pattern_of(paths[0]) != pattern_of(others[0]):
        return together(others, without)
    pairs = zip(together(paths).split("."), together(others).split("."), strict=True)
    return ".".join(other for one, other in pairs if one != other)


def plainly(items: Sequence[T], pair: Callable[[T], tuple[str, str | None]]) -> list[list[T]]:
    """Items in as many parts as it takes for the spans of their numbers to say what goes where.

    On both sides the numbers are the same, or others in the same order; else, where blocks are swapped, a part is what moves by as
    much.

    Args:
        pair: an item's path and where it goes.
    """

    def move(item: T) -> _Move:
        source, target = pair(item)
        return _numbers_of(source), _numbers_of(target or "")

    alike = grouped(map(move, items), lambda one: (len(one[0]), len(one[1])))
    return [list(items)] if all(map(_tells, alike)) else grouped(items, lambda item: _shift(*move(item)))


_Move = tuple[tuple[int, ...], tuple[int, ...]]  # the numbers of a source path, and of the target's


def _shift(here: tuple[int, ...], there: tuple[int, ...]) -> tuple[int, ...]:
    """How far the numbers move; where there are more of them on one side, which go where."""
    same = len(here) == len(there)
    return tuple(other - one for one, other in zip(here, there, strict=True)) if same else (*here, *there)


def _tells(moves: Sequence[_Move]) -> bool:
    """Whether the spans of the numbers on both sides say which go to which."""
    if all(here == there for here, there in moves):
        return True
    froms, tos = [list(zip(*side, strict=True)) for side in zip(*moves, strict=True)]
    if [_spans(sorted(set(one))) for one in froms] == [_spans(sorted(set(one))) for one in tos]:
        return False
    if len(froms) != len(tos):
        return [there for _, there in sorted(moves)] == sorted(there for _, there in moves)
    return all(_in_order(one, other) for one, other in zip(froms, tos, strict=True))


def _in_order(numbers: Sequence[int], others: Sequence[int]) -> bool:
    """Whether each number goes to one other, and larger ones to larger ones."""
    pairs = sorted(set(zip(numbers, others, strict=True)))
    return all(one < after and other < then for (one, other), (after, then) in pairwise(pairs))


def _numbers_of(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.split(".") if part.isdigit())


def needless_parts(paths: Iterable[str]) -> list[str]:
    """Parts of the names that tell no layer from another: all layers that share a last part with one that has it have it too.

    Of "model.layers.*.self_attn.q_proj" and "model.layers.*.mlp.up_proj": all but the numbers and the last.
    """
    names = [[part for part in pattern.split(".") if part != "*"] for pattern in dict.fromkeys(map(pattern_of, paths))]
    if len(names) < 2:
        return []
    parts = dict.fromkeys(part for name in names for part in name[:-1])
    ends = {part: {name[-1] for name in names if part in name[:-1]} for part in parts}
    return [part for part in parts if all(part in name[:-1] for name in names if name[-1:] and name[-1] in ends[part])]


def wording_of(text: str) -> str:
    """A sentence without its numbers."""
    return _NUMBER.sub("#", text)


def merged(texts: Sequence[str]) -> str:
    """Sentences of one wording as one, with the spans of their numbers: "drift (0.09–0.11)"."""
    numbers = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
    spans = iter([_span_of(column) for column in numbers])
    return _NUMBER.sub(lambda _: next(spans), texts[0])


def _span_of(numbers: Sequence[str]) -> str:
    if all(number.isdigit() for number in numbers):
        return _spans(sorted(set(map(int, numbers))))
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low}–{high}"


def _spans(numbers: Sequence[int], limit: int = 4) -> str:
    """0, 1, 2, 5 → "0–2,5"; from more than `limit` spans, those in between are not listed."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = [str(low) if low == high else f"{low}–{high}" for low, high in spans]
    return ",".join(told if len(told) <= limit else [told[0], LEFT_OUT, told[-1]])
