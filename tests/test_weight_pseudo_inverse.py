"""A plain update re-expressed in feature space, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt.matrix import LowRank
from xadapt_feature.spaces import get_space
from xadapt_weight.pseudo_inverse import input_form, output_form, relative_error, ridge_solve

SHAPES = [(5, 9), (9, 5), (6, 6)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update_of(outputs: int, inputs: int, rank: int = 2) -> LowRank:
    return LowRank(randn(outputs, rank, seed=1), randn(rank, inputs, seed=2))


class TestRidgeSolve:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_without_ridge_it_is_the_pseudo_inverse(self, shape: tuple[int, int]) -> None:
        matrix, right = randn(*shape), randn(shape[0], 3, seed=1)
        torch.testing.assert_close(ridge_solve(matrix, right, 0), torch.linalg.pinv(matrix) @ right)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_a_matrix_of_lower_rank_as_well(self, shape: tuple[int, int]) -> None:
        matrix, right = randn(shape[0], 2) @ randn(2, shape[1], seed=3), randn(shape[0], 3, seed=1)
        torch.testing.assert_close(ridge_solve(matrix, right, 0), torch.linalg.pinv(matrix, rtol=1e-9) @ right)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_with_ridge_it_damps_each_singular_value(self, shape: tuple[int, int]) -> None:
        matrix, right = randn(*shape), randn(shape[0], 3, seed=1)
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        damped = values / (values**2 + 0.1 * values.square().mean())
        torch.testing.assert_close(ridge_solve(matrix, right, 0.1), vh.T @ (damped[:, None] * (u.T @ right)))

    def test_a_half_precision_matrix_is_calculated_with_in_the_dtype_of_the_right_side(self) -> None:
        matrix, right = randn(300, 7).bfloat16(), randn(300, 2, seed=1)
        torch.testing.assert_close(ridge_solve(matrix, right, 0.1), ridge_solve(matrix.double(), right, 0.1))

    def test_a_ridge_below_the_rounding_is_refused(self) -> None:
        matrix = torch.ones(300, 60)
        with pytest.raises(ValueError, match=r"ridge=1e-12 is lost in the rounding of float32; .* 0\.01, or float64"):
            ridge_solve(matrix, torch.ones(300, 1), 1e-12)

    def test_of_zeros_it_is_zero(self) -> None:
        for ridge in (0, 0.1):
            assert torch.equal(ridge_solve(torch.zeros(4, 3).double(), randn(4, 2), ridge), torch.zeros(3, 2).double())


class TestForms:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_is_the_least_squares_solution(self, shape: tuple[int, int]) -> None:
        weight, update = randn(*shape), update_of(*shape)
        inverse, delta = torch.linalg.pinv(weight), update.tensor()
        torch.testing.assert_close(input_form(weight, update, 0).tensor(), inverse @ delta)
        torch.testing.assert_close(output_form(weight, update, 0).tensor(), delta @ inverse)

    def test_where_the_weight_has_full_rank_on_that_side_nothing_is_lost(self) -> None:
        wide, tall = randn(5, 9), randn(9, 5)
        for space, form, weight in (("input", input_form, wide), ("output", output_form, tall)):
            update = update_of(*weight.shape)
            folded = get_space(space).fold(weight, form(weight, update, 0))
            torch.testing.assert_close(folded.tensor(), update.tensor())
            assert relative_error(folded, update) < 1e-10

    def test_an_adapter_of_that_space_comes_back(self) -> None:
        """What an input adapter does to a square weight is W Δ, whose input form is Δ."""
        weight, delta = randn(6, 6), update_of(6, 6)
        torch.testing.assert_close(input_form(weight, delta.after(weight), 0).tensor(), delta.tensor())
        torch.testing.assert_close(output_form(weight, delta.before(weight), 0).tensor(), delta.tensor())

    def test_a_ridge_makes_it_smaller_and_the_error_larger(self) -> None:
        weight, update = randn(8, 8), update_of(8, 8)
        norms, errors = [], []
        for ridge in (0, 0.01, 0.1, 1):
            delta = input_form(weight, update, ridge)
            norms.append(delta.energy)
            errors.append(relative_error(delta.after(weight), update))
        assert norms == sorted(norms, reverse=True)
        assert errors == sorted(errors)

    def test_the_rank_stays(self) -> None:
        weight, update = randn(7, 9), update_of(7, 9)
        assert input_form(weight, update, 0.1).rank == output_form(weight, update, 0.1).rank == 2

    def test_of_a_one_by_one_convolution_it_is_that_of_the_linear(self) -> None:
        weight, update = randn(5, 9), update_of(5, 9)
        for form in (input_form, output_form):
            ours, linears = form(weight[:, :, None, None], update, 0.1), form(weight, update, 0.1)
            torch.testing.assert_close(ours.tensor(), linears.tensor())

    def test_of_a_convolution_it_is_what_an_adapter_of_that_space_adds(self) -> None:
        weight = randn(20, 4, 3, 3)
        for space, form, width in (("input", input_form, 4), ("output", output_form, 20)):
            delta = update_of(width, width)
            folded = get_space(space).fold(weight, delta)
            assert isinstance(folded, LowRank)
            back = form(weight, folded, 0)
            torch.testing.assert_close(back.tensor(), delta.tensor())

    def test_an_update_that_no_input_adapter_makes_of_a_convolution_has_an_error(self) -> None:
        weight, update = randn(20, 4, 3, 3), update_of(20, 36)
        delta = input_form(weight, update, 0)
        folded = get_space("input").fold(weight, delta)
        assert isinstance(folded, LowRank)
        assert delta.rank == update.rank
        assert 0.1 < relative_error(folded, update) < 1


class TestRelativeError:
    def test_it_is_that_of_the_dense_matrices(self) -> None:
        one, other = update_of(5, 9), LowRank(randn(5, 3, seed=4), randn(3, 9, seed=5))
        dense = (one.tensor() - other.tensor()).norm() / other.tensor().norm()
        assert relative_error(one, other) == pytest.approx(float(dense))

    def test_small_ones_are_seen(self) -> None:
        one = update_of(5, 9)
        assert relative_error(one.scaled(1 + 1e-12), one) == pytest.approx(1e-12, rel=1e-2)

    def test_of_nothing_it_is_zero(self) -> None:
        assert relative_error(update_of(3, 3).scaled(0), update_of(3, 3).scaled(0)) == 0
