"""Products in strips are the plain products; factored matrices say what the multiplied-out ones say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt.matrix import ROWS, Dense, LowRank, Matrix, add, low_rank_sum, sum_rows, times, times_right

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((1, 1), (1, 7), (7, 1), (ROWS, 9), (ROWS + 1, 9), (3 * ROWS - 5, 40), (5, 3 * ROWS))
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative to the product of the norms

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES)
both_precisions = pytest.mark.parametrize("like", EXACT)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def views(weight: Tensor) -> list[Tensor]:
    """The same matrix as it can lie in memory: by rows, by columns, with gaps, and as a convolution's view."""
    rows, columns = weight.shape
    gaps = torch.zeros(rows, 2 * columns, dtype=weight.dtype)
    gaps[:, ::2] = weight
    return [weight, weight.T.contiguous().T, gaps[:, ::2], torch.stack([weight, weight])[1]]


def assert_product(result: Tensor, one: Tensor, other: Tensor, like: torch.dtype) -> None:
    assert result.dtype == like
    expected = one.double() @ other.double()
    assert result.shape == expected.shape
    assert (result.double() - expected).norm() <= EXACT[like] * one.double().norm() * other.double().norm()


@every_dtype
@every_shape
@both_precisions
class TestProducts:
    def test_from_the_right(self, dtype: torch.dtype, shape: tuple[int, int], like: torch.dtype) -> None:
        right = randn(shape[1], 3, dtype=like, seed=1)
        for weight in views(randn(*shape, dtype=dtype)):
            assert_product(times(weight, right), weight, right, like)
            assert_product(times(weight, right.T.contiguous().T), weight, right, like)

    def test_from_the_left(self, dtype: torch.dtype, shape: tuple[int, int], like: torch.dtype) -> None:
        left = randn(3, shape[0], dtype=like, seed=1)
        for weight in views(randn(*shape, dtype=dtype)):
            assert_product(times_right(left, weight), left, weight, like)

    def test_sums(self, dtype: torch.dtype, shape: tuple[int, int], like: torch.dtype) -> None:
        factored = LowRank(randn(shape[0], 2, dtype=like, seed=1), randn(2, shape[1], dtype=like, seed=2))
        for matrix in (factored, Dense(factored.tensor()), factored.transposed.transposed):
            for weight in views(randn(*shape, dtype=dtype)):
                kept = weight.clone()
                strips = [strip.clone() for strip in sum_rows(weight, matrix)]
                assert all(strip.dtype == like and len(strip) <= ROWS for strip in strips)
                torch.testing.assert_close(torch.cat(strips), weight.to(like) + factored.tensor())
                assert torch.equal(weight, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_whole_copy_of_a_weight_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty = torch.empty

    def watched(*args: int, **options: object) -> Tensor:
        made.append(tensor := empty(*args, **options))
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    weight = randn(4 * ROWS, 6, dtype=dtype)
    times(weight, randn(6, 2))
    times_right(randn(2, 4 * ROWS), weight)
    list(sum_rows(weight, Dense(randn(4 * ROWS, 6))))
    assert [tensor.shape for tensor in made] == [(ROWS, 6)] * 3


def test_strips_of_no_rows() -> None:
    assert times(torch.empty(0, 4, dtype=torch.float16), randn(4, 2)).shape == (0, 2)
    assert list(sum_rows(torch.empty(0, 4), Dense(torch.empty(0, 4)))) == []


MATRICES = (LowRank(randn(5, 2), randn(2, 4, seed=1)), Dense(randn(5, 4, seed=2)))


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: type(matrix).__name__)
class TestMatrices:
    def test_what_they_say_multiplied_out(self, matrix: Matrix) -> None:
        plain, weight = matrix.tensor(), randn(6, 5, seed=3).bfloat16()
        assert matrix.shape == plain.shape == (5, 4)
        torch.testing.assert_close(matrix.after(weight).tensor(), weight.float() @ plain)
        torch.testing.assert_close(matrix.before(randn(4, 7, seed=4)).tensor(), plain @ randn(4, 7, seed=4))
        torch.testing.assert_close(matrix.transposed.tensor(), plain.T)
        torch.testing.assert_close(matrix.scaled(-0.5).tensor(), -0.5 * plain)
        assert matrix.energy == pytest.approx(float(plain.double().square().sum()))

    def test_sums_stay_factored_where_both_are(self, matrix: Matrix) -> None:
        for other in MATRICES:
            total = add(matrix, other)
            torch.testing.assert_close(total.tensor(), matrix.tensor() + other.tensor())
            assert isinstance(total, LowRank) == (isinstance(matrix, LowRank) and isinstance(other, LowRank))


@pytest.mark.parametrize("shape", [(3 * ROWS - 5, 7), (1, 9), (0, 4)])
def test_the_energy_of_a_dense_one_takes_no_copy_of_it(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = randn(*shape)
    expected = float(matrix.double().square().sum())
    double, rows = Tensor.double, []

    def watched(tensor: Tensor) -> Tensor:
        rows.append(tensor.shape[0])
        return double(tensor)

    monkeypatch.setattr(Tensor, "double", watched)
    assert Dense(matrix).energy == pytest.approx(expected)
    assert max(rows, default=0) <= ROWS


def test_low_rank_sum_folds_the_scalings() -> None:
    pairs = [(randn(r, 4, seed=r), randn(5, r, seed=r + 9), s) for r, s in ((1, 2.0), (3, -0.5))]
    total = low_rank_sum(pairs)
    assert total.rank == 4
    torch.testing.assert_close(total.tensor(), sum(s * b @ a for a, b, s in pairs))
