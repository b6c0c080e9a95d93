"""What an adapter adds to each layer of a base, asked of PEFT's own layers: the way for every kind of adapter.

The layers are PEFT's, on a model that may be hollow: it has every shape and no weight. A layer's weight is put in for
the moment in which it is asked.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from xadapt import registry
from xadapt.errors import some
from xadapt.matrix import Dense
from xadapt.peft_internals import BaseTunerLayer
from xadapt.update import Fold, Update, calculating_in, to_stored

PREFIX = "base_model.model."  # PeftModel's, before the name of every layer's tensor in its files
WIDE = "base_model."  # and before what all of an adapter's layers share, as VeRA's projections

# Those of PEFT's own methods that merge alike here and on the whole base: tests/test_every_peft_type.py. The others take
# something out of the base's weights when they are attached, and here they would find zeros. Plug-ins answer for their own.
EXACT = frozenset(
    {
        "ADALORA",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LOHA",
        "LOKR",
        "MISS",
        "OFT",
        "PEANUT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    }
)


def attach(skeleton: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> PeftModel:
    """The adapter on a model without weights, which is changed in place. Costs the memory of the adapter.

    Raises:
        ValueError: the adapter does not fit this model, or is of a type that needs the model's weights.
    """
    _check_type(config)
    _hollow(skeleton)
    config = copy.deepcopy(config)
    config.modules_to_save = None  # type: ignore[attr-defined]  # these are no layers, and their tensors are not given
    return put_on(skeleton, config, tensors)


def put_on(base: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor]) -> PeftModel:
    """The adapter on a model, which is changed in place.

    Raises:
        ValueError: the adapter does not fit this model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how it would train
        try:
            model = PeftModel(base, config)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
            given = {_in_file(name, base): tensor for name, tensor in tensors.items()}
            result: Any = set_peft_model_state_dict(model, given)
        except RuntimeError as error:
            raise ValueError(
                f"The adapter does not fit this base; was it trained on one of other widths? {error}"
            ) from error
    if result.unexpected_keys:
        raise ValueError(
            f"The adapter has tensors for layers that this base lacks: {some(sorted(result.unexpected_keys))}."
        )
    absent = sorted(wanted - given.keys())
    if absent and result.missing_keys:  # PEFT renames some tensors on loading, so its word is needed too
        raise ValueError(f"The adapter lacks tensors for layers that its config targets in this base: {some(absent)}.")
    return model.eval()


def _check_type(config: PeftConfig) -> None:
    peft_type = str(PeftType(config.peft_type).value)
    if peft_type not in EXACT and registry.kind_of(peft_type) is None:
        raise ValueError(
            f"An adapter of type {peft_type} cannot be told from its file alone: what it adds may depend on the weights of the "
            "base that it is loaded onto. Let PEFT merge it: PeftModel.from_pretrained(model, folder).merge_and_unload(), then "
            f"save_pretrained. These types can be exported and merged here: LORA, {', '.join(sorted(EXACT))}."
        )


def _in_file(name: str, base: nn.Module) -> str:
    return name if name.startswith(WIDE) and "base_model" not in base._modules else PREFIX + name


def updates_of(model: PeftModel) -> dict[str, Fold]:
    """The fold of each adapter layer of a model with one adapter, by module path in the base."""
    return {
        path: partial(_ask, layer)
        for path, layer in model.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer) and ".base_layer" not in path
    }


def _ask(layer: Any, weight: Tensor, bias: Tensor | None) -> Update:
    if hasattr(layer, "folded"):  # layers in feature space say it themselves, and stay factored
        return cast(Update, layer.folded(layer.active_adapters, weight, bias))
    return _merged_update(layer, weight, bias)


def _merged_update(layer: Any, weight: Tensor, bias: Tensor | None) -> Update:
    """The difference that PEFT's own merge makes to this weight."""
    like = calculating_in(weight)
    weight, bias = weight.to(like), None if bias is None else bias.to(like)
    base = layer.get_base_layer()
    with _holding(base, to_stored(base, weight), bias), torch.no_grad():
        try:
            layer.merge()
        except NotImplementedError as error:
            raise ValueError(f"PEFT cannot merge this kind of adapter, {type(layer).__name__}: {error}") from error
        merged, moved = to_stored(base, base.weight.data), base.bias.data if bias is not None else None
        layer.merged_adapters.clear()
    difference = None if bias is None or moved is None else moved - bias
    return Update(
        Dense((merged - weight).flatten(1)), difference if difference is not None and difference.any() else None
    )


@contextmanager
def _holding(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """The layer with copies of this weight and bias in the place of its own."""
    kept = layer.weight, getattr(layer, "bias", None)
    try:
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        yield
    finally:
        layer.weight, layer.bias = kept  # type: ignore[assignment]  # a module's attribute may be anything


def _hollow(model: nn.Module) -> None:
    """Tensors on the meta device become ones of the same shape that hold a single number, over and over.

    Unlike meta tensors they let a PEFT method calculate while it is attached (it sees zeros), and they cost no memory.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module._parameters[name] = nn.Parameter(_zeros_like(parameter), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = _zeros_like(buffer)


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
