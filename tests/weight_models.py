"""LoRAs with random tensors, and what they do to each weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.contract import Adapter, Carried
from xadapt.folding import layers_of
from xadapt_weight import COPY

LORA = COPY.writes


def lora_on(model: nn.Module, targets: list[str], rank: int = 2, **options: Any) -> Adapter:
    """A LoRA with random tensors; `model` is used up."""
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=targets, **options)
    LORA.attach(model, config)
    generator = torch.Generator().manual_seed(5)
    names = {
        n: t.shape for n, t in LORA.tensors(model).items() if ".lora_" in n
    }  # with embeddings, PEFT adds their weight
    tensors = {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in names.items()}
    return Adapter(kind=LORA, config=config, tensors=tensors)


def updates_on(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """What an adapter adds to each weight of a model, by path."""
    base = open_base(model)
    weights = base.weights()
    return {layer.path: layer.update(weights).matrix.tensor() for layer in layers_of([adapter], base)}


def biases_on(adapter: Adapter, model: nn.Module) -> dict[str, Tensor | None]:
    base = open_base(model)
    weights = base.weights()
    return {layer.path: layer.update(weights).bias for layer in layers_of([adapter], base)}


def errors_of(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {path: float((found[path] - wanted[path]).norm() / wanted[path].norm()) for path in wanted}


def attach(model: nn.Module, adapter: Adapter) -> PeftModel:
    peft = get_peft_model(model, adapter.config).eval()
    named = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
    assert not set_peft_model_state_dict(peft, named).unexpected_keys
    return peft


class Watched:
    """A base whose network must not be loaded, and that remembers what was read."""

    def __init__(self, base: CheckpointBase | LiveBase) -> None:
        self._base, self.name = base, base.name
        self.read: list[str] = []

    def weights(self) -> Mapping[str, Tensor]:
        return _WatchedWeights(self._base.weights(), self.read)

    def modules(self) -> Mapping[str, nn.Module]:
        return self._base.modules()

    def skeleton(self) -> nn.Module:
        return self._base.skeleton()

    def module(self) -> nn.Module:
        raise AssertionError("the network was loaded")


class _WatchedWeights(Mapping[str, Tensor]):
    def __init__(self, weights: Mapping[str, Tensor], read: list[str]) -> None:
        self._weights, self._read = weights, read

    def __getitem__(self, name: str) -> Tensor:
        self._read.append(name)
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def errors_in(carried: Carried) -> dict[str, float]:
    """The errors that a transfer reports, by layer."""
    return {path: float(measured["error"]) for path, measured in carried.evidence.items()}
