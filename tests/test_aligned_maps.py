"""The mathematics of alignment: maps from moments, and updates re-expressed on data, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt.matrix import LowRank
from xadapt_aligned.choosing import choose, choose_rigid
from xadapt_aligned.maps import (
    identity,
    least_squares,
    near,
    near_identity,
    permutation,
    probed,
    procrustes,
    relative_error,
)
from xadapt_aligned.moments import Moments
from xadapt_aligned.on_data import error_on_data, guess_of_inputs, input_form, output_form, with_constant

TOKENS, WIDTH = 400, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(tokens: int = TOKENS, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Features that correlate, with energies over two orders of magnitude."""
    return draw(tokens, width, seed=seed) @ draw(width, width, seed=seed + 1) * torch.logspace(-1, 1, width).double()


def rotation(width: int = WIDTH, seed: int = 3) -> Tensor:
    return torch.linalg.qr(draw(width, width, seed=seed)).Q


def moments_of(x: Tensor, y: Tensor) -> Moments:
    found = Moments.empty(x.shape[1], y.shape[1], x.new_empty(0))
    for start in range(0, len(x), 130):  # in batches that do not divide the tokens
        found.add(x[start : start + 130], y[start : start + 130])
    return found


class TestMoments:
    def test_they_are_the_sums_over_all_batches(self) -> None:
        x, y = uneven(), uneven(width=7, seed=9)
        found = moments_of(x, y)
        assert found.count == TOKENS
        assert found.widths == (12, 7)
        for part, wanted in (
            (found.source, x.T @ x),
            (found.target, y.T @ y),
            (found.cross, y.T @ x),
            (found.total, x.sum(0)),
        ):
            torch.testing.assert_close(part, wanted)


