"""Export of one layer: the plain LoRA that an adapter is on a base says what the tuner says there, and so does each fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import xadapt
from tests.exporting import ADAPTERS, assert_close, examples, exported, quiet
from tests.feature_models import OneLayer, adapted, features_for
from xadapt.attached import attach, updates_of
from xadapt.folding import layers_of
from xadapt.update import to_stored

pytestmark = quiet

LAYERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "Conv1D": lambda i, o, bias: Conv1D(o, i),
    "embedding": lambda i, o, bias: nn.Embedding(i, o),
    "conv 1x1": lambda i, o, bias: nn.Conv2d(i, o, 1, bias=bias),
    "conv 3x3": lambda i, o, bias: nn.Conv2d(i, o, 3, padding=1, bias=bias),
    "conv strided": lambda i, o, bias: nn.Conv2d(i, o, (3, 2), stride=2, bias=bias),
    "conv1d": lambda i, o, bias: nn.Conv1d(i, o, 3, padding=2, bias=bias),
}


@dataclass(frozen=True)
class Case:
    """One layer with one adapter."""

    layer: str
    adapter: str
    widths: tuple[int, int]
    bias: bool
    dtype: torch.dtype
    options: dict[str, Any]

    def base(self) -> OneLayer:
        torch.manual_seed(7)
        layer = LAYERS[self.layer](*self.widths, self.bias)
        if isinstance(layer, Conv1D):
            nn.init.normal_(layer.bias)
        return OneLayer(layer).to(self.dtype).eval()

    def tuner(self) -> PeftModel:
        """On the base as it is, in a precision that shows differences."""
        config = ADAPTERS[self.adapter](target_modules=["layer"], **self.options)
        return adapted(self.base().to(self.precision), config)

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _has_adapter(layer: str, adapter: str) -> bool:
    return (layer, adapter) != ("embedding", "input") and (adapter != "hybrid" or layer in ("linear", "Conv1D"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    adapter = draw(st.sampled_from(sorted(ADAPTERS)))
    layer = draw(st.sampled_from([name for name in LAYERS if _has_adapter(name, adapter)]))
    widths = draw(st.tuples(st.integers(4, 20), st.integers(4, 20)))
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 3)),
        "lora_alpha": draw(st.sampled_from([1, 2, 0.5, 7])),
        "use_rslora": draw(st.booleans()),
    }
    if adapter == "hybrid":
        options |= {"r": options["r"] + 1, "feature_r": 1, "space": draw(st.sampled_from(["input", "output"]))}
    elif draw(st.booleans()):
        options["alpha_pattern"] = {"layer": 3}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return Case(layer, adapter, widths, draw(st.booleans()), dtype, options)


class TestOneLayer:
    @given(case=cases())
    @examples
    def test_export_is_the_tuner_on_this_base(self, case: Case) -> None:
        base, tuner = case.base(), case.tuner()
        x = features_for(base.layer)
        x = x.to(case.precision) if x.is_floating_point() else x
        tensors, config, stock = exported(tuner, base)
        assert config["peft_type"] == "LORA"
        assert_close(stock(x), tuner(x))
        assert {tensor.dtype for tensor in tensors.values()} == {case.precision}

    @given(case=cases())
    @examples
    def test_without_a_model_as_with_peft_s_layers(self, case: Case) -> None:
        """The detached route, which knows the factors, against the attached one, which asks PEFT."""
        base, adapter = xadapt.open_base(case.base()), xadapt.detach(case.tuner())
        (layer,) = layers_of([adapter], base)
        assert adapter.kind.updates(adapter.config, adapter.tensors) is not None
        one = layer.update(base.weights())
        (fold,) = updates_of(attach(base.skeleton(), adapter.config, adapter.tensors)).values()
        weights = base.weights()
        other = fold(to_stored(layer.module, weights["layer.weight"]), weights.get("layer.bias"))
        assert one.matrix.tensor().dtype == other.matrix.tensor().dtype == case.precision
        assert_close(one.matrix.tensor(), other.matrix.tensor())
        assert (one.bias is None) == (other.bias is None)
        if one.bias is not None and other.bias is not None:
            assert_close(one.bias, other.bias)

    @given(case=cases())
    @examples
    def test_the_update_added_to_the_weight_is_the_tuner(self, case: Case) -> None:
        base, tuner = case.base(), case.tuner()
        opened = xadapt.open_base(base)
        (layer,) = layers_of([xadapt.detach(tuner)], opened)
        update = layer.update(opened.weights())
        x = features_for(base.layer)
        x = x.to(case.precision) if x.is_floating_point() else x
        merged = base.to(case.precision)
        with torch.no_grad():
            added = update.matrix.tensor().view(layer.shape)
            merged.layer.weight += to_stored(merged.layer, added)
            if update.bias is not None:
                merged.layer.bias += update.bias
        assert_close(merged(x), tuner(x))

    @given(case=cases())
    @examples
    def test_the_rank_is_the_adapter_s(self, case: Case) -> None:
        """No larger, but for an input adaptation before a kernel: each of its positions has products of its own."""
        opened, adapter = xadapt.open_base(case.base()), xadapt.detach(case.tuner())
        (layer,) = layers_of([adapter], opened)
        positions = 1
        for size in layer.shape[2:]:
            positions *= size
        factor = positions if case.adapter == "input" else 1
        assert layer.update(opened.weights()).matrix.rank == factor * case.options["r"]


@pytest.mark.parametrize("adapter", ["lora", "input", "output"])
@pytest.mark.parametrize("layer", ["linear", "conv 3x3"])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_export_is_linear_in_a_and_in_b(adapter: str, layer: str, side: str, tmp_path: Path) -> None:
    case = Case(layer, adapter, (6, 5), True, torch.float32, {"r": 2, "lora_alpha": 3})
    base, detached = case.base(), xadapt.detach(case.tuner())

    def update(change: Callable[[Tensor], Tensor]) -> Tensor:
        tensors = {n: change(t) if side in n else t for n, t in detached.tensors.items()}
        changed = xadapt.contract.Adapter(kind=detached.kind, config=detached.config, tensors=tensors)
        (found,) = layers_of([changed], xadapt.open_base(base))
        made = found.update(xadapt.open_base(base).weights())
        return torch.cat([made.matrix.tensor().flatten(), made.bias if made.bias is not None else torch.zeros(5)])

    noise = torch.randn(1)
    one, other = update(lambda t: t), update(lambda t: t.flip(1))
    assert_close(update(lambda t: 2 * t + noise * t.flip(1)), 2 * one + noise * other)
