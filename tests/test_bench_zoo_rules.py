"""benchmarks/zoo: its statistics by hand, its thresholds, and the rules that choose a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.zoo.fit import fit, grid
from benchmarks.zoo.rules import Limits, by_check, by_trust
from benchmarks.zoo.settings import FULL, Halves
from benchmarks.zoo.stats import Example, always, copy_if_it_fits, over_seeds, ranks, regret, retention, spearman
from xadapt.checking.thresholds import Thresholds


def example(scores: dict[str, float], **options: Any) -> Example:
    free = options.pop("free", frozenset(scores) - {"bare", "auto", "distil"})
    options.setdefault("ran", frozenset(scores) - {"bare"})
    told = {"part": "lm", "seed": 0, "sibling": "rot", "task": "D", "space": "lora", **options}
    return Example(scores=scores, free=free, trained=frozenset({"distil"} & scores.keys()), **told)


def test_regret_is_against_the_best_free_choice_and_bare_is_one() -> None:
    first = example({"bare": 0.2, "copy": 0.5, "aligned": 0.9, "distil": 1.0, "auto": 0.85})
    second = example({"bare": 0.6, "copy": 0.4, "aligned": 0.1, "distil": 0.9}, sibling="light")  # auto refused: bare
    found = regret([first, second], always("auto"))
    assert found.mean == pytest.approx((5 + 0) / 2)
    assert found.worst == pytest.approx(5)
    assert found.worst_cell == ("lm", "seed 0", "rot", "D", "lora")
    assert found.below_bare == 0
    assert found.hurts == 0
    copied = regret([first, second], always("copy"))
    assert copied.mean == pytest.approx((40 + 20) / 2)
    assert copied.below_bare == pytest.approx(20)
    assert copied.hurts == 1
    assert copied.mean_score == pytest.approx(45)
    trained = regret([first, second], always("auto"), trained=True)
    assert trained.mean == pytest.approx((15 + 30) / 2)  # auto is no choice in hindsight: it takes one
    with pytest.raises(ValueError, match="No cell"):
        regret([], always("copy"))


def test_copy_if_it_fits_leaves_the_target_bare_where_a_layer_would_be_left_out() -> None:
    assert copy_if_it_fits(example({"bare": 0.0, "copy": 0.3}, left_out={"copy": 0})) == "copy"
    assert copy_if_it_fits(example({"bare": 0.0, "copy": 0.3}, left_out={"copy": 2})) == "bare"
    assert copy_if_it_fits(example({"bare": 0.0})) == "bare"


def test_over_seeds_averages_before_it_looks_for_the_best() -> None:
    first = example({"bare": 0.0, "copy": 0.8, "aligned": 0.4})
    second = example({"bare": 0.0, "copy": 0.4, "aligned": 0.6}, seed=1)
    assert regret([first, second], always("copy")).mean == pytest.approx(10)
    assert over_seeds([first, second], always("copy")) == [pytest.approx(0)]
    assert over_seeds([first, second], always("aligned")) == [pytest.approx(10)]


def test_spearman_by_hand() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 3, 3, 9]) == pytest.approx(1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx((4.5 / 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(ValueError, match="one length"):
        spearman([1.0], [1.0])


def test_retention_is_a_share_of_the_score_at_home() -> None:
    assert retention(0.4, 0.8) == pytest.approx(0.5)
    assert retention(0.9, 0.8) == 1
    assert retention(0.9, 0.0) == 0


@dataclass(frozen=True)
class Cut:
    at: float = 0.9


def test_fit_chooses_on_one_half_and_reports_on_the_other() -> None:
    halves = Halves(lm_siblings=("rot",), lm_tasks=("D",))

    def rule(one: Example, cut: Cut) -> str:
        return "copy" if one.trust["copy"]["trust"] >= cut.at else "bare"

    def cell(trust: float, copied: float, **where: str) -> Example:
        return example({"bare": 0.3, "copy": copied}, trust={"copy": {"trust": trust}}, **where)

    cells = [
        cell(0.6, 0.8),  # fitted: wants at <= 0.6
        cell(0.4, 0.1),  # fitted: wants at > 0.4
        cell(0.55, 0.7, sibling="light", task="X"),  # held out: copy, right
        cell(0.52, 0.2, sibling="light", task="X"),  # held out: copy, 10 points lost
        cell(0.9, 0.0, sibling="rot", task="X"),  # neither
    ]
    found = fit(cells, rule, grid(Cut(), at=(0.2, 0.5, 0.9)), halves)
    assert found.thresholds == Cut(0.5)
    assert found.tried == 3
    assert found.fitted.mean == 0
    assert found.held_out is not None
    assert found.held_out.cells == 2
    assert found.held_out.worst == pytest.approx(10)
    with pytest.raises(ValueError, match="No candidate"):
        fit(cells, rule, [], halves)
    with pytest.raises(ValueError, match="No cell"):
        fit(cells[2:], rule, [Cut()], halves)


def test_the_grid_starts_with_what_there_is() -> None:
    made = grid(Thresholds(), clearly=(2.0, 3.0), refused=(0.5,))
    assert made == [Thresholds(), Thresholds(clearly=2.0)]


def test_the_halves_share_neither_sibling_nor_task() -> None:
    halves = FULL.halves
    for part, own in (("lm", FULL.lm), ("denoiser", FULL.denoiser)):
        cells = [(sibling, task) for sibling in own.siblings for task in own.tasks]
        fitted = {cell for cell in cells if halves.fitted(part, *cell)}
        held_out = {cell for cell in cells if halves.held_out(part, *cell)}
        assert fitted
        assert held_out
        assert not {sibling for sibling, _ in fitted} & {sibling for sibling, _ in held_out}
        assert not {task for _, task in fitted} & {task for _, task in held_out}
    assert len(halves.lm_siblings) * 2 == len(FULL.lm.siblings)
    assert set(halves.lm_siblings) <= set(FULL.lm.siblings)


def test_by_trust_is_autos_choice() -> None:
    trust = {row: {"trust": score, "trust_bare": 0.1} for row, score in {"copy": 0.6, "aligned": 0.61}.items()}
    one = example({"bare": 0.0, "copy": 0.5, "aligned": 0.4, "distil": 1.0}, trust=trust)
    assert by_trust(one, Limits(margin=0.02)) == "copy"
    assert by_trust(one, Limits(margin=0.0)) == "aligned"
    assert by_trust(one, Limits(gain=0.6)) == "bare"
    assert by_trust(example({"bare": 0.0}), Limits()) == "bare"


def test_by_check_takes_what_most_layers_say() -> None:
    def layer(inputs: float, outputs: float) -> dict[str, object]:
        return {
            **{"source": "a", "target": "a", "relation": "same", "weight_drift": 0.2, "weight_cosine": 0.9},
            **{"inputs_moved": inputs, "outputs_moved": outputs},
        }

    scores = {"bare": 0.0, "copy": 0.5, "pinv_input": 0.2, "aligned": 0.3}
    assert by_check(example(scores, layers=[layer(0.2, 0.2)] * 2 + [layer(0.0, 1.4)]), Thresholds()) == "copy"
    assert by_check(example(scores, layers=[layer(0.0, 1.4)] * 2), Thresholds()) == "pinv_input"
    assert by_check(example(scores, layers=[layer(0.0, 1.4)] * 2, space="input"), Thresholds()) == "copy"
    assert by_check(example(scores, layers=[layer(1.4, 1.3)]), Thresholds()) == "aligned"
    nowhere = {"source": "a", "reason": "gone"}
    assert by_check(example(scores, layers=[nowhere]), Thresholds()) == "bare"
    assert by_check(example(scores), Thresholds()) == "bare"
