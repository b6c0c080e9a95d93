"""Projections on singular subspaces, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt.matrix import LowRank
from xadapt.truncate import Truncation
from xadapt_weight.subspaces import Subspaces, carry_both_parts, leading, overlap, project


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update_of(outputs: int, inputs: int, rank: int = 2) -> LowRank:
    return LowRank(randn(outputs, rank, seed=1), randn(rank, inputs, seed=2))


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.T


class TestLeading:
    @pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
    def test_they_are_the_svd_s(self, shape: tuple[int, int]) -> None:
        weight = randn(*shape)
        u, _, vh = torch.linalg.svd(weight)
        found = leading(weight, Truncation(rank=3))
        assert found.rank == 3
        torch.testing.assert_close(projector(found.left), projector(u[:, :3]))
        torch.testing.assert_close(projector(found.right), projector(vh[:3].T))

    def test_by_energy_there_are_as_many_as_hold_it(self) -> None:
        weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1], dtype=torch.float64))
        assert [leading(weight, Truncation(energy=energy)).rank for energy in (0.5, 0.9, 0.99, 1.0)] == [1, 2, 3, 4]

    @pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
    def test_by_energy_they_are_the_svd_s(self, shape: tuple[int, int]) -> None:
        weight = randn(*shape)
        u, _, vh = torch.linalg.svd(weight)
        found = leading(weight, Truncation(energy=0.8))
        assert 1 < found.rank < 8
        torch.testing.assert_close(projector(found.left), projector(u[:, : found.rank]))
        torch.testing.assert_close(projector(found.right), projector(vh[: found.rank].T))

    def test_a_half_precision_weight_gives_what_its_copy_does(self) -> None:
        weight = randn(40, 12).bfloat16()
        for to in (Truncation(rank=3), Truncation(energy=0.8)):
            half, single = leading(weight, to), leading(weight.float(), to)
            assert half.left.dtype == torch.float32
            torch.testing.assert_close(projector(half.right), projector(single.right))

    @pytest.mark.parametrize("to", [Truncation(rank=4), Truncation(energy=1.0)], ids=["rank", "energy"])
    def test_of_zeros_there_are_none(self, to: Truncation) -> None:
        nothing = leading(torch.zeros(8, 6), to)
        assert nothing.rank == 0
        assert project(update_of(8, 6), Subspaces(nothing.left.double(), nothing.right.double())).energy == 0

    @pytest.mark.parametrize("to", [Truncation(rank=4), Truncation(energy=1.0)], ids=["rank", "energy"])
    def test_directions_without_a_singular_value_are_left_out(self, to: Truncation) -> None:
        weight = randn(8, 2) @ randn(2, 6, seed=1)
        found = leading(weight, to)
        torch.testing.assert_close(found.left.T @ found.left, torch.eye(found.rank).double())
        assert found.rank == 2


class TestProject:
    def test_it_is_the_projection_from_both_sides(self) -> None:
        onto, update = leading(randn(8, 12), Truncation(rank=3)), update_of(8, 12)
        wanted = projector(onto.left) @ update.tensor() @ projector(onto.right)
        found = project(update, onto)
        torch.testing.assert_close(found.tensor(), wanted)
        assert found.rank == update.rank

    def test_what_lies_in_the_subspaces_stays(self) -> None:
        onto = leading(randn(8, 12), Truncation(rank=3))
        inside = LowRank(onto.left @ randn(3, 2), randn(2, 3, seed=1) @ onto.right.T)
        torch.testing.assert_close(project(inside, onto).tensor(), inside.tensor())


class TestCarryBothParts:
    def test_it_is_the_paper_s_formula(self) -> None:
        there, here = leading(randn(8, 12), Truncation(rank=3)), leading(randn(8, 12, seed=5), Truncation(rank=3))
        update = update_of(8, 12)
        delta, eye_out, eye_in = update.tensor(), torch.eye(8).double(), torch.eye(12).double()
        inside = projector(there.left) @ delta @ projector(there.right)
        outside = (eye_out - projector(there.left)) @ delta @ (eye_in - projector(there.right))
        wanted = projector(here.left) @ inside @ projector(here.right)
        wanted += (eye_out - projector(here.left)) @ outside @ (eye_in - projector(here.right))
        found = carry_both_parts(update, there, here)
        torch.testing.assert_close(found.tensor(), wanted)
        assert found.rank == 2 * update.rank

    def test_with_cross_terms_it_is_the_update_where_the_subspaces_are_the_same(self) -> None:
        there, update = leading(randn(8, 12), Truncation(rank=3)), update_of(8, 12)
        turned = Subspaces(there.left @ torch.linalg.qr(randn(3, 3)).Q, -there.right)
        found = carry_both_parts(update, there, turned, cross_terms=True)
        torch.testing.assert_close(found.tensor(), update.tensor())
        assert found.rank == update.rank

    def test_without_them_the_mixed_parts_are_lost(self) -> None:
        there = leading(randn(8, 12), Truncation(rank=3))
        outside = randn(12, 1) - projector(there.right) @ randn(12, 1)
        mixed = LowRank(there.left[:, :1], outside.T)
        assert carry_both_parts(mixed, there, there).energy == pytest.approx(0, abs=1e-20)
        found = carry_both_parts(mixed, there, there, cross_terms=True)
        torch.testing.assert_close(found.tensor(), mixed.tensor())

    def test_of_the_whole_space_it_is_the_update(self) -> None:
        there, here = leading(randn(8, 8), Truncation(rank=8)), leading(randn(8, 8, seed=5), Truncation(rank=8))
        update = update_of(8, 8)
        torch.testing.assert_close(carry_both_parts(update, there, here).tensor(), update.tensor())


def test_overlap_is_one_for_equal_and_zero_for_orthogonal_subspaces() -> None:
    eye = torch.eye(6).double()
    one, other = Subspaces(eye[:, :2], eye[:, :2]), Subspaces(eye[:, 2:4], eye[:, :2])
    assert overlap(one, one) == pytest.approx(1)
    assert overlap(one, other) == pytest.approx(0)
    assert overlap(one, Subspaces(eye[:, 1:5], eye[:, 1:5])) == pytest.approx(0.5)
