"""Cutting to low rank: as good as the full SVD, with the error that it says it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xadapt.matrix import Dense, LowRank
from xadapt.truncate import EXACT, Truncation, exact_rank, truncate


def matrix_with(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator)).Q
    return ((u * values) @ v.T).float()


def best_error(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


def error(matrix: Tensor, cut: LowRank) -> float:
    return float((cut.tensor().double() - matrix.double()).norm() / matrix.double().norm())


SPECTRA = {
    "steep": 0.5 ** torch.arange(60, dtype=torch.float64),
    "slow": 1 / (1 + torch.arange(120, dtype=torch.float64)),
    "flat": torch.ones(150, dtype=torch.float64),
    "of low rank": torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64),
}
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


@every_spectrum
class TestToARank:
    @pytest.mark.parametrize("shape", [(150, 200), (200, 150)])  # large enough for the randomised way
    @pytest.mark.parametrize("rank", [1, 4, 16, 140])
    def test_a_dense_one_is_cut_as_well_as_by_the_full_svd(self, name: str, shape: tuple[int, int], rank: int) -> None:
        matrix = matrix_with(SPECTRA[name], *shape)
        cut, residual = truncate(Dense(matrix), Truncation(rank=rank))
        best = best_error(matrix, rank)
        assert cut.rank == rank
        assert error(matrix, cut) <= 1.005 * best + 3e-6
        assert residual == pytest.approx(error(matrix, cut), rel=1e-3, abs=3e-6)

    def test_a_factored_one_is_cut_as_the_dense_one(self, name: str) -> None:
        generator = torch.Generator().manual_seed(3)
        left = torch.randn(30, 12, generator=generator) * SPECTRA["steep"][:12].float()
        factored = LowRank(left, torch.randn(12, 40, generator=generator))
        for rank in (1, 5, 12):
            cut, residual = truncate(factored, Truncation(rank=rank))
            dense, _ = truncate(Dense(factored.tensor()), Truncation(rank=rank))
            torch.testing.assert_close(cut.tensor(), dense.tensor(), rtol=1e-4, atol=1e-5)
            assert residual == pytest.approx(best_error(factored.tensor(), rank), rel=1e-3, abs=3e-6)

    def test_the_same_every_time(self, name: str) -> None:
        matrix = Dense(matrix_with(SPECTRA[name], 150, 200))
        state = torch.get_rng_state()
        one, other = (truncate(matrix, Truncation(rank=8))[0] for _ in range(2))
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)
        assert torch.equal(torch.get_rng_state(), state)

    def test_both_sides_are_of_one_size(self, name: str) -> None:
        """So that half precision holds either."""
        cut, _ = truncate(Dense(matrix_with(1e6 * SPECTRA[name], 150, 200)), Truncation(rank=2))
        assert float(cut.left.norm()) == pytest.approx(float(cut.right.norm()), rel=1e-4)


@every_spectrum
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
class TestToAShareOfTheEnergy:
    def test_the_smallest_rank_that_keeps_it(self, name: str, energy: float) -> None:
        matrix = matrix_with(SPECTRA[name], 150, 200)
        cut, residual = truncate(Dense(matrix), Truncation(energy=energy))
        assert 1 - residual**2 >= energy - 1e-6
        if cut.rank > 1 and energy < 1:  # one less would not do
            assert 1 - best_error(matrix, cut.rank - 1) ** 2 < energy + 1e-6

    def test_of_factors(self, name: str, energy: float) -> None:
        matrix = matrix_with(SPECTRA[name][:20], 40, 50)
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        cut, residual = truncate(LowRank(u[:, :20] * values[:20], vh[:20]), Truncation(energy=energy))
        assert 1 - residual**2 >= energy - 1e-6
        if cut.rank > 1 and energy < 1:
            assert 1 - best_error(matrix, cut.rank - 1) ** 2 < energy + 1e-6


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_rank_that_loses_nothing(rank: int, scale: float) -> None:
    matrix = scale * matrix_with(torch.linspace(1, 2, rank, dtype=torch.float64), 150, 200)
    matrix += 1e-8 * scale * torch.randn(150, 200, generator=torch.Generator().manual_seed(1))
    assert exact_rank(Dense(matrix)) == rank
    assert truncate(Dense(matrix), Truncation(rank=rank))[1] <= EXACT
    assert exact_rank(Dense(matrix), limit=rank) == rank
    if rank > 1:
        assert exact_rank(Dense(matrix), limit=rank - 1) is None


def test_a_full_rank_is_no_low_one() -> None:
    for shape in ((150, 200), (20, 30)):
        assert exact_rank(Dense(matrix_with(torch.ones(min(shape), dtype=torch.float64), *shape))) is None
    assert exact_rank(Dense(torch.zeros(50, 60))) == 1


@pytest.mark.parametrize("to", [Truncation(rank=4), Truncation(energy=0.9)])
@pytest.mark.parametrize("matrix", [Dense(torch.zeros(50, 60)), LowRank(torch.zeros(50, 3), torch.zeros(3, 60))])
def test_of_nothing_nothing_is_lost(matrix: Any, to: Truncation) -> None:
    cut, residual = truncate(matrix, to)
    assert residual == 0
    assert not cut.tensor().any()


def test_a_rank_above_the_full_one_is_the_full_one() -> None:
    matrix = matrix_with(SPECTRA["slow"], 150, 200)[:12]
    cut, residual = truncate(Dense(matrix), Truncation(rank=64))
    assert cut.rank == 12
    assert residual < 3e-6


def test_float64_stays_float64() -> None:
    matrix = matrix_with(SPECTRA["steep"], 150, 200).double()
    cut, residual = truncate(Dense(matrix), Truncation(rank=59))
    assert cut.left.dtype == torch.float64
    assert residual < 1e-7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: a rank is a positive integer"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": True}, "rank=True"),
        ({"energy": 0}, "energy=0: the share"),
        ({"energy": 1.1}, "energy=1.1"),
        ({"energy": float("nan")}, "energy=nan"),
        ({"rank": 2, "energy": 0.5}, "pass one of them"),
    ],
)
def test_what_is_no_truncation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncation(**options)
