"""A live model with a detached adapter on it, for as long as a block lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from xadapt.attached import put_on
from xadapt.contract import Adapter
from xadapt.evaluating import in_eval_mode
from xadapt.kinds import PeftKind
from xadapt.layouts.names import named_as_in
from xadapt.own_biases import own_biases


@contextmanager
def wearing(model: nn.Module, adapter: Adapter) -> Iterator[PeftModel]:
    """The model with the adapter on it, in eval mode and frozen. Afterwards the model is as it was.

        with wearing(base.module(), adapter) as adapted:
            changed = adapted(**batch)
            with adapted.disable_adapter():
                bare = adapted(**batch)

    Raises:
        ValueError: the adapter is none that PEFT attaches, or does not fit.
    """
    if not isinstance(adapter.kind, PeftKind):
        raise ValueError(f"An adapter of kind {adapter.kind.name!r} is none that PEFT puts on a model.")
    children = {module: dict(module._modules) for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    attributes = set(vars(model))
    config, tensors = named_as_in(adapter.config, adapter.tensors, dict(model.named_modules()))
    try:
        with own_biases(model, config) as bare, in_eval_mode(model):
            adapted = put_on(model, copy.deepcopy(config), tensors).requires_grad_(False)
            bare(adapted)
            yield adapted
    finally:  # not by PEFT's unload, which leaves modules_to_save in place, and nothing at all after a failed start
        for module, own in children.items():
            module._modules.clear()
            module._modules.update(own)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
