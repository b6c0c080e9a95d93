"""benchmarks/zoo: its statistics by hand, its siblings and tasks for what they claim, its rules, its results on disk."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.tiny.progress import Silent
from benchmarks.tiny.tasks import IGNORE
from benchmarks.zoo.analysis import analyse
from benchmarks.zoo.carry import AS_IT_IS, ROWS, put_on
from benchmarks.zoo.driver import plan
from benchmarks.zoo.fit import fit, grid
from benchmarks.zoo.policies import auto_or_distil
from benchmarks.zoo.results import COLUMNS, LAYER_COLUMNS, SCHEMA, Words, examples_of, read_results, write_results
from benchmarks.zoo.rules import Limits, by_check, by_trust
from benchmarks.zoo.settings import DENOISER_SIBLINGS, FULL, LM_SIBLINGS, SHORT, Halves
from benchmarks.zoo.siblings import llama, make_sibling
from benchmarks.zoo.stats import Example, always, copy_if_it_fits, over_seeds, ranks, regret, retention, spearman
from benchmarks.zoo.tasks import NEW_TASKS, OLD_TASKS, VOCABULARY, answered_by, is_scored, new_lines, old_lines
from benchmarks.zoo.trust import compare, same_answers
from benchmarks.zoo.world import in_pairs
from xadapt.checking.thresholds import Thresholds


def example(scores: dict[str, float], **options: Any) -> Example:
    free = options.pop("free", frozenset(scores) - {"bare", "auto", "distil"})
    options.setdefault("ran", frozenset(scores) - {"bare"})
    told = {"part": "lm", "seed": 0, "sibling": "rot", "task": "D", "space": "lora", **options}
    return Example(scores=scores, free=free, **told)


# ---- statistics


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
    assert trained.mean == pytest.approx((15 + 30) / 2)
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


# ---- thresholds


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
    given = {"copy": (0.6, 0.5), "aligned": (0.61, 0.7)}
    trust = {row: {"trust": score, "trust_bare": 0.3, "same": same} for row, (score, same) in given.items()}
    one = example({"bare": 0.0, "copy": 0.5, "aligned": 0.4, "distil": 1.0}, trust=trust)
    assert by_trust(one, Limits(margin=0.02)) == "copy"
    assert by_trust(one, Limits(margin=0.0)) == "aligned"
    assert by_trust(one, Limits(gain=0.5)) == "bare"
    assert by_trust(one, Limits(margin=0.02, blend=1.0)) == "aligned"
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


def test_auto_or_distil() -> None:
    scores = {"bare": 0.0, "auto": 0.5, "distil": 1.0}

    def told(auto: float, distil: float) -> Example:
        return example(scores, trust={"auto": {"trust": auto}, "distil": {"trust": distil}})

    assert auto_or_distil(told(0.95, 0.99)) == "auto"
    assert auto_or_distil(told(0.5, 0.99)) == "distil"
    assert auto_or_distil(told(0.5, 0.4)) == "auto"
    assert auto_or_distil(example(scores, trust={"distil": {"trust": 0.4}})) == "distil"


# ---- tasks


def test_new_lines_are_solved_and_parted() -> None:
    python = {
        "D": lambda d: sorted(d, reverse=True),
        "X": lambda d: [*d[::-1][1:], d[-1]],
        "T": lambda d: [d[-1], *d[:-1]],
        "I": lambda d: [(x + 1) % 10 for x in d],
    }
    assert python.keys() == NEW_TASKS.keys()
    assert not set(NEW_TASKS) & set(OLD_TASKS)
    for keyword, solve in python.items():
        for scored in (True, False):
            batch = new_lines(keyword, 50, torch.Generator().manual_seed(1), scored=scored)
            texts = ["".join(VOCABULARY[index] for index in line) for line in batch.tokens]
            for text in texts:
                digits = [int(character) for character in text[1:6]]
                assert text == f"{keyword}{''.join(map(str, digits))}>{''.join(map(str, solve(digits)))}."
            assert (is_scored(batch.tokens[:, 1:6] - VOCABULARY.index("0")) == scored).all()
            assert (batch.labels[:, :7] == IGNORE).all()
            assert torch.equal(batch.labels[:, 7:], batch.tokens[:, 7:])


def test_a_fifth_of_the_numbers_is_scored_and_no_digit_tells_which() -> None:
    digits = torch.cartesian_prod(*[torch.arange(10)] * 5)
    scored = is_scored(digits).double()
    assert scored.mean() == pytest.approx(0.2, abs=0.005)
    for place in range(5):
        for digit in range(10):
            assert scored[digits[:, place] == digit].mean() == pytest.approx(0.2, abs=0.02)


def test_answers_are_the_models_own() -> None:
    torch.manual_seed(0)
    model = llama(SHORT.lm.tiny).eval()
    asked = new_lines("D", 6, torch.Generator().manual_seed(0)).tokens
    answered = answered_by(model, asked)
    assert torch.equal(answered[:, :7], asked[:, :7])
    with torch.no_grad():
        said = model(input_ids=answered).logits.argmax(-1)
    assert torch.equal(said[:, 6:-1], answered[:, 7:])


def test_pairs_give_both_kinds_to_every_other_batch() -> None:
    old, new = ([{name: torch.tensor(index)} for index in range(4)] for name in ("old", "new"))
    mixed = in_pairs(old, new)
    assert [next(iter(one)) for one in mixed[::2]] == ["old", "new", "old", "new"]
    assert [next(iter(one)) for one in mixed[1::2]] == ["old", "new", "old", "new"]
    assert len(mixed) == 8


# ---- siblings


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    """Untrained, with norm gains that differ and large enough weights."""
    torch.manual_seed(0)
    model = llama(SHORT.lm.tiny)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(4)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=old_lines(16, torch.Generator().manual_seed(2)).tokens).logits


@pytest.mark.parametrize("name", LM_SIBLINGS)
def test_a_sibling_keeps_the_function_if_it_says_so(name: str, source: LlamaForCausalLM) -> None:
    before = copy.deepcopy(source.state_dict())
    sibling = make_sibling(name, source, SHORT.lm, 0, Silent()).eval()
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.state_dict().items())
    moved = (logits(sibling) - logits(source)).abs().max()
    if "same function" in LM_SIBLINGS[name][1]:
        assert moved < 1e-4
        assert any(not torch.equal(tensor, before[key]) for key, tensor in sibling.state_dict().items())
    else:
        assert moved > 1e-3


def test_shapes_of_siblings(source: LlamaForCausalLM) -> None:
    made = {name: make_sibling(name, source, SHORT.lm, 0, Silent()) for name in ("cut", "deeper", "wider", "narrower")}
    assert [len(made[name].model.layers) for name in ("cut", "deeper")] == [2, 5]
    assert [made[name].config.hidden_size for name in ("wider", "narrower")] == [96, 48]


def test_an_inserted_block_does_nothing_until_it_is_trained(source: LlamaForCausalLM) -> None:
    still = replace(SHORT.lm, deeper=(0, 1e-3))
    torch.testing.assert_close(logits(make_sibling("deeper", source, still, 0, Silent())), logits(source))


# ---- trust


def test_compare_is_one_for_the_same_change_and_zero_for_none() -> None:
    torch.manual_seed(0)
    plain, adapted = (torch.randn(20, 7).log_softmax(-1) for _ in range(2))
    same = compare("lm", [plain], [adapted], [plain], [adapted])
    none = compare("lm", [plain], [adapted], [plain], [plain])
    assert same.score == pytest.approx(1)
    assert same.direction == pytest.approx(1)
    assert none.score == pytest.approx(0, abs=1e-6)
    assert same_answers([adapted], [adapted]) == 1
    assert same_answers([torch.eye(4)], [torch.eye(4).flip(0)]) == 0
    with pytest.raises(ValueError, match="shapes"):
        compare("lm", [plain], [adapted], [plain], [adapted[:, :5]])


# ---- rows and results


def test_every_row_is_of_an_installed_method() -> None:
    for row in ROWS.values():
        assert any(row.takes(space) for space in AS_IT_IS), row.name
    assert ROWS["copy"].takes("input")
    assert ROWS["copy"].of("output") == "output_ada"
    assert not ROWS["pinv_input"].takes("input")
    assert not ROWS["distil"].takes("output")


def test_the_plan_has_every_sibling_and_row_once() -> None:
    cells = plan(FULL)
    assert len(set(cells)) == len(cells)
    assert {cell.sibling for cell in cells if cell.part == "lm"} == {"source", *LM_SIBLINGS}
    assert {cell.sibling for cell in cells if cell.part == "denoiser"} == {"source", *DENOISER_SIBLINGS}
    assert {"bare", "retrained", "measures", *ROWS} <= {cell.what for cell in cells}
    assert len(LM_SIBLINGS) >= 12
    assert len(FULL.lm.tasks) >= 4


def test_a_merged_adapter_with_a_bias_gives_a_layer_without_one_a_bias() -> None:
    from peft import LoraConfig, get_peft_model

    from xadapt.reading import detach

    torch.manual_seed(0)
    base = llama(SHORT.lm.tiny).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot merge it; here the layer gets a bias
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = copy.deepcopy(base.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a vector among the tensors is taken for a shard
        adapter = detach(model)
    torch.testing.assert_close(logits(put_on(base, adapter)), logits(model.eval()), rtol=1e-4, atol=1e-4)
    assert base.state_dict().keys() == before.keys()


def small_results() -> dict[str, Any]:
    def record(**told: Any) -> list[Any]:
        return [{"part": "lm", "seed": 0, "task": "D", "space": "lora", **told}.get(name) for name in COLUMNS]

    words = Words()
    figures = {
        "kept": 0.5,
        "left_out": 0,
        "trust": 0.7,
        "trust_bare": 0.1,
        "direction": 0.8,
        "strength": 1.0,
        "same": 0.9,
    }
    layer = dict.fromkeys(LAYER_COLUMNS) | {"source": "a", "target": "a", "relation": "same", "weight_drift": 0.1}
    return {
        "schema": SCHEMA,
        "preset": "full",
        "command": "python -m benchmarks.zoo full",
        "when": "now",
        "cells": {"finished": 5, "planned": 9},
        "seconds": {"lm bare": 1.0},
        "versions": {"torch": "1"},
        "hardware": {"processor": "one", "threads_used": 1},
        "git": {"revision": "f" * 40, "modified": False},
        "settings": {
            "seeds": [0],
            "lm": json.loads(json.dumps(vars(FULL.lm) | {"tiny": vars(FULL.lm.tiny)}, default=str)),
            "denoiser": json.loads(json.dumps(vars(FULL.denoiser) | {"tiny": vars(FULL.denoiser.tiny)}, default=str)),
            "halves": json.loads(json.dumps(vars(FULL.halves))),
        },
        "rows": {name: {"trains": row.trains} for name, row in ROWS.items()},
        "learning_rates": [],
        "columns": list(COLUMNS),
        "records": [
            record(sibling="source", row="bare", space="", score=0.0, kept=0.9),
            record(sibling="source", row="copy", score=0.8, kept=0.2),
            record(sibling="rot", row="bare", space="", score=0.1, kept=0.9),
            record(sibling="rot", row="copy", score=0.4, **figures),
            record(sibling="rot", row="aligned", score=0.6, **figures | {"trust": 0.8}),
            record(sibling="rot", row="lora_x", refused="no"),
            record(sibling="rot", row="auto", score=0.6, **figures | {"trust": 0.8}, chosen="aligned"),
            record(sibling="rot", row="retrained", space="", score=1.0, kept=0.3),
        ],
        "layer_columns": ["part", "seed", "sibling", "task", "space", *LAYER_COLUMNS],
        "words": words.all,
        "layers": [[words.number(value) for value in ("lm", 0, "rot", "D", "lora", *layer.values())]],
    }


def test_examples_from_records() -> None:
    (one,) = examples_of(small_results())
    assert one.scores == {"bare": 0.1, "copy": 0.4, "aligned": 0.6, "auto": 0.6}
    assert one.free == {"copy", "aligned"}
    assert one.ran == {"copy", "aligned", "auto", "lora_x"}
    assert one.home == 0.8
    assert one.score("lora_x") == 0.1  # refused: the bare target
    assert [dict(layer) for layer in one.layers] == [
        {"source": "a", "target": "a", "relation": "same", "weight_drift": 0.1}
    ]


def test_analysis_says_what_holds_and_what_does_not() -> None:
    found = analyse(small_results())
    (scores,) = found.grids
    assert scores.rows["rot"]["lora_x"].text() == "0.10*"
    assert scores.rows["rot"]["retrained"].mean == 1.0
    lines = {line.name: line for line in found.policies["lm"]}
    assert lines["copy if shapes fit"].everywhere.mean == pytest.approx(20)
    assert lines["auto"].everywhere.mean == 0
    text = "\n".join(found.sentences)
    assert "Incomplete: 5 of 9 cells" in text
    assert "mean regret 0.00 (asked: at most 1): holds" in text
    assert "ranks 2 carried adapters as their scores do with Spearman's ρ = 1.00" in text  # auto's is aligned's
    worse = small_results()
    worse["records"][6][COLUMNS.index("score")] = 0.05
    text = "\n".join(analyse(worse).sentences)
    assert "mean regret 55.00 (asked: at most 1): does not hold" in text
    assert "below bare by 5.0 at most (asked: 0.5): does not hold" in text


def test_results_are_written_whole_and_read_back(tmp_path: Path) -> None:
    results = small_results()
    paths = write_results(results, tmp_path)
    assert [path.name for path in paths] == ["full.json", "full.md", "full.html"]
    assert read_results(paths[0]) == results
    page = paths[2].read_text(encoding="utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "Incomplete: 5 of 9 cells" in paths[1].read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.html", "full.json", "full.md"]
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="not a result of the zoo"):
        read_results(tmp_path / "other.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "none.json")