class TestMaps:
    def test_the_error_is_that_on_the_data(self) -> None:
        x, y = uneven(), uneven(seed=5)
        matrix = draw(WIDTH, WIDTH, seed=7)
        found = relative_error(moments_of(x, y), matrix)
        assert found == pytest.approx(float((y - x @ matrix.T).norm() / y.norm()))

    def test_procrustes_finds_a_rotation(self) -> None:
        x, turn = uneven(), rotation()
        found = procrustes(moments_of(x, x @ turn.T))
        torch.testing.assert_close(found.there, turn)
        torch.testing.assert_close(found.back, turn.T)
        assert found.error < 1e-6  # the root of float64's rounding

    def test_procrustes_leaves_alone_what_the_data_does_not_show(self) -> None:
        """Without its leaning to the identity, the unseen half would be whatever basis LAPACK returns."""
        x = uneven(width=6)
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
        turn = torch.block_diag(rotation(6), torch.eye(6, dtype=torch.float64))
        torch.testing.assert_close(procrustes(moments_of(x, x @ turn.T), 1e-9).there, turn, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("width", [8, 16])
    def test_of_other_widths_procrustes_is_semi_orthogonal(self, width: int) -> None:
        found = procrustes(moments_of(uneven(), uneven(width=width, seed=4)))
        small = min(width, WIDTH)
        product = found.there @ found.there.T if width < WIDTH else found.there.T @ found.there
        torch.testing.assert_close(product, torch.eye(small, dtype=torch.float64))

    def test_permutation_finds_one_through_noise(self) -> None:
        x, order = uneven(), torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
        noisy = x[:, order] + 0.1 * x.std(0)[order] * draw(TOKENS, WIDTH, seed=8)
        torch.testing.assert_close(permutation(moments_of(x, noisy)).there, torch.eye(WIDTH).double()[order])

    def test_least_squares_is_the_ridge_regression(self) -> None:
        x, y = uneven(), uneven(width=7, seed=5)
        found = least_squares(moments_of(x, y), 0.01)
        for inputs, outputs, matrix in ((x, y, found.there), (y, x, found.back)):
            weight = (0.01 * inputs.square().sum() / inputs.shape[1]).sqrt()
            rows = torch.cat([inputs, weight * torch.eye(inputs.shape[1]).double()])
            goal = torch.cat([outputs, torch.zeros(inputs.shape[1], outputs.shape[1]).double()])
            torch.testing.assert_close(matrix, torch.linalg.lstsq(rows, goal).solution.T)

    def test_near_identity_is_the_identity_where_nothing_is_seen_and_least_squares_elsewhere(self) -> None:
        x = uneven(width=6)
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
        change = torch.block_diag(draw(6, 6, seed=2), torch.zeros(6, 6).double())
        found = near_identity(moments_of(x, x @ change.T), 1e-9).there
        wanted = torch.block_diag(draw(6, 6, seed=2), torch.eye(6).double())
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)

    def test_near_another_map_goes_there_where_nothing_is_seen(self) -> None:
        x = torch.cat([uneven(width=6), torch.zeros(TOKENS, 6).double()], dim=1)
        prior = procrustes(moments_of(uneven(seed=30), uneven(seed=30) @ rotation().T))
        found = near(prior, moments_of(x, 2 * x @ rotation().T), 1e-9)
        torch.testing.assert_close(found.there[:, :6], 2 * rotation()[:, :6], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.there[:, 6:], rotation()[:, 6:], atol=1e-4, rtol=0)

    def test_probes_show_what_the_data_does_not(self) -> None:
        """Outputs of six inputs span six directions of twelve; the weights tell of the rest."""
        x = torch.cat([uneven(width=6), torch.zeros(TOKENS, 6).double()], dim=1)
        weight, turn = draw(WIDTH, WIDTH, seed=6), rotation()
        inputs, outputs = moments_of(x, x), moments_of(x @ weight.T, x @ weight.T @ turn.T)
        more = probed(outputs, (weight, turn @ weight), inputs, torch.eye(WIDTH).double(), 1e-3)
        torch.testing.assert_close(procrustes(more).there, turn, atol=1e-6, rtol=0)
        assert not torch.allclose(procrustes(outputs).there, turn, atol=0.1)

    @pytest.mark.parametrize("make", [identity, lambda moments: near_identity(moments, 0.1)])
    def test_the_identity_is_of_equal_widths(self, make: object) -> None:
        with pytest.raises(ValueError, match="width 12 are none of width 7"):
            make(moments_of(uneven(), uneven(width=7)))

    def test_a_ridge_below_rounding_is_refused(self) -> None:
        x = torch.cat([uneven(width=6), torch.zeros(TOKENS, 6).double()], dim=1)
        with pytest.raises(ValueError, match=r"ridge=0.0 is lost"):
            least_squares(moments_of(x, x), 0.0)


class TestChoice:
    """What is measured on tiny models, in small: each change of the features gets the map that undoes it."""

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("identity", lambda x: x),
            ("identity", lambda x: x + 0.4 * x.std(0) * draw(TOKENS, WIDTH, seed=8)),  # trained further
            ("procrustes", lambda x: x @ rotation().T),
            ("procrustes", lambda x: (x + 0.3 * x.std(0) * draw(TOKENS, WIDTH, seed=8)) @ rotation().T),
            ("permutation", lambda x: x[:, torch.arange(WIDTH).roll(5)]),
            ("near_identity", lambda x: x * torch.logspace(-0.5, 0.5, WIDTH).double()),
            ("near_procrustes", lambda x: x * torch.logspace(-0.2, 0.2, WIDTH).double() @ rotation().T),
            ("identity", lambda x: draw(TOKENS, WIDTH, seed=8)),  # another model: nothing explains it
        ],
    )
    def test_each_change_gets_its_map(self, name: str, change: object) -> None:
        x = draw(TOKENS, WIDTH)
        assert choose(moments_of(x, change(x)), 1e-6, 1.0).name == name

    def test_outputs_of_a_weight_trained_further_stay(self) -> None:
        """Least squares explains them exactly, by W′W⁻¹: no discovery."""
        x, weight = draw(TOKENS, WIDTH), draw(WIDTH, WIDTH, seed=6)
        further = weight + 0.3 * draw(WIDTH, WIDTH, seed=7)
        moments = moments_of(x @ weight.T, x @ further.T)
        assert choose(moments, 1e-6, 1.0).name == "near_identity"
        assert choose_rigid(moments, 1e-6, 1.0).name == "identity"

    def test_other_widths(self) -> None:
        x, wide = draw(TOKENS, WIDTH), draw(16, WIDTH, seed=2)
        turn = torch.linalg.qr(wide).Q
        assert choose(moments_of(x, x @ turn.T), 1e-6, 1.0).name == "procrustes"
        assert choose(moments_of(x, x @ wide.T), 1e-6, 1.0).name == "least_squares"


