"""`xadapt.transfer`: what is written, what it says of itself, and what is refused before anything is written."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.verb_models import IDS, drifted, nothing_in, randomised, write_pair
from xadapt import InputAdaConfig
from xadapt.base import LiveBase, open_base
from xadapt.contract import Adapter, Carried, Siblings
from xadapt.origin import recorded_fingerprint
from xadapt.refused import Refused
from xadapt.siblings import Pair
from xadapt.transferring.foreseeing import foresee


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("transfer"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


class TestNotes:
    """What the numbers do not say is said in words, on the screen and in the record."""

    def test_an_adapter_without_a_fingerprint(self, work: Path, tmp_path: Path) -> None:
        stock = tmp_path / "stock"
        shutil.copytree(work / "lora", stock)
        config = json.loads((stock / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/models/qwen"}
        (stock / "adapter_config.json").write_text(json.dumps(config))
        result = xadapt.transfer(stock, work / "source", work / "target", "copy", out=tmp_path / "out")
        (note,) = result.notes
        assert note in result.summary()
        assert note.endswith("source was not tested; its config names /models/qwen.")
        assert json.loads((tmp_path / "out" / "xadapt_transfer.json").read_text())["notes"] == [note]

    def test_modules_that_are_taken_along_whole(self, work: Path, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        stock = xadapt.save(get_peft_model(make_llama(), config), tmp_path / "lora")
        result = xadapt.transfer(stock, work / "source", work / "target", "copy", out=tmp_path / "out")
        assert "lm_head.weight: taken along whole, in the place of the target's own." in result.notes

    def test_what_check_doubts(self, work: Path, tmp_path: Path) -> None:
        far = drifted(make_llama(), share=0.5)
        result = xadapt.transfer(work / "lora", work / "source", far, out=tmp_path / "out")
        assert any("check finds it doubtful: 4 of 4 layers drifted far" in note for note in result.notes)


class TestWhatIsWritten:
    def test_a_lora_loads_in_stock_peft_without_a_warning(self, work: Path, tmp_path: Path) -> None:
        result = xadapt.transfer(
            work / "lora", work / "source", work / "target", "lora_x", out=tmp_path / "out", rank=4
        )
        assert result.methods == {"lora_x": 4}
        loaded = PeftModel.from_pretrained(make_llama(), result.out)
        ours = xadapt.load(make_llama(), result.out)
        torch.testing.assert_close(logits(loaded), logits(ours))
        assert not torch.allclose(logits(loaded), logits(make_llama()))
        found = AutoPeftModelForCausalLM.from_pretrained(result.out)  # its config names the target
        torch.testing.assert_close(
            logits(found), logits(PeftModel.from_pretrained(drifted(make_llama()), result.out)), rtol=1e-4, atol=1e-5
        )

    def test_a_copy_is_the_same_adapter(self, work: Path, tmp_path: Path) -> None:
        result = xadapt.transfer(work / "lora", work / "source", work / "target", "copy", out=tmp_path / "out")
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in (work / "lora", result.out))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_what_it_says_of_itself(self, work: Path, tmp_path: Path) -> None:
        result = xadapt.transfer(
            work / "lora", work / "source", work / "target", "prolora", out=tmp_path / "out", rank=4
        )
        config = PeftConfig.from_pretrained(result.out)
        record = config.auto_mapping["xadapt_transfer"]
        assert record["method"] == "prolora"
        assert record["options"] == {"rank": 4, "energy": None, "cross_terms": False}
        assert config.base_model_name_or_path == str(work / "target") == record["target"]
        paths = {f"model.layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")}
        assert set(record["layers"]) == set(record["source_fingerprint"]) == set(record["target_fingerprint"]) == paths
        assert record["source_fingerprint"] != record["target_fingerprint"]
        assert all(0 <= found["error"] <= 1.5 for found in record["layers"].values())
        summary = json.loads((result.out / "xadapt_transfer.json").read_text())
        assert summary["layers"] == record["layers"]
        assert "relative error" in result.summary()

    def test_it_belongs_to_the_target_from_then_on(self, work: Path, tmp_path: Path) -> None:
        for adapter, method in (("lora", "copy"), ("input", "input_ada"), ("lora", "pinv_input")):
            out = tmp_path / f"{adapter}-{method}"
            xadapt.transfer(work / adapter, work / "source", work / "target", method, out=out)
            assert len(recorded_fingerprint(xadapt.read_adapter(out))) == 4
            back = tmp_path / f"{out.name}-back"
            way = "copy" if method == "copy" else "input_ada"
            xadapt.transfer(out, work / "target", work / "source", way, out=back)
            with pytest.raises(Refused, match="was not trained on"):
                xadapt.transfer(out, work / "source", work / "target", way, out=tmp_path / "never")

    def test_live_models_and_adapters(self, work: Path, tmp_path: Path) -> None:
        adapter = xadapt.read_adapter(work / "input")
        source, target = make_llama(), drifted(make_llama())
        before = logits(target)
        result = xadapt.transfer(adapter, source, target, "input_ada", out=tmp_path / "out")
        torch.testing.assert_close(logits(target), before, rtol=0, atol=0)
        assert result.target == "the live LlamaForCausalLM"
        xadapt.load(target, result.out)

    def test_other_depth_gets_the_targets_names(self, work: Path, tmp_path: Path) -> None:
        result = xadapt.transfer(work / "lora", work / "source", work / "deeper", "copy", out=tmp_path / "out")
        assert {layer.path.split(".")[2] for layer in result.layers} == {"0", "2"}
        xadapt.load(make_llama(layers=3), result.out)

    def test_neutral_inputs_beside_the_data(self, work: Path, tmp_path: Path) -> None:
        given = {"data": IDS, "neutral": IDS[:3].flip(1)}
        result = xadapt.transfer(work / "lora", make_llama(), make_llama(), "auto", out=tmp_path / "out", **given)
        assert (
            result.data
            == "token ids: 8 samples, 128 tokens; beside them, not to be judged by, token ids: 3 samples, 48 tokens"
        )
        plain = xadapt.transfer(work / "lora", make_llama(), make_llama(), "aligned", out=tmp_path / "a", data=IDS)
        assert plain.data == "token ids: 8 samples, 128 tokens"
        with pytest.raises(ValueError, match="neutral goes with data of the adapter's own kind"):
            xadapt.transfer(work / "lora", make_llama(), make_llama(), "copy", out=tmp_path / "b", neutral=IDS)
        with pytest.raises(ValueError, match="neutral: The data is empty"):
            xadapt.transfer(
                work / "lora", make_llama(), make_llama(), "aligned", out=tmp_path / "b", data=IDS, neutral=IDS[:0]
            )
        targets = {"a": make_llama(), "b": make_llama()}
        with pytest.raises(ValueError, match="neutral is an iterator"):
            xadapt.transferring.transfer.transfer_all(
                work / "lora", make_llama(), targets, out=tmp_path / "c", data=IDS, neutral=iter([{"input_ids": IDS}])
            )

    def test_several_targets(self, work: Path, tmp_path: Path) -> None:
        targets = {"one": work / "target", "two": work / "deeper", "three": make_gpt2()}
        found = xadapt.transfer_all(work / "lora", work / "source", targets, "copy", out=tmp_path)
        assert {name: type(result).__name__ for name, result in found.items()} == {
            "one": "TransferResult",
            "two": "TransferResult",
            "three": "ValueError",
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

    def test_the_adapter_itself_is_never_replaced(self, work: Path, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        shutil.copytree(work / "lora", mine)
        before = {file.name: file.read_bytes() for file in mine.iterdir()}
        for write in (
            lambda: xadapt.transfer(mine, work / "source", work / "target", "lora_x", out=mine, overwrite=True),
            lambda: xadapt.transfer(mine, work / "source", work / "target", "lora_x", out=tmp_path, overwrite=True),
            lambda: xadapt.export_lora(mine, work / "target", mine, overwrite=True),
        ):
            with pytest.raises(ValueError, match="is where the adapter itself lies, which would be lost"):
                write()
        assert {file.name: file.read_bytes() for file in mine.iterdir()} == before

    def test_an_adapter_that_is_there_is_replaced_only_when_asked(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", work / "source", work / "target")
        xadapt.transfer(*given, "copy", out=tmp_path / "out")
        with pytest.raises(ValueError, match="exists already; overwrite=True replaces an adapter"):
            xadapt.transfer(*given, "lora_x", out=tmp_path / "out")
        again = xadapt.transfer(*given, "lora_x", out=tmp_path / "out", overwrite=True)
        assert json.loads((again.out / "xadapt_transfer.json").read_text())["method"] == "lora_x"
        (tmp_path / "other").mkdir()
        with pytest.raises(ValueError, match="replaces only an adapter folder"):
            xadapt.transfer(*given, "copy", out=tmp_path / "other", overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


class TestRefusals:
    def test_another_base_than_its_own(self, work: Path, tmp_path: Path) -> None:
        given = (work / "input", work / "target", work / "source", "input_ada")
        with pytest.raises(Refused, match=r"4 of 4 layers have other weights than its fingerprint says"):
            xadapt.transfer(*given, out=tmp_path / "out")
        assert nothing_in(tmp_path)
        result = xadapt.transfer(*given, out=tmp_path / "out", trust_source=True)
        assert result.trusted
        assert "not the base that the adapter was trained on" in result.summary()

    def test_partial_coverage(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", work / "source", make_llama(layers=1), "copy")
        with pytest.raises(Refused, match=r"(?s)2 of the adapter's layers cannot be carried.*partial=True"):
            xadapt.transfer(*given, out=tmp_path / "out")
        assert nothing_in(tmp_path)
        result = xadapt.transfer(*given, out=tmp_path / "out", partial=True)
        assert len(result.left_out) == 2
        assert len(result.layers) == 2
        xadapt.load(make_llama(layers=1), result.out)

    def test_another_architecture(self, work: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="None of the adapter's 4 layers can be carried"):
            xadapt.transfer(work / "lora", work / "source", make_gpt2(), "copy", out=tmp_path / "out")
        assert nothing_in(tmp_path)

    def test_a_kind_that_the_method_does_not_read(self, work: Path, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"'copy' reads lora, .* kind 'input_ada'\. Methods that read it: .*input_ada"
        ):
            xadapt.transfer(work / "input", work / "source", work / "target", "copy", out=tmp_path / "out")

    def test_names_that_do_not_exist(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", work / "source", work / "target")
        with pytest.raises(ValueError, match=r"No method is called 'copi'\. Did you mean 'copy'"):
            xadapt.transfer(*given, "copi", out=tmp_path / "out")
        with pytest.raises(TypeError, match=r"'lora_x' has no option 'ranks'\. Did you mean 'rank'"):
            xadapt.transfer(*given, "lora_x", out=tmp_path / "out", ranks=3)
        with pytest.raises(
            TypeError, match=r"'copy' has no option 'ridge'\. aligned, .* have it: method='aligned', for"
        ):
            xadapt.transfer(*given, "copy", out=tmp_path / "out", ridge=0.1)
        with pytest.raises(ValueError, match="needs no data"):
            xadapt.transfer(*given, "copy", out=tmp_path / "out", data=IDS)
        with pytest.raises(ValueError, match="needs no data"):
            xadapt.plan_transfer(*given, "copy", out=tmp_path / "out", data=IDS)
        assert nothing_in(tmp_path)

    def test_an_interrupted_write_leaves_nothing(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*given: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("xadapt.transferring.writing.save_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "copy", out=tmp_path / "out")
        assert nothing_in(tmp_path)

    def test_an_interrupted_transfer_goes_on_where_it_stopped(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import xadapt_weight.conversion as conversion

        original, calls = conversion.project, []

        def interrupted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(conversion, "project", interrupted)
        with pytest.raises(KeyboardInterrupt):
            xadapt.transfer(work / "lora", work / "source", work / "target", "lora_x", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert len(list((tmp_path / ".out.layers").iterdir())) == 2
        result = xadapt.transfer(work / "lora", work / "source", work / "target", "lora_x", out=tmp_path / "out")
        assert len(calls) == 3 + len(result.layers) - 2
        assert not (tmp_path / ".out.layers").exists()
        monkeypatch.setattr(conversion, "project", original)
        whole = xadapt.transfer(work / "lora", work / "source", work / "target", "lora_x", out=tmp_path / "whole")
        assert [layer.evidence for layer in whole.layers] == [layer.evidence for layer in result.layers]

    def test_a_transfer_that_failed_leaves_no_layers_behind(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import xadapt_weight.conversion as conversion

        def broken(*_: Any) -> Any:
            raise ValueError("no")

        monkeypatch.setattr(conversion, "relative_error", broken)
        with pytest.raises(ValueError, match="no"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "lora_x", out=tmp_path / "out")
        assert not list(tmp_path.iterdir())


class TestPlan:
    def test_it_writes_nothing_and_says_how_large(self, work: Path, tmp_path: Path) -> None:
        plan = xadapt.plan_transfer(
            work / "lora", work / "source", work / "deeper", "prolora", out=tmp_path / "out", rank=3
        )
        assert nothing_in(tmp_path)
        assert plan.options["rank"] == 3
        assert not plan.learns
        assert [layer.relation for layer in plan.layers] == ["aligned"] * 4
        assert plan.weight_bytes == 2 * 2 * 4 * (32 * 32 + 16 * 32)
        tensors = load_file(work / "lora" / "adapter_model.safetensors").values()
        assert plan.adapter_bytes == sum(tensor.nbytes for tensor in tensors)

    def test_a_layer_without_a_place_is_in_it(self, work: Path, tmp_path: Path) -> None:
        plan = xadapt.plan_transfer(work / "lora", work / "source", make_llama(layers=1), "copy", out=tmp_path / "out")
        assert sum(layer.target is None for layer in plan.layers) == 2

    @pytest.mark.parametrize("method", ["copy", "auto", "pinv_input", "lora_x"])
    def test_other_widths_are_refused_in_the_transfers_words(self, work: Path, tmp_path: Path, method: str) -> None:
        given = (work / "lora", make_llama(), make_llama(hidden_size=64), method)
        plan = xadapt.plan_transfer(*given, out=tmp_path / "out")
        with pytest.raises(ValueError, match="widths") as refused:
            xadapt.transfer(*given, out=tmp_path / "out")
        assert plan.refused == str(refused.value)
        assert plan.untested is None

    @pytest.mark.parametrize("method", ["copy", "lora_x"])
    def test_whole_modules_that_the_target_lacks(self, tmp_path: Path, method: str) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = xadapt.save(randomised(get_peft_model(make_llama(), config)), tmp_path / "saved")
        given = (adapter, make_llama(), make_llama().model, method)
        plan = xadapt.plan_transfer(*given, out=tmp_path / "out")
        with pytest.raises(ValueError, match="modules_to_save") as refused:
            xadapt.transfer(*given, out=tmp_path / "out")
        assert plan.refused == str(refused.value)
        there = xadapt.plan_transfer(adapter, make_llama(), make_llama(seed=1), "copy", out=tmp_path / "out")
        assert there.refused is None

    def test_without_the_source_that_the_method_needs(self, work: Path, tmp_path: Path) -> None:
        plan = xadapt.plan_transfer(work / "lora", None, make_llama(), "copy", out=tmp_path / "out")
        assert plan.refused is not None
        assert "pass source=…" in plan.refused

    def test_what_goes_through_is_not_refused(self, work: Path, tmp_path: Path) -> None:
        pair = (make_llama(), drifted(make_llama()))
        seen = xadapt.plan_transfer(work / "lora", *pair, "copy", out=tmp_path / "out")
        assert (seen.refused, seen.untested) == (None, None)
        for method in ("pinv_input", "lora_x", "prolora", "auto"):
            plan = xadapt.plan_transfer(work / "lora", *pair, method, out=tmp_path / "out")
            assert plan.refused is None
            assert plan.untested == f"what {method} makes of the weights, which a plan does not read"

    def test_a_method_that_trains_may_do_without_a_layer(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", make_llama(), make_llama(layers=1), "distil")
        plan = xadapt.plan_transfer(*given, out=tmp_path / "out", data=IDS, steps=1)
        assert plan.refused is None
        assert plan.untested is not None
        assert "learns from the data" in plan.untested
        assert "2 layers without a counterpart" in plan.untested
        assert xadapt.transfer(*given, out=tmp_path / "out", data=IDS, steps=1).layers

    def test_a_tied_adapter_joins_fewer_blocks(self, tmp_path: Path) -> None:
        config = InputAdaConfig(r=2, target_modules=["q_proj"], tie=r"self_attn\.q_proj$")
        adapter = xadapt.save(randomised(get_peft_model(make_llama(layers=3), config)), tmp_path / "tied")
        given = (adapter, make_llama(layers=3), make_llama(layers=2), "input_ada")
        plan = xadapt.plan_transfer(*given, out=tmp_path / "out")
        assert any(layer.target is None for layer in plan.layers)
        assert plan.refused is None
        xadapt.transfer(*given, out=tmp_path / "out")

    def test_no_weight_is_read_for_it(self, work: Path, tmp_path: Path) -> None:
        pair = (_Shut(make_llama()), _Shut(drifted(make_llama())))
        for method in ("copy", "pinv_input", "lora_x", "auto"):
            assert xadapt.plan_transfer(work / "lora", *pair, method, out=tmp_path / "out").refused is None

    def test_what_a_method_says_without_the_weights_it_wanted_is_not_told(self, work: Path) -> None:
        bases = Pair(open_base(make_llama()), open_base(make_llama()))
        adapter = xadapt.read_adapter(work / "lora")
        for step in (_Stubborn(), _Stubborn("it failed")):
            found = foresee(step, "stubborn", adapter, bases, (), False)
            assert found.refused is None
            assert found.untested is not None


class _Shut(LiveBase):
    """A base whose weights must not be read."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        return dict.fromkeys(super().weights(), torch.empty(0))  # with which nothing can be calculated


class _Stubborn:
    """A method that goes on, whatever befalls it."""

    def __init__(self, complaint: str = "") -> None:
        self.complaint = complaint

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        with contextlib.suppress(BaseException):
            bases.target.weights()["lm_head.weight"]
        if self.complaint:
            raise ValueError(self.complaint)
        return Carried(adapter=adapter, left_out={"a": "b"})
