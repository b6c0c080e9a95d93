"""What relates two layers that stand in the same place, and in which words that is said."""

from __future__ import annotations

from collections.abc import Sequence

from .lines import MappedLayer, Relation
from .names import KEYS, OUTPUTS, QUERIES, VALUES
from .tree import LayerShape


def compare(source: LayerShape, target: LayerShape, notes: Sequence[tuple[Relation, str]]) -> MappedLayer:
    """The line of two layers.

    Args:
        source, target: the layers.
        notes: on the way to them, what was not as simple as the same name, outermost first.
    """
    if source.path == target.path:  # a rename on the way that did not concern this layer
        notes = [note for note in notes if note[0] != "renamed"]
    said = [note for _, note in notes]
    relation, shape = _by_shape(source, target)
    if relation != "same":
        return MappedLayer(source.path, target.path, relation, "; ".join([*said, shape]))
    relations = {relation for relation, _ in notes}
    strongest: tuple[Relation, ...] = ("given", "aligned", "renamed")
    relation = next((known for known in strongest if known in relations), "same")
    if relation == "same":
        shape = "the same name and shape" if source.path == target.path else shape
    return MappedLayer(source.path, target.path, relation, "; ".join([*said, shape]))


def _by_shape(source: LayerShape, target: LayerShape) -> tuple[Relation, str]:
    if source.sort == target.sort and source.shape == target.shape:
        return "same", "the same shape"
    if source.sort != target.sort:
        return "reshaped", f"{source} there, {target} here"
    (out, width, *kernel), (new_out, new_width, *new_kernel) = source.shape, target.shape
    names = f"{out} × {width} in the source, {new_out} × {new_width} in the target"
    if kernel != new_kernel:
        return "reshaped", f"the kernel is {_by(kernel)} in the source, {_by(new_kernel)} in the target"
    if source.name in KEYS | VALUES and width == new_width:
        return "heads", f"another number of key-value heads ({names})"
    if (source.name in QUERIES and width == new_width) or (source.name in OUTPUTS and out == new_out):
        return "heads", f"another number or size of attention heads ({names})"
    if source.sort == "embedding" and out == new_out:
        return "reshaped", f"another vocabulary: {width} in the source, {new_width} in the target"
    side = "output" if width == new_width else "input" if out == new_out else "input and output"
    return "reshaped", f"other {side} widths ({names})"


def _by(kernel: Sequence[int]) -> str:
    return " × ".join(map(str, kernel)) or "none"
