"""auto: what is chosen, on what evidence, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import xadapt
from benchmarks.tiny.siblings import reparam, rot
from tests.aligned_models import square_llama
from tests.conftest import make_llama
from tests.test_every_method import assert_same, randomise
from tests.test_registry import write_distribution
from tests.verb_models import drifted, randomised, rotated_values
from tests.weight_models import lora_on, updates_on
from xadapt.base import open_base
from xadapt.contract import Adapter, Carried, Learner, Transfer
from xadapt.data.counting import anything_counts, with_neutral
from xadapt.reading import detach
from xadapt.refused import Refused
from xadapt.siblings import Pair
from xadapt.transferring.writing import write_folder
from xadapt.verifying.behaviour import Agreement
from xadapt.wearing import wearing
from xadapt_auto import AUTO
from xadapt_auto.choosing import choose
from xadapt_auto.halving import batches_in_one, halves
from xadapt_feature import OUTPUT_ADA

Logits = Callable[[nn.Module], Tensor]


def output_adapter() -> Adapter:
    kind = OUTPUT_ADA.writes
    config = kind.config()(r=2, target_modules=["q_proj", "v_proj"])
    model = make_llama()
    kind.attach(model, config)
    randomise(kind.tensors(model).values())
    return Adapter(kind=kind, config=config, tensors={n: t.detach().clone() for n, t in kind.tensors(model).items()})


def some_batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 64, (8, 12), generator=generator)} for _ in range(count)]


def rotated() -> nn.Module:
    return rot(make_llama(), torch.Generator().manual_seed(2))


def decide(adapter: Adapter, target: nn.Module, **options: Any) -> Carried:
    bases = Pair(open_base(make_llama()), open_base(target))
    return AUTO.build(**options).fit(adapter, bases, some_batches()).transfer(adapter, bases)


class TestWithData:
    def test_it_learns_and_transfers(self) -> None:
        assert isinstance(AUTO.build(), Learner)
        assert isinstance(AUTO.build(), Transfer)

    def test_on_an_equal_base_the_adapter_stays_as_it_is(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        carried = decide(adapter, make_llama())
        assert_same(carried.adapter.tensors, adapter.tensors)
        assert {told["method"] for told in carried.evidence.values()} == {"copy"}
        assert carried.considered["copy"]["score"] == pytest.approx(1.0, abs=1e-5)
        assert carried.considered["bare"]["score"] < 0.9
        assert "chosen" in carried.considered["copy"]

    def test_an_output_adapter_goes_over_a_rotated_residual_stream(self, logits: Logits) -> None:
        """As a LoRA made with the target's own weights, so it does there what it did at home; a copy's would not."""
        adapter = output_adapter()
        target = rotated()
        carried = decide(adapter, target)
        assert carried.adapter.kind.name == "lora"
        assert {told["method"] for told in carried.evidence.values()} == {"output_ada"}
        assert carried.considered["output_ada"]["score"] == pytest.approx(1.0, abs=1e-3)
        with wearing(make_llama(), adapter) as here, wearing(target, carried.adapter) as there:
            torch.testing.assert_close(logits(there), logits(here), rtol=1e-3, atol=1e-3)

    def test_a_lora_goes_over_it_by_alignment(self) -> None:
        carried = decide(lora_on(make_llama(), ["q_proj", "v_proj"]), rotated())
        assert carried.considered["copy"]["score"] < 0.9
        assert {told["method"] for told in carried.evidence.values()} == {"aligned"}
        assert carried.considered["aligned"]["score"] > 0.98

    def test_a_model_of_its_own_is_refused_with_the_table(self) -> None:
        with pytest.raises(
            Refused, match=r"less than 0\.05 is gained\.\n(.*\n)*  copy: score .*\n(.*\n)*.*--allow-training"
        ):
            decide(lora_on(make_llama(), ["q_proj"]), make_llama(seed=1))

    def test_a_target_that_has_it_already_is_refused(self) -> None:
        """A second dose would look like the adapter's work."""
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        merged = make_llama()
        with torch.no_grad():
            for path, update in updates_on(adapter, merged).items():
                merged.get_submodule(path).weight.add_(update)
        with pytest.raises(Refused, match="the adapter was merged into it, and would count twice"):
            decide(adapter, merged)

    def test_a_dora_is_copied_whole(self) -> None:
        """What it adds has full rank, so it is in no mixture, and no other method takes it apart."""
        config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        adapter = detach(randomised(get_peft_model(make_llama(), config)))
        carried = decide(adapter, make_llama())
        assert_same(carried.adapter.tensors, adapter.tensors)
        assert carried.considered["copy"]["score"] == pytest.approx(1.0, abs=1e-5)
        assert {told["method"] for told in carried.evidence.values()} == {"copy"}

    def test_training_is_a_way_out(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        carried = decide(
            adapter, rotated(), candidates="copy", allow_training=True, training_steps=60, training_lr=0.02
        )
        assert {told["method"] for told in carried.evidence.values()} == {"distil"}
        assert carried.considered["distil"]["score"] > carried.considered["copy"]["score"]

    def test_what_trains_is_judged_on_one_half_and_trained_again_on_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half of each batch, so that two of them make a step of as many samples as the user's batches have."""
        from xadapt_distil.methods import Distil

        seen, fit = [], Distil.fit

        def watched(self: Distil, adapter: Adapter, bases: Pair, batches: Any) -> Any:
            seen.append((len(batches), len(batches[0]["input_ids"]), self.gradient_accumulation_steps, self.steps))
            return fit(self, adapter, bases, batches)

        monkeypatch.setattr(Distil, "fit", watched)
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        decide(adapter, rotated(), candidates="copy", allow_training=True, training_steps=40, training_lr=0.02)
        assert seen == [(4, 4, 2, 40), (4, 8, 1, 40)]

    def test_neither_base_nor_adapter_is_changed(self) -> None:
        source, target, adapter = make_llama(), rotated(), output_adapter()
        kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
        weights = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (source, target)]
        AUTO.build().fit(adapter, Pair(open_base(source), open_base(target)), some_batches())
        assert_same(adapter.tensors, kept)
        for model, before in zip((source, target), weights, strict=True):
            assert_same(model.state_dict(), before)

    def test_the_decision_is_for_one_adapter(self) -> None:
        bases = Pair(open_base(make_llama()), open_base(make_llama()))
        decided = AUTO.build(candidates="copy").fit(lora_on(make_llama(), ["q_proj"]), bases, some_batches())
        with pytest.raises(ValueError, match="another adapter"):
            decided.transfer(lora_on(make_llama(), ["v_proj"]), bases)

    def test_prompts_are_continued_by_the_adapted_source(self) -> None:
        carried = decide(
            lora_on(make_llama(), ["q_proj", "v_proj"]), make_llama(), continue_tokens=3, candidates="copy"
        )
        assert carried.considered["copy"]["score"] == pytest.approx(1.0, abs=1e-5)

    def test_what_does_not_count_is_not_judged_by(self) -> None:
        adapter, batches = lora_on(make_llama(), ["q_proj", "v_proj"]), some_batches()
        bases = Pair(open_base(make_llama()), open_base(drifted(make_llama())))
        neutral = [{"input_ids": batch["input_ids"].flip(1)} for batch in batches]
        step = AUTO.build(candidates="copy", gain=0)
        one, other, all_of_it = (
            step.fit(adapter, bases, given).transfer(adapter, bases).considered["copy"]
            for given in (batches, with_neutral(batches, neutral), [*batches, *neutral])
        )
        assert one == other
        assert one != all_of_it

    def test_no_data_is_said(self) -> None:
        bases = Pair(open_base(make_llama()), open_base(make_llama()))
        with pytest.raises(ValueError, match="The data is empty"):
            AUTO.build().fit(lora_on(make_llama(), ["q_proj"]), bases, [])


