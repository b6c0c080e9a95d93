"""Φ as tensors: products with a weight, sums of low-rank adapters, and Φ read off a hosted PEFT layer."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.feature_models import TOLERANCE, OneLayer, adapted, feature_layers
from xadapt import InputAdaConfig
from xadapt.matrix import Dense, LowRank, low_rank_sum
from xadapt.peft_internals import HostedLayer
from xadapt_feature.action import is_plain_lora, phi_of

widths = st.integers(1, 7)
ranks = st.integers(1, 4)
dtypes = st.sampled_from([torch.float32, torch.float64])
scalings = st.floats(-3, 3, allow_nan=False)


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)


draws = st.builds(Draw, st.integers(0, 2**31), dtypes)


def assert_close(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=TOLERANCE[one.dtype], atol=TOLERANCE[one.dtype] * 10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(draws, widths, widths, ranks)
def test_the_low_rank_products_are_the_dense_ones_of_the_same_rank(draw: Draw, d: int, n: int, r: int) -> None:
    left, right = draw(d, r), draw(r, d)
    low, dense = LowRank(left, right), Dense(left @ right)
    assert_close(low.tensor(), dense.tensor())
    for product, expected, weight in (
        (low.after, dense.after, draw(n, d)),
        (low.before, dense.before, draw(d, n)),
    ):
        result = product(weight)
        assert isinstance(result, LowRank)
        assert result.left.shape[1] == result.right.shape[0] == r
        assert_close(result.tensor(), expected(weight).tensor())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(draws, widths, widths)
def test_after_and_before_name_the_side_of_the_weight(draw: Draw, d: int, n: int) -> None:
    delta, columns, rows = draw(d, d), draw(n, d), draw(d, n)
    assert_close(Dense(delta).after(columns).tensor(), columns @ delta)
    assert_close(Dense(delta).before(rows).tensor(), delta @ rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(draws, widths, widths, st.lists(st.tuples(ranks, scalings), min_size=1, max_size=4))
def test_a_sum_of_adapters_has_each_ones_own_scaling(
    draw: Draw, m: int, n: int, adapters: list[tuple[int, float]]
) -> None:
    pairs = [(draw(r, n), draw(m, r), s) for r, s in adapters]
    total = low_rank_sum(pairs)
    assert total.left.shape == (m, sum(r for r, _ in adapters))
    assert_close(total.tensor(), sum((s * (b @ a) for a, b, s in pairs), torch.zeros(m, n, dtype=draw.dtype)))


def hosted_lora(d: int = 6, **options: Any) -> HostedLayer:
    """A random LoRA of PEFT's on an identity linear."""
    config = InputAdaConfig(r=2, lora_alpha=3, target_modules=["layer"], **options)
    (layer,) = feature_layers(adapted(OneLayer(nn.Linear(d, d)), config))
    return layer.hosted


def action(hosted: HostedLayer, d: int = 6) -> tuple[Tensor, Tensor]:
    """Δ and c of Φ(x) = x + Δx + c, by running the layer in evaluation mode on d + 1 vectors."""
    training = hosted.training
    hosted.eval()
    with torch.no_grad():
        constant = hosted(torch.zeros(1, d))[0]
        delta = torch.stack([hosted(e[None])[0] - constant for e in torch.eye(d)], dim=1) - torch.eye(d)
    hosted.train(training)
    return delta, constant


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.5},
    "dora": {"use_dora": True},
    "offset": {"lora_bias": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_phi_of_a_hosted_lora_is_what_the_layer_does(options: dict[str, Any]) -> None:
    hosted = hosted_lora(**options).train()
    phi = phi_of(hosted, ["default"], torch.zeros(()))
    delta, constant = action(hosted)
    assert_close(phi.delta.tensor(), delta)
    assert_close(torch.zeros(6) if phi.offset is None else phi.offset, constant)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_it_stays_low_rank_unless_a_variant_makes_it_another_map(options: dict[str, Any]) -> None:
    hosted = hosted_lora(**options)
    assert is_plain_lora(hosted, "default") == ("use_dora" not in options)
    assert isinstance(phi_of(hosted, ["default"], torch.zeros(())).delta, Dense if "use_dora" in options else LowRank)


def test_reading_phi_leaves_the_layer_as_it_was() -> None:
    hosted = hosted_lora(use_dora=True, lora_dropout=0.5)
    hosted.enable_adapters(False)
    assert not action(hosted)[0].any()
    hosted.train()
    cast(nn.Module, hosted.lora_dropout).eval()
    flags = [module.training for module in hosted.modules()]
    phi = phi_of(hosted, ["default"], torch.zeros(()))
    assert phi.delta.tensor().any()
    assert [module.training for module in hosted.modules()] == flags
    assert hosted.disable_adapters


def test_reading_phi_asks_for_the_adapters_it_is_given() -> None:
    hosted = hosted_lora()
    phi = phi_of(hosted, ["default", "of another layer"], torch.zeros(()))
    assert_close(phi.delta.tensor(), action(hosted)[0])


def test_phi_comes_in_the_dtype_asked_for() -> None:
    for options in ({}, {"use_dora": True}):
        hosted = hosted_lora(lora_bias=not options, **options)  # type: ignore[arg-type]
        phi = phi_of(hosted, ["default"], torch.zeros((), dtype=torch.float64))
        assert phi.delta.tensor().dtype == torch.float64
        assert phi.offset is None or phi.offset.dtype == torch.float64
