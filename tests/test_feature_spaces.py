"""Folding Φ into a weight and a bias: the folded layer is the layer with Φ before or after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.feature_models import TOLERANCE
from xadapt.matrix import Dense, LowRank, Matrix
from xadapt_feature.phi import Phi
from xadapt_feature.spaces import get_space

CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class Case:
    """A layer, a Φ for one of its sides, and a batch."""

    space: str
    weight: Tensor  # (out, in, *kernel)
    bias: Tensor | None
    phi: Phi
    x: Tensor
    padding: int

    def layer(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if weight.ndim == 2:
            return lambda x: F.linear(x, weight, bias)
        return lambda x: CONV[weight.ndim](x, weight, bias, padding=self.padding)

    def apply_phi(self, features: Tensor) -> Tensor:
        delta = self.phi.delta.tensor()
        axis = features.ndim - 1 if self.weight.ndim == 2 else 1
        moved = features.movedim(axis, -1)
        moved = moved + moved @ delta.T
        if self.phi.offset is not None:
            moved = moved + self.phi.offset
        return moved.movedim(-1, axis)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    space = draw(st.sampled_from(["input", "output"]))
    out, inner = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    kernel = draw(st.sampled_from([(), (1,), (3,), (2, 3), (1, 1), (2, 1, 2)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    rank, scaling = draw(st.integers(1, 4)), draw(st.floats(-2, 2, allow_nan=False))
    padding = draw(st.integers(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    d = inner if space == "input" else out
    low = LowRank(scaling * random(d, rank), random(rank, d))
    delta: Matrix = low if draw(st.booleans()) else Dense(low.tensor())
    # At a padded border a constant before the layer is no bias, which is why merging that is refused.
    has_offset = draw(st.booleans()) and not (kernel and (space == "input") and padding)
    x = random(2, 3, inner) if not kernel else random(2, inner, *(4,) * len(kernel))
    return Case(
        space=space,
        weight=random(out, inner, *kernel),
        bias=random(out) if draw(st.booleans()) else None,
        phi=Phi(delta, random(d) if has_offset else None),
        x=x,
        padding=padding,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_the_folded_layer_is_the_layer_with_phi(case: Case) -> None:
    space, weight, bias = get_space(case.space), case.weight, case.bias
    expected = space.forward(case.layer(weight, bias), case.apply_phi, case.x)

    update = space.update(weight, bias, case.phi)
    new_weight = weight + update.matrix.tensor().view(weight.shape)
    moved = update.bias
    new_bias = moved if bias is None else bias if moved is None else bias + moved
    actual = case.layer(new_weight, new_bias)(case.x)

    tolerance = 20 * TOLERANCE[weight.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    # No larger rank, and no decomposition to keep it. Before a kernel, each of its positions needs the rank anew.
    if isinstance(case.phi.delta, LowRank):
        assert isinstance(update.matrix, LowRank)
        positions = weight[0, 0].numel() if case.space == "input" else 1
        assert update.matrix.left.shape[1] == case.phi.delta.left.shape[1] * positions


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_the_forward_puts_phi_on_its_side(case: Case) -> None:
    order: list[str] = []

    def base(x: Tensor) -> Tensor:
        order.append("base")
        return x

    def phi(x: Tensor) -> Tensor:
        order.append("phi")
        return x

    get_space(case.space).forward(base, phi, case.x)
    assert order == (["phi", "base"] if case.space == "input" else ["base", "phi"])


class TestBias:
    """The classic bug: an output adapter moves the bias too."""

    delta = Dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bias = torch.tensor([1.0, 10.0])

    def test_output_space_moves_it(self) -> None:
        moved = get_space("output").fold_bias(self.weight, self.bias, Phi(self.delta))
        torch.testing.assert_close(moved, torch.tensor([20.0, 0.0]))

    def test_input_space_does_not(self) -> None:
        assert get_space("input").fold_bias(self.weight, self.bias, Phi(self.delta)) is None

    def test_an_offset_becomes_one_in_output_space(self) -> None:
        offset = torch.tensor([0.5, 0.25])
        moved = get_space("output").fold_bias(self.weight, None, Phi(self.delta, offset))
        torch.testing.assert_close(moved, offset)

    def test_an_offset_goes_through_the_weight_in_input_space(self) -> None:
        weight, offset = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])
        moved = get_space("input").fold_bias(weight, self.bias, Phi(self.delta, offset))
        torch.testing.assert_close(moved, torch.tensor([21.0, 43.0]))

    def test_nothing_is_added_where_there_is_nothing(self) -> None:
        assert get_space("output").fold_bias(self.weight, None, Phi(self.delta)) is None


def test_an_unknown_space_is_told_the_two_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"space='inptu' is not a feature space; write space='input' or space='output'"
    ):
        get_space("inptu")
