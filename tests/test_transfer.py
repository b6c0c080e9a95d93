"""`xadapt.transfer`: what is written, what it says of itself, and what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.verb_models import IDS, drifted, input_folder, lora_folder
from xadapt import registry
from xadapt.cli import main
from xadapt.contract import Adapter, Carried, Method, Siblings
from xadapt.kinds import FileKind
from xadapt.origin import recorded_fingerprint
from xadapt.refused import Refused
from xadapt_weight import COPY, LORA_X

LORA = COPY.writes


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("transfer")
    source = make_llama()
    source.save_pretrained(work / "source")
    drifted(source).save_pretrained(work / "target")
    make_llama(seed=9, layers=3).save_pretrained(work / "deeper")
    lora_folder(work / "lora")
    input_folder(work / "input")
    return work


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


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

    def test_several_targets(self, work: Path, tmp_path: Path) -> None:
        targets = {"one": work / "target", "two": work / "deeper", "three": make_gpt2()}
        found = xadapt.transfer_all(work / "lora", work / "source", targets, "copy", out=tmp_path)
        assert {name: type(result).__name__ for name, result in found.items()} == {
            "one": "TransferResult",
            "two": "TransferResult",
            "three": "ValueError",
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

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
        with pytest.raises(ValueError, match="needs no data"):
            xadapt.transfer(*given, "copy", out=tmp_path / "out", data=IDS)
        assert nothing_in(tmp_path)

    def test_a_result_that_is_not_finite(self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(monkeypatch, replace(COPY, name="broken", build=Broken))
        with pytest.raises(ValueError, match="The carried adapter holds NaN or infinity in 1 of 8 tensors"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "broken", out=tmp_path / "out")
        assert nothing_in(tmp_path)

    def test_a_result_that_does_not_load(self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _install(monkeypatch, replace(COPY, name="broken", build=Misshapen))
        with pytest.raises(ValueError, match="trained on a base of other widths"):
            xadapt.transfer(work / "lora", work / "source", work / "target", "broken", out=tmp_path / "out")
        assert nothing_in(tmp_path)

    def test_an_interrupted_write_leaves_nothing(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*given: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("xadapt.transferring.writing.save_file", full)
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


class TestLearners:
    def test_it_gets_batches_and_may_be_given_none(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _install(monkeypatch, replace(COPY, name="learner", build=Learning))
        given = (work / "lora", work / "source", work / "target", "learner")
        with pytest.raises(ValueError, match=r"'learner' learns from data: pass data=… \(--data\)"):
            xadapt.transfer(*given, out=tmp_path / "out")
        result = xadapt.transfer(*given, out=tmp_path / "out", data=IDS, seed=7)
        assert result.options["seed"] == 7
        assert all(layer.evidence == {"batches": 1.0, "method": "copied"} for layer in result.layers)
        assert result.methods == {"copied": 4}
        assert result.data == "token ids: 8 samples, 128 tokens"

    def test_one_that_can_do_without_data_does(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _install(monkeypatch, replace(COPY, name="either", build=Either))
        given = (work / "lora", work / "source", work / "target", "either")
        assert xadapt.transfer(*given, out=tmp_path / "one").layers[0].evidence == {}
        assert xadapt.transfer(*given, out=tmp_path / "two", data=IDS).layers[0].evidence["batches"] == 1


class TestFormatsOfTheirOwn:
    def test_a_file_kind_is_read_and_written_through_itself(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = Method(name="scale", summary="doubled", paper="none", reads=(VECTOR,), writes=VECTOR, build=Doubled)
        _install(monkeypatch, method)
        save_file({"vector": torch.ones(3)}, tmp_path / "mine.vector")
        result = xadapt.transfer(
            tmp_path / "mine.vector", work / "source", work / "target", "scale", out=tmp_path / "out"
        )
        torch.testing.assert_close(load_file(result.out / "adapter.vector")["vector"], 2 * torch.ones(3))
        assert (result.out / "xadapt_transfer.json").is_file()
        assert result.written == "vector"


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


class TestCommandLine:
    def given(self, work: Path, adapter: str = "lora", target: str = "target") -> list[str]:
        return ["transfer", str(work / adapter), "--source", str(work / "source"), "--target", str(work / target)]

    def test_options_of_the_method(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        asked = [
            *self.given(work),
            "--method",
            "prolora",
            "--rank",
            "4",
            "--cross-terms",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*asked, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["options"] == {"rank": 4, "energy": None, "cross_terms": True}
        assert (tmp_path / "out" / "adapter_config.json").is_file()

    def test_help_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["transfer", "--method", "pinv_input", "--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "options of the method pinv_input" in out
        assert "--ridge FLOAT" in out
        assert "mean squared singular value" in " ".join(out.split())

    def test_exit_codes(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        partial = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--method", "copy"]
        partial += ["--target", str(tmp_path / "shallow"), "--out", str(tmp_path / "out")]
        assert main(partial) == 3
        assert "--partial" in capsys.readouterr().err
        assert main([*partial, "--partial"]) == 0
        assert main([*self.given(work), "--method", "no_such", "--out", str(tmp_path / "other")]) == 2
        with pytest.raises(SystemExit) as ended:
            main([*self.given(work), "--method", "copy", "--rank", "3", "--out", str(tmp_path / "other")])
        assert ended.value.code == 2

    def test_a_hub_that_cannot_be_reached(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(name: str, **options: Any) -> str:
            raise ConnectionError("Network is unreachable")

        monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
        given = ["transfer", str(work / "lora"), "--source", str(work / "source"), "--target", "nobody/nothing"]
        assert main([*given, "--method", "copy", "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert "nobody/nothing" in told
        assert "Network is unreachable" in told
        assert nothing_in(tmp_path)

    def test_plan(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*self.given(work), "--method", "copy", "--out", str(tmp_path / "out"), "--plan"]) == 0
        assert "A plan: nothing is written." in capsys.readouterr().out
        assert nothing_in(tmp_path)

    def test_several_targets_where_one_is_refused(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        asked = [
            *self.given(work),
            "--target",
            str(tmp_path / "shallow"),
            "--method",
            "copy",
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*asked, "--json"]) == 3
        told = json.loads(capsys.readouterr().out)
        assert [row.get("refused") for row in told] == [None, True]
        assert told[0]["adapter"] == str(work / "lora")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["target"]


def _install(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """The method beside those that are installed, as its entry point would put it there."""
    get, load_all = registry.get, registry.load_all
    monkeypatch.setattr(registry, "get", lambda name: method if name == method.name else get(name))
    monkeypatch.setattr(registry, "load_all", lambda: ({**load_all()[0], method.name: method}, load_all()[1]))


@dataclass(frozen=True, kw_only=True)
class Broken:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        name = next(iter(adapter.tensors))
        tensors = {**adapter.tensors, name: adapter.tensors[name] * float("nan")}
        return Carried(adapter=replace(adapter, tensors=tensors))


@dataclass(frozen=True, kw_only=True)
class Misshapen:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        name = next(name for name in adapter.tensors if "lora_A" in name)
        return Carried(adapter=replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name][:, :5]}))


@dataclass(frozen=True)
class Learnt:
    batches: int

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        carried = LORA_X.build(energy=1.0).transfer(adapter, bases)
        evidence = {path: {"batches": float(self.batches), "method": "copied"} for path in carried.evidence}
        return replace(carried, evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Learning:
    seed: int = 0

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Learnt:
        return Learnt(sum(1 for batch in batches if batch["input_ids"].shape == (8, 16)))


@dataclass(frozen=True, kw_only=True)
class Either(Learning):
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        return Carried(adapter=adapter)


def _read_vector(path: Path, allow_pickle: bool) -> Adapter:
    file = path / "adapter.vector" if path.is_dir() else path
    return Adapter(kind=VECTOR, config=None, tensors=load_file(file))


def _write_vector(adapter: Adapter, folder: Path) -> None:
    save_file(dict(adapter.tensors), folder / "adapter.vector")


VECTOR = FileKind(
    name="vector", recognises=lambda path: path.suffix == ".vector", read=_read_vector, write=_write_vector
)


@dataclass(frozen=True, kw_only=True)
class Doubled:
    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        return Carried(adapter=replace(adapter, tensors={name: 2 * t for name, t in adapter.tensors.items()}))