class TestWithoutData:
    def test_on_an_equal_base_the_adapter_stays_as_it_is(self, tmp_path: Path, logits: Logits) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        bases = Pair(open_base(make_llama()), open_base(make_llama()))
        carried = AUTO.build().transfer(adapter, bases)
        assert_same(carried.adapter.tensors, adapter.tensors)
        assert all(told["way"] == "as it is" and told["why"] for told in carried.evidence.values())
        write_folder(carried.adapter, tmp_path, bases.target)
        stock = PeftModel.from_pretrained(make_llama(), tmp_path)
        with wearing(make_llama(), adapter) as worn:
            torch.testing.assert_close(logits(stock), logits(worn))

    def test_an_output_adapter_is_made_a_lora_of_the_target(self) -> None:
        adapter, target = output_adapter(), make_llama()
        with torch.no_grad():  # a small drift
            for parameter in target.parameters():
                parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        carried = AUTO.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target)))
        assert carried.adapter.kind.name == "lora"
        found, wanted = updates_on(carried.adapter, target), updates_on(adapter, target)
        for path, update in wanted.items():
            torch.testing.assert_close(found[path], update, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("targets", [["v_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]])
    def test_of_several_methods_each_writes_its_own_layers(self, targets: list[str], tmp_path: Path) -> None:
        """On disk too, where finished layers are kept to be resumed from."""
        source, target = square_llama(), reparam(square_llama(), torch.Generator().manual_seed(3))
        adapter = lora_on(square_llama(), targets)
        result = xadapt.transfer(adapter, source, target, out=tmp_path / "auto")
        assert {"pinv_input", "pinv_output"} <= set(result.methods)
        found = updates_on(xadapt.read_adapter(tmp_path / "auto"), target)
        for method in result.methods:
            xadapt.transfer(adapter, source, target, method, out=tmp_path / method)
            wanted = updates_on(xadapt.read_adapter(tmp_path / method), target)
            for layer in result.layers:
                if layer.method == method:
                    torch.testing.assert_close(found[layer.path], wanted[layer.path], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("option", [{"allow_training": True}, {"gain": 0.9}, {"continue_tokens": 3}])
    def test_what_only_data_can_be_used_for_is_not_ignored(self, option: dict[str, Any]) -> None:
        bases = Pair(open_base(make_llama()), open_base(make_llama()))
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*needs data.* pass data="):
            AUTO.build(**option).transfer(lora_on(make_llama(), ["q_proj"]), bases)

    def test_a_model_of_its_own_is_refused(self) -> None:
        bases = Pair(open_base(make_llama()), open_base(make_llama(seed=1)))
        with pytest.raises(Refused, match=r"other bases or widths.*data="):
            AUTO.build().transfer(lora_on(make_llama(), ["q_proj"]), bases)


class TestTheHalves:
    def test_each_has_samples_of_every_batch(self) -> None:
        batches = [
            {"input_ids": torch.arange(6).view(3, 2), "more": {"mask": torch.ones(3)}, "flag": 1},
            {"input_ids": torch.zeros(2, 2)},
        ]
        fitting, judging = halves(batches)
        assert fitting[0]["input_ids"].tolist() == [[0, 1], [4, 5]]
        assert judging[0]["input_ids"].tolist() == [[2, 3]]
        assert [len(half[0]["more"]["mask"]) for half in (fitting, judging)] == [2, 1]
        assert judging[0]["flag"] == 1
        assert [len(half[1]["input_ids"]) for half in (fitting, judging)] == [1, 1]

    def test_batches_of_one_sample_stay_whole(self) -> None:
        batches = [{"input_ids": torch.full((1, 2), number)} for number in range(3)]
        fitting, judging = halves(batches)
        assert [int(batch["input_ids"][0, 0]) for batch in fitting] == [0, 2]
        assert [int(batch["input_ids"][0, 0]) for batch in judging] == [1]
        assert halves(batches[:1]) == (batches[:1], batches[:1])

    @pytest.mark.parametrize("neutral", [1, 2, 3])
    def test_something_counts_in_both_whatever_lies_beside_it(self, neutral: int) -> None:
        one_sample = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
        for data in ([one_sample], [{"input_ids": torch.ones(5, 2, dtype=torch.long)}]):
            for half in halves(with_neutral(data, [one_sample] * neutral)):
                assert any(anything_counts(batch) for batch in half)

    def test_rows_that_count_lie_in_both_where_they_take_turns(self) -> None:
        ids = torch.arange(16).view(8, 2)
        labels = torch.where(torch.arange(8)[:, None] % 2 == 0, ids, -100)
        for half in halves([{"input_ids": ids, "labels": labels}]):
            assert (half[0]["labels"] != -100).any(1).sum() == 2
            assert len(half[0]["input_ids"]) == 4


def test_of_batches_halved_by_the_sample_two_make_one() -> None:
    given = some_batches(3)
    learning, _ = halves(given)
    assert batches_in_one(given, learning) == 2
    assert batches_in_one(given, given[::2]) == 1
    assert batches_in_one([{"timestep": torch.tensor(1.0)}] * 2, [{"timestep": torch.tensor(1.0)}]) == 1


class TestAMixtureByLayer:
    """The values' basis changed, the queries' did not: copied queries beside aligned values."""

    TARGETS = ("q_proj", "v_proj")

    def test_a_tie_is_no_reason_for_one(self) -> None:
        carried = decide(lora_on(make_llama(), self.TARGETS), rotated_values(make_llama()), candidates="copy, aligned")
        assert carried.considered["by layer"]["score"] == pytest.approx(carried.considered["aligned"]["score"])
        assert {told["method"] for told in carried.evidence.values()} == {"aligned"}

    @pytest.mark.parametrize(("score", "wins"), [(0.905, False), (0.915, True)])
    def test_it_has_to_be_better_by_more_than_the_margin(
        self, score: float, wins: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = {"copy": 0.1, "aligned": 0.9, "by layer": score}

        def scores(adapter: Adapter, bases: Pair, candidates: dict[str, Any], batches: Any) -> dict[str, Agreement]:
            return {name: Agreement(told[name], 1.0, told[name], 1) for name in candidates}

        monkeypatch.setattr("xadapt_auto.by_behaviour.scores", scores)
        adapter = lora_on(make_llama(), self.TARGETS)
        carried = decide(adapter, rotated_values(make_llama()), candidates="copy, aligned", margin=0.01)
        methods = {path.rsplit(".", 1)[1]: one["method"] for path, one in carried.evidence.items()}
        assert methods == ({"q_proj": "copy", "v_proj": "aligned"} if wins else dict.fromkeys(self.TARGETS, "aligned"))


class TestThePolicy:
    def choice(self, scores: dict[str, float], **options: float) -> str | None:
        return choose(scores, lead={"copy": 0.02, "distil": 0.03}, **{"bare": 0.1, "gain": 0.05, **options}).name

    def test_the_best_is_taken(self) -> None:
        assert self.choice({"copy": 0.5, "aligned": 0.9}) == "aligned"

    def test_ties_leave_the_adapter_as_it_is(self) -> None:
        assert self.choice({"aligned": 0.515, "copy": 0.5}) == "copy"

    def test_of_two_with_a_lead_the_larger_counts(self) -> None:
        assert self.choice({"copy": 0.5, "distil": 0.495}) == "distil"
        assert self.choice({"copy": 0.5, "distil": 0.48}) == "copy"
        assert self.choice({"aligned": 0.525, "distil": 0.5}) == "distil"

    def test_what_gains_enough_is_not_refused_for_what_has_a_lead(self) -> None:
        assert self.choice({"aligned": 0.16, "distil": 0.145}) == "aligned"

    def test_a_lead_gains_nothing(self) -> None:
        assert self.choice({"copy": 0.14}, gain=0.05) is None

    def test_what_gains_nothing_is_refused(self) -> None:
        assert self.choice({"copy": 0.14, "aligned": 0.12}) is None
        assert self.choice({"copy": 0.14}, gain=0.03) == "copy"
        assert self.choice({}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "margin=-0.1: agreement is measured from 0 to 1"),
        ({"gain": 2}, "gain=2"),
        ({"continue_tokens": -1}, "continue_tokens=-1: a whole number from 0 on"),
        ({"training_steps": 0}, "training_steps=0: a whole number from 1 on"),
        ({"training_lr": 0.0}, r"training_lr=0\.0: a learning rate is above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AUTO.build(**options)


def test_unknown_candidates_are_named() -> None:
    bases = Pair(open_base(make_llama()), open_base(make_llama()))
    adapter = lora_on(make_llama(), ["q_proj"])
    with pytest.raises(ValueError, match=r"candidates names 'copi'\. Did you mean 'copy'"):
        AUTO.build(candidates="copi").transfer(adapter, bases)
    with pytest.raises(ValueError, match=r"None of the candidates input_ada reads adapters of kind 'lora'"):
        AUTO.build(candidates="input_ada").fit(adapter, bases, some_batches())


BROKEN = """
from xadapt.contract import Method
from xadapt_weight import COPY

class Breaks:
    def transfer(self, adapter, bases):
        raise KeyError("q_proj")

METHOD = Method(name="breaks", summary="", paper="", reads=(COPY.writes,), writes=COPY.writes, build=Breaks)
"""


def test_a_candidate_that_breaks_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_distribution(tmp_path, "plugin-that-breaks", "breaks", BROKEN)
    with pytest.warns(UserWarning, match=r"auto goes on without breaks, which failed with KeyError: 'q_proj'"):
        carried = decide(lora_on(make_llama(), ["q_proj"]), make_llama(), candidates="copy, breaks")
    assert "chosen" in carried.considered["copy"]
    assert carried.considered["breaks"] == {"cannot": "KeyError: 'q_proj'"}
