"""Check's rules as functions of numbers, and the measures that feed them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xadapt.checking.decisions import decide
from xadapt.checking.measures import LayerMeasures, mean, mean_of_lowest
from xadapt.checking.similarity import FeatureLikeness, hsic, leading_subspaces, overlap, weight_likeness
from xadapt.checking.thresholds import Thresholds


def layer(**found: Any) -> LayerMeasures:
    return LayerMeasures(**{"source": "q", "target": "q", "relation": "same", **found})


class TestDecide:
    @pytest.mark.parametrize(
        ("found", "way"),
        [
            ({"weight_drift": 0.0}, "as it is"),
            ({"weight_drift": 0.1, "inputs_moved": 0.2, "outputs_moved": 0.2}, "as it is"),
            ({"inputs_moved": 0.0, "outputs_moved": 1.2}, "input space"),
            ({"inputs_moved": 1.2, "outputs_moved": 0.1}, "output space"),
            ({"inputs_moved": 1.2, "outputs_moved": 1.3}, "align"),
            ({"inputs_overlap": 1.0, "outputs_overlap": 0.2, "weight_cosine": 0.0}, "input space"),
            ({"inputs_overlap": 0.2, "outputs_overlap": 1.0, "weight_cosine": 0.0}, "output space"),
            ({"inputs_overlap": 0.2, "outputs_overlap": 0.2, "weight_cosine": 0.0}, "align"),
            ({"relation": "heads"}, "train"),
            ({"target": None, "relation": None, "reason": "it is gone"}, "nowhere"),
        ],
    )
    def test_the_way_of_a_layer(self, found: dict[str, Any], way: str) -> None:
        assert decide([layer(**found)]).layers[0].way == way

    def test_features_go_before_weights(self) -> None:
        found = layer(inputs_overlap=1.0, outputs_overlap=0.1, inputs_moved=0.1, outputs_moved=0.1, weight_drift=0.1)
        assert decide([found]).layers[0].way == "as it is"

    def test_cka_decides_nothing(self) -> None:
        found = {"inputs_moved": 0.0, "outputs_moved": 1.0, "weight_drift": 0.1}
        assert decide([layer(**found)]) == decide([layer(**found, inputs_cka=0.0, outputs_cka=1.0)])

    @pytest.mark.parametrize(
        ("found", "verdict"),
        [
            ([{"weight_drift": 0.1}] * 2, "carries"),
            ([{"weight_drift": 0.1}, {"inputs_moved": 0.0, "outputs_moved": 1.0}], "carries by layer"),
            ([{"inputs_moved": 0.0, "outputs_moved": 1.0}] * 2, "carries by layer"),
            ([{"weight_drift": 0.6}] * 2, "doubtful"),
            ([{"weight_drift": 0.1, "update_share": 0.1, "update_share_there": 0.3}], "doubtful"),
            ([{"weight_drift": 0.1}, {"relation": "reshaped"}], "needs data"),
            ([{"weight_drift": 0.1}] * 3 + [{"target": None}], "doubtful"),
            ([{"weight_drift": 0.1}, {"target": None}], "refused"),
        ],
    )
    def test_the_whole(self, found: list[dict[str, Any]], verdict: str) -> None:
        decision = decide([layer(**one) for one in found])
        assert decision.verdict == verdict
        assert decision.why
        assert sum(decision.ways.values()) == len(found)

    def test_thresholds_decide(self) -> None:
        found = layer(weight_drift=0.1, inputs_moved=0.2, outputs_moved=0.5)
        assert decide([found]).layers[0].way == "as it is"
        assert decide([found], Thresholds(clearly=2)).layers[0].way == "input space"

    def test_no_layer(self) -> None:
        with pytest.raises(ValueError, match="the adapter changes none"):
            decide([])

    def test_a_threshold_is_a_number(self) -> None:
        with pytest.raises(ValueError, match=r"clearly=-1.*from 0 on"):
            Thresholds(clearly=-1)


class TestMeans:
    def test_the_lowest_fifth(self) -> None:
        values = [float(value) for value in range(10)]
        assert mean_of_lowest([*values, None]) == 0.5
        assert mean(values) == 4.5
        assert mean([None]) is None

    def test_at_least_one(self) -> None:
        assert mean_of_lowest([3.0, 4.0]) == 3.0


class TestWeights:
    def test_likeness_is_that_of_the_formula(self) -> None:
        torch.manual_seed(0)
        one, other = torch.randn(300, 20), torch.randn(300, 20)
        found = weight_likeness(one.bfloat16(), other)
        one = one.bfloat16().double()
        assert found.drift == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.double().flatten(), dim=0)
        assert found.cosine == pytest.approx(float(cosine), abs=1e-6)

    def test_zeros(self) -> None:
        zeros, ones = torch.zeros(4, 4), torch.ones(4, 4)
        assert weight_likeness(zeros, zeros).drift == 0
        assert weight_likeness(zeros, ones).drift is None

    def test_the_leading_directions_are_those_of_the_svd(self) -> None:
        torch.manual_seed(0)
        u, v = torch.linalg.qr(torch.randn(80, 40)).Q, torch.linalg.qr(torch.randn(40, 40)).Q
        weight = (u * torch.logspace(2, -1, 40)) @ v.T
        left, right = leading_subspaces(weight, 6)
        assert overlap(left, u[:, :6]) == pytest.approx(1, abs=1e-4)
        assert overlap(right, v[:, :6]) == pytest.approx(1, abs=1e-4)

    def test_a_rotation_of_the_outputs_is_seen_on_that_side_alone(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(64, 64) * torch.logspace(0, -1, 64)
        turn = torch.linalg.qr(torch.randn(64, 64)).Q
        (left, right), (left_there, right_there) = leading_subspaces(weight), leading_subspaces(turn @ weight)
        assert overlap(right, right_there) == pytest.approx(1, abs=1e-3)
        assert overlap(left, left_there) < 0.5


class TestFeatures:
    def test_distance_over_batches_is_that_of_all(self) -> None:
        torch.manual_seed(0)
        one, other = torch.randn(60, 8), torch.randn(60, 8)
        found = FeatureLikeness()
        for part in range(3):
            found.add(one[20 * part : 20 * part + 20], other[20 * part : 20 * part + 20])
        assert found.distance == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-5)
        assert found.count == 60

    def test_cka_forgives_a_rotation_which_the_distance_sees(self) -> None:
        torch.manual_seed(0)
        one = torch.randn(100, 8)
        found = FeatureLikeness()
        found.add(one, one @ torch.linalg.qr(torch.randn(8, 8)).Q)
        assert found.cka == pytest.approx(1, abs=1e-6)
        assert found.distance is not None
        assert found.distance > 0.5

    def test_other_widths_have_cka_and_no_distance(self) -> None:
        torch.manual_seed(0)
        one = torch.randn(50, 8)
        found = FeatureLikeness()
        found.add(one, one[:, :4])
        assert found.distance is None
        assert found.cka is not None

    def test_hsic_is_the_estimate_of_song_et_al(self) -> None:
        torch.manual_seed(0)
        n = 6
        one, other = torch.randn(n, 3).double(), torch.randn(n, 2).double()
        k, m = (gram - torch.diag(torch.diag(gram)) for gram in (one @ one.T, other @ other.T))
        ones = torch.ones(n, dtype=torch.float64)
        wanted = torch.trace(k @ m) + ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        wanted = (wanted - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))
        assert hsic(one @ one.T, other @ other.T) == pytest.approx(float(wanted), rel=1e-9)
