"""A base's layers as a tree of names: all that a module map looks at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from xadapt.update import to_stored


@dataclass(frozen=True)
class LayerShape:
    """A layer that an adapter could change."""

    path: str
    sort: str  # "linear", "convolution" or "embedding"
    shape: tuple[int, ...]  # (out, in, *kernel)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.sort} {' × '.join(map(str, self.shape))}"


@dataclass
class Node:
    """A module with what is below it. `path` is its own; the key it has in its parent may be the one of the other base."""

    path: str
    layer: LayerShape | None = None
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def is_stack(self) -> bool:
        """Whether its children are numbered."""
        return bool(self.children) and all(name.isdecimal() for name in self.children)

    def leaves(self) -> dict[str, LayerShape]:
        """The layers at and below this node, by their path from here."""
        return dict(self._leaves(""))

    def find(self, relative: str) -> LayerShape | None:
        """The layer at a path from here."""
        node = self.descend(relative)
        return node.layer if node else None

    def descend(self, relative: str) -> Node | None:
        node: Node | None = self
        for name in relative.split(".") if relative else ():
            node = node.children.get(name) if node else None
        return node

    def _leaves(self, prefix: str) -> Iterator[tuple[str, LayerShape]]:
        if self.layer:
            yield prefix, self.layer
        for name, child in self.children.items():
            yield from child._leaves(f"{prefix}.{name}" if prefix else name)


def layers_in(modules: Mapping[str, nn.Module]) -> dict[str, LayerShape]:
    """The linears, convolutions and embeddings among a base's modules, by path. Looks at classes and shapes only."""
    found = ((path, _shape_of(path, module)) for path, module in modules.items())
    return {path: shape for path, shape in found if shape}


def tree_of(layers: Mapping[str, LayerShape], keys: Mapping[str, str] | None = None) -> Node:
    """The tree of these layers.

    Args:
        layers: by path.
        keys: where a layer stands in the tree, if not at its own path.
    """
    root = Node("")
    for path, layer in layers.items():
        key = keys[path] if keys else path
        node, names = root, key.split(".")
        own = path.split(".")
        for depth, name in enumerate(names, start=1):
            # Renamed prefixes may be of other lengths; from the end on, both paths have the same names.
            left = len(names) - depth
            node = node.children.setdefault(name, Node(".".join(own[: max(0, len(own) - left)])))
        node.layer = layer
    return root


def _shape_of(path: str, module: nn.Module) -> LayerShape | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return None
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):  # quantised weights are stored in other shapes
        return LayerShape(path, "linear", (outputs, inputs))
    if weight.ndim < 2:
        return None
    if isinstance(module, nn.Embedding):
        return LayerShape(path, "embedding", tuple(to_stored(module, weight).shape))
    sort = "convolution" if weight.ndim > 2 else "linear"
    return LayerShape(path, sort, tuple(to_stored(module, weight).shape))