class TestOnData:
    """Against the normal equations, written out as one linear system."""

    @pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
    def test_output_form_is_the_minimum(self, shape: tuple[int, int]) -> None:
        weight, x = draw(*shape, seed=1), uneven(width=shape[1])
        gram = x.T @ x / TOKENS
        update = LowRank(draw(shape[0], 2, seed=2), draw(2, shape[1], seed=3))
        found = output_form(guess_of_inputs(weight, gram, 0.01), update)
        assert found.rank == 2
        y = x @ weight.T
        ridge = (0.01 * y.square().sum() / shape[0]).sqrt()
        rows = torch.cat([y, ridge * torch.eye(shape[0]).double()])
        goal = torch.cat([x @ update.tensor().T, torch.zeros(shape[0], shape[0]).double()])
        torch.testing.assert_close(found.tensor(), torch.linalg.lstsq(rows, goal).solution.T, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
    def test_input_form_is_the_minimum(self, shape: tuple[int, int]) -> None:
        """E‖(WΔ − ΔW)x‖² + λ E‖Δx‖² in the metric C⁻¹, for every x alike: (WᵀW + λC⁻¹) Δ = WᵀΔW."""
        weight, x = draw(*shape, seed=1), uneven(width=shape[1])
        gram = x.T @ x / TOKENS
        update = LowRank(draw(shape[0], 2, seed=2), draw(2, shape[1], seed=3))
        found = input_form(guess_of_inputs(weight, gram, 0.01), update)
        assert found.rank == 2
        ridge = 0.01 * (weight @ gram @ weight.T).diagonal().mean()
        system = weight.T @ weight + ridge * torch.linalg.inv(gram)
        torch.testing.assert_close(
            found.tensor(), torch.linalg.solve(system, weight.T @ update.tensor()), rtol=1e-5, atol=1e-6
        )

    def test_on_data_it_beats_the_pseudo_inverse(self) -> None:
        """A layer with fewer outputs than inputs: what W loses of the inputs, the data knows."""
        weight, x = draw(6, WIDTH, seed=1), draw(TOKENS, 3) @ draw(3, WIDTH, seed=4)
        gram = x.T @ x / TOKENS
        update = LowRank(draw(6, 2, seed=2), draw(2, WIDTH, seed=3))
        on_data = output_form(guess_of_inputs(weight, gram, 1e-9), update).before(weight)
        blind = LowRank(update.left, update.right @ torch.linalg.pinv(weight)).before(weight)
        assert error_on_data(on_data, update, gram) < 1e-3
        assert error_on_data(blind, update, gram) > 0.3

    def test_the_error_is_that_on_the_data(self) -> None:
        x = uneven()
        one, other = (LowRank(draw(5, 2, seed=s), draw(2, WIDTH, seed=s + 1)) for s in (1, 4))
        wanted = (x @ (one.tensor() - other.tensor()).T).norm() / (x @ other.tensor().T).norm()
        assert error_on_data(one, other, x.T @ x) == pytest.approx(float(wanted))
        nothing = LowRank(torch.zeros(5, 1).double(), torch.zeros(1, WIDTH).double())
        assert error_on_data(nothing, nothing, x.T @ x) == 0.0

    def test_a_constant_is_one_more_feature(self) -> None:
        x = uneven() + 1
        longer = torch.cat([x, torch.ones(TOKENS, 1).double()], dim=1)
        torch.testing.assert_close(with_constant(x.T @ x / TOKENS, x.mean(0)), longer.T @ longer / TOKENS)

    def test_a_weight_of_zeros_expresses_nothing(self) -> None:
        assert not guess_of_inputs(torch.zeros(4, 6).double(), torch.eye(6).double(), 0.1).any()
