"""The arithmetic of the score, on distributions that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xadapt.verifying.behaviour import Agreement, LogProbs, Predictions

EVEN, FIRST, SECOND = [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01]


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def score(source: Tensor, adapted: Tensor, target: Tensor, carried: Tensor) -> Agreement:
    sums = LogProbs()
    sums.add(source, adapted, target, carried)
    return sums.result()


class TestLogProbs:
    def test_it_is_all_for_the_adapted_source_and_nothing_for_the_bare(self) -> None:
        source, adapted = logs(EVEN, FIRST), logs(FIRST, SECOND)
        assert score(source, adapted, source, adapted).score == pytest.approx(1, abs=1e-6)
        assert score(source, adapted, source, source).score == pytest.approx(0, abs=1e-6)

    def test_half_of_the_rows_is_half(self) -> None:
        source, adapted = logs(FIRST, FIRST), logs(SECOND, SECOND)
        assert score(source, adapted, source, logs(SECOND, FIRST)).score == pytest.approx(0.5, abs=1e-6)

    def test_harm_where_the_adapter_changes_nothing_counts(self) -> None:
        source, adapted = logs(FIRST, FIRST), logs(SECOND, FIRST)
        kept, spoilt = (score(source, adapted, source, logs(SECOND, last)).score for last in (FIRST, EVEN))
        changed, spoilt_by = 0.96, 0.72  # total variations of FIRST from SECOND, and from EVEN
        assert kept == pytest.approx(1, abs=1e-6)
        assert spoilt == pytest.approx(1 - spoilt_by / changed**2, abs=1e-6)

    def test_what_the_target_says_otherwise_by_itself_is_no_harm(self) -> None:
        source, adapted, target = logs(FIRST, FIRST), logs(SECOND, FIRST), logs(FIRST, SECOND)
        assert score(source, adapted, target, logs(SECOND, SECOND)).score == pytest.approx(1, abs=1e-6)

    def test_it_is_the_same_in_parts(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(4, 12, 7, generator=generator)
        change = 3 * torch.randn(12, 7, generator=generator)
        outputs = (noise + torch.stack([0 * change, change, 0 * change, change])).log_softmax(-1)
        whole, parts = LogProbs(), LogProbs()
        whole.add(*outputs)
        for part in outputs.split(5, dim=1):
            parts.add(*part)
        one, other = whole.result(), parts.result()
        assert (one.score, one.direction, one.strength) == pytest.approx(
            (other.score, other.direction, other.strength), rel=1e-5
        )
        assert one.score > 0

    def test_rows_count_by_how_sure_the_adapted_source_is(self) -> None:
        source, adapted = logs(FIRST, FIRST), logs(SECOND, EVEN)
        missed_sure, missed_even = (
            score(source, adapted, source, logs(*rows)).score for rows in ((FIRST, EVEN), (SECOND, FIRST))
        )
        sure, even = 0.97 * 0.96**2, 0.25 * 0.72**2
        assert missed_sure == pytest.approx(even / (sure + even), abs=1e-6)
        assert missed_even == pytest.approx(sure / (sure + even), abs=1e-6)

    def test_no_row_is_below_nothing(self) -> None:
        source, adapted = logs(FIRST, FIRST), logs(SECOND, FIRST)
        assert score(source, adapted, source, logs(FIRST, SECOND)).score == 0

    def test_nothing_to_compare_with(self) -> None:
        same = logs(FIRST)
        with pytest.raises(ValueError, match="the adapter changes nothing on its own source"):
            score(same, same, same, logs(SECOND))

    def test_not_a_number(self) -> None:
        with pytest.raises(ValueError, match="NaN or infinity"):
            score(logs(FIRST), logs(SECOND), logs(FIRST), torch.full((1, 4), torch.nan))


class TestPredictions:
    def test_direction_and_strength(self) -> None:
        sums = Predictions()
        source, change = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        target = torch.ones(1, 2)
        sums.add(source, source + change, target, target + change / 2)
        found = sums.result()
        assert (found.direction, found.strength, found.score) == pytest.approx((1, 0.5, 0.5))

    @pytest.mark.parametrize(
        ("there", "score"),
        [([6.0, 8.0], 1.0), ([-3.0, -4.0], 0.0), ([0.0, 0.0], 0.0), ([4.0, -3.0], 0.0), ([10.0, 0.0], 0.6)],
        ids=["twice as strong", "backwards", "nothing", "across", "partly across"],
    )
    def test_what_points_the_right_way_counts(self, there: list[float], score: float) -> None:
        sums = Predictions()
        source, target, change = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[3.0, 4.0]])
        sums.add(source, source + change, target, target + torch.tensor([there]))
        assert sums.result().score == pytest.approx(score, abs=1e-6)

    def test_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="one vocabulary, or one latent space"):
            Predictions().add(*(torch.zeros(1, width) for width in (2, 2, 3, 3)))
