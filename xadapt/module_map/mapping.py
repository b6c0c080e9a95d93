"""The module map: both bases' layers as trees, walked together from the root."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike

from torch import nn

from .compare import compare
from .depth import align, nearness
from .fused import fused_lines
from .lines import MappedLayer, ModuleMap, Relation, Unmatched
from .names import are_synonyms, renamed_prefix, replace_prefix
from .override import Override, read_override, resolve
from .tree import LayerShape, Node, layers_in, tree_of
from .weights import Similarity

BY_PLACE = 1e-3
"""What shape and relative depth count beside a similarity: they say where blocks go that are like no other."""

Notes = tuple[tuple[Relation, str], ...]


def map_modules(
    source: Mapping[str, nn.Module],
    target: Mapping[str, nn.Module],
    *,
    override: Override | str | PathLike[str] | None = None,
    similarity: Similarity | None = None,
) -> ModuleMap:
    """Which layer of the target does the work of which layer of the source.

        map_modules(source.modules(), target.modules()).summary()

    Args:
        source, target: `base.modules()`. Only paths, classes and shapes are looked at.
        override: lines of the user's own, a dict or a JSON file: the path of a layer, or of a module with all below it, to a
            path in the target or None. A `*` stands for any number. They come before everything else.
        similarity: how alike two blocks are, for stacks of different depth: `weight_similarity(…)` or a function of one's
            own. What it does not tell, shapes and relative depth say.

    Raises:
        TypeError, ValueError: the override is wrong; the message says where.
    """
    sources, targets = layers_in(source), layers_in(target)
    prefixes = renamed_prefix(sources, targets)
    notes: Notes = ()
    keys = {path: path for path in targets}
    if prefixes:
        old, new = prefixes[1], prefixes[0]
        keys = {path: replace_prefix(path, old, new) for path in targets}
        notes = (
            ("renamed", f"the target has under {old or 'its root'} what the source has under {new or 'its root'}"),
        )
        if len(set(keys.values())) < len(keys):  # two layers would stand in one place
            keys, notes = {path: path for path in targets}, ()
    walk = _Walk(similarity)
    source_tree, target_tree = tree_of(sources), tree_of(targets, keys)
    given = resolve(read_override(override), _places(source_tree), _places(target_tree))
    target_nodes = {node.path: node for node in _nodes(target_tree)}
    for path, place in sorted(given.items(), key=lambda line: -len(line[0])):  # a layer's own line before its module's
        node = source_tree.descend(path)
        assert node is not None
        if place is None:
            walk.leave_out(node)
        else:
            walk.pair(node, target_nodes[place], (("given", f"{path} → {place} by the map given"),))
    walk.pair(source_tree, target_tree, notes)
    return walk.result(sources, targets)


class _Walk:
    """Pairs two trees from their roots, and remembers which layers are taken and why others are not."""

    def __init__(self, similarity: Similarity | None) -> None:
        self._similarity = similarity
        self._lines: list[MappedLayer] = []
        self._taken_source: set[str] = set()
        self._taken_target: set[str] = set()
        self._left_out: set[str] = set()
        self._why_source: dict[str, str] = {}
        self._why_target: dict[str, str] = {}

    def pair(self, source: Node, target: Node, notes: Notes = ()) -> None:
        """Two modules, or layers, that do the same work."""
        self._fused(source, target, notes)
        if source.layer and target.layer:
            self._layers(source.layer, target.layer, notes)
        elif source.layer or target.layer:
            self._alone(source, target, notes)
        if source.is_stack and target.is_stack and source.children.keys() != target.children.keys():
            self._stacks(source, target, notes)
        else:
            self._named(source, target, notes)

    def leave_out(self, node: Node) -> None:
        for layer in node.leaves().values():
            self._taken_source.add(layer.path)
            self._left_out.add(layer.path)
            self._why_source[layer.path] = "left out by the map given"

    def result(self, sources: Mapping[str, LayerShape], targets: Mapping[str, LayerShape]) -> ModuleMap:
        order = {path: number for number, path in enumerate(sources)}
        rank = {path: number for number, path in enumerate(targets)}
        missing = [path for path in sources if path not in self._taken_source or path in self._left_out]
        return ModuleMap(
            lines=tuple(sorted(self._lines, key=lambda line: (order[line.source], rank[line.target]))),
            unmatched_source=tuple(Unmatched(path, _why(path, self._why_source, "target")) for path in missing),
            unmatched_target=tuple(
                Unmatched(path, _why(path, self._why_target, "source"))
                for path in targets
                if path not in self._taken_target
            ),
        )

    def _layers(self, source: LayerShape, target: LayerShape, notes: Notes) -> None:
        if self._is_free(source.path, target.path):
            self._add(compare(source, target, notes))

    def _alone(self, source: Node, target: Node, notes: Notes) -> None:
        """One is a layer, the other a module that may hold a single one: to_out and to_out.0."""
        ones, others = list(source.leaves().values()), list(target.leaves().values())
        if len(ones) == len(others) == 1:
            note: tuple[Relation, str] = ("renamed", f"{ones[0].path} is {others[0].path} in the target")
            self._layers(ones[0], others[0], (*notes, note))

    def _fused(self, source: Node, target: Node, notes: Notes) -> None:
        found = [line for line in fused_lines(source, target) if self._is_free(line.source, line.target)]
        for line in found:  # all are looked at before any is taken: they share the fused layer
            self._add(replace(line, reason="; ".join([*(note for _, note in notes), line.reason])))

    def _named(self, source: Node, target: Node, notes: Notes) -> None:
        left = {name: node for name, node in source.children.items() if name not in target.children}
        other = {name: node for name, node in target.children.items() if name not in source.children}
        for name, node in source.children.items():
            if name in target.children:
                self.pair(node, target.children[name], notes)
        for name, call in _other_names(left, other):
            note: tuple[Relation, str] = ("renamed", f"{name} is called {call} in the target")
            self.pair(left.pop(name), other.pop(call), (*notes, note))
        for name, node in left.items():
            self._why_source[node.path] = f"the target has no {name!r} in {target.path or 'its root'}"
        for name, node in other.items():
            self._why_target[node.path] = f"the source has no {name!r} in {source.path or 'its root'}"

    def _stacks(self, source: Node, target: Node, notes: Notes) -> None:
        ones, others = _in_order(source), _in_order(target)
        n, m = len(ones), len(others)
        matrix = self._alikeness(ones, others)
        paired = align(matrix)
        for i, j in paired:
            note: tuple[Relation, str] = (
                "aligned",
                f"{source.path} has {n} blocks and {m} in the target: {i} is aligned with {j}",
            )
            self.pair(ones[i], others[j], (*notes, note))
        for number, node in enumerate(ones):
            if number not in {i for i, _ in paired}:
                self._why_source[node.path] = (
                    f"{source.path} has {n} blocks and {m} in the target: none is aligned with this one"
                )
        for number, node in enumerate(others):
            if number not in {j for _, j in paired}:
                self._why_target[node.path] = (
                    f"{target.path} has {m} blocks and {n} in the source: none is aligned with this one"
                )

    def _alikeness(self, ones: Sequence[Node], others: Sequence[Node]) -> list[list[float]]:
        n, m = len(ones), len(others)

        def alike(i: int, j: int) -> float:
            by_place = _alike(ones[i].leaves(), others[j].leaves()) * nearness(i, n, j, m)
            told = self._similarity(ones[i].path, others[j].path) if self._similarity else 0.0
            return told + BY_PLACE * by_place

        return [[alike(i, j) for j in range(m)] for i in range(n)]

    def _is_free(self, source: str, target: str) -> bool:
        return source not in self._taken_source and target not in self._taken_target

    def _add(self, line: MappedLayer) -> None:
        self._lines.append(line)
        self._taken_source.add(line.source)
        self._taken_target.add(line.target)


def _other_names(source: Mapping[str, Node], target: Mapping[str, Node]) -> list[tuple[str, str]]:
    """The pairs among modules without a namesake: synonyms, then the only one left if it is built alike."""
    left, found = dict(target), []
    for name in source:
        call = next((call for call in left if are_synonyms(name, call)), None)
        if call:
            found.append((name, call))
            del left[call]
    rest = source.keys() - {name for name, _ in found}
    if len(rest) == len(left) == 1:
        (name,), (call,) = rest, left
        one, other = source[name].leaves(), target[call].leaves()
        if _shapes(one) == _shapes(other):
            found.append((name, call))
    return found


def _alike(one: Mapping[str, LayerShape], other: Mapping[str, LayerShape]) -> float:
    """The share of two blocks' layers that agree: 1 for name and shape, ½ for the name alone."""
    shared = [1.0 if one[name].shape == other[name].shape else 0.5 for name in one if name in other]
    return max(sum(shared) / max(len(one), len(other), 1), 1e-3)  # other names throughout: depth alone says it


def _in_order(stack: Node) -> list[Node]:
    return [stack.children[name] for name in sorted(stack.children, key=int)]


def _shapes(layers: Mapping[str, LayerShape]) -> dict[str, tuple[int, ...]]:
    return {name: layer.shape for name, layer in layers.items()}


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children.values():
        yield from _nodes(child)


def _places(tree: Node) -> list[str]:
    return [node.path for node in _nodes(tree) if node.path]


def _why(path: str, reasons: Mapping[str, str], other: str) -> str:
    """The reason recorded for the layer or for the nearest module around it."""
    place = path
    while place:
        if place in reasons:
            return reasons[place]
        place = place.rpartition(".")[0]
    return f"no layer of the {other} has this name and place, or it is taken"
