"""Every way of carrying an adapter that the zoo compares, one row each, and the one place where methods are called."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xadapt import registry

if TYPE_CHECKING:
    from torch import nn

    from xadapt.contract import Adapter, Carried, Siblings

AS_IT_IS = {
    "lora": "copy",
    "input": "input_ada",
    "output": "output_ada",
}  # space -> the method that takes it along unchanged
TRAINING = {
    "distil": ("steps", "lr"),
    "auto": ("training_steps", "training_lr"),
}  # method that trains -> what it calls its steps and its learning rate
KINDS = {"lora": "lora", "input": "input_ada", "output": "output_ada"}  # space -> name of its kind


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way of carrying. `method`: the name it is registered under; None is the unchanged adapter of each space."""

    name: str
    heading: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    trains: bool = False
    spaces: tuple[str, ...] | None = None  # only these; None is all that the method reads

    def of(self, space: str) -> str:
        """The registered method for an adapter of this space."""
        return self.method or AS_IT_IS[space]

    def takes(self, space: str) -> bool:
        """Whether this row has an entry for adapters of this space. False too where its method is not installed."""
        if self.spaces is not None and space not in self.spaces:
            return False
        if self.of(space) not in registry.methods():
            return False
        return KINDS[space] in {kind.name for kind in registry.get(self.of(space)).reads}


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(name="copy", heading="as it is"),
        Row(name="pinv_input", heading="pinv_input", method="pinv_input"),
        Row(name="pinv_output", heading="pinv_output", method="pinv_output"),
        Row(name="lora_x", heading="lora_x", method="lora_x"),
        Row(name="prolora", heading="prolora", method="prolora"),
        Row(name="aligned", heading="aligned", method="aligned"),
        Row(name="aligned_input", heading="aligned_input", method="aligned_input"),
        Row(name="aligned_output", heading="aligned_output", method="aligned_output"),
        Row(name="auto", heading="auto", method="auto"),
        Row(name="distil", heading="distil", method="distil", trains=True, spaces=("lora",)),
        Row(
            name="auto_train",
            heading="auto, training allowed",
            method="auto",
            options={"allow_training": True},
            trains=True,
            spaces=("lora",),
        ),
    )
}
CHOOSERS = tuple(row.name for row in ROWS.values() if row.method == "auto")  # whose adapter is another row's already
BARE, RETRAINED = "bare", "retrained"  # rows without a method


def carry(
    row: Row, space: str, adapter: Adapter, bases: Siblings, batches: Iterable[Any], training: tuple[int, float]
) -> Carried:
    """The adapter for the target, by this row's method. `training`: steps and learning rate of one that trains.

    Raises:
        ValueError: the method refuses.
    """
    method = row.of(space)
    own = dict(zip(TRAINING[method], training, strict=True)) if row.trains else {}
    built = registry.get(method).build(**row.options, **own)
    if hasattr(built, "fit"):
        built = built.fit(adapter, bases, batches)
    carried: Carried = built.transfer(adapter, bases)
    return carried


def put_on(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the base with what the adapter adds to its weights."""
    import torch

    from xadapt.base import open_base
    from xadapt.folding import layers_of
    from xadapt.update import to_stored

    opened = open_base(base)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for layer in layers_of([adapter], opened):
            update = layer.update(opened.weights())
            module: Any = model.get_submodule(layer.path)
            module.weight.add_(to_stored(module, update.matrix.tensor().to(module.weight)).view_as(module.weight))
            if update.bias is not None and module.bias is not None:
                module.bias.add_(update.bias.to(module.bias))
            elif update.bias is not None:
                module.bias = torch.nn.Parameter(update.bias.to(module.weight), requires_grad=False)
    return model.eval()
