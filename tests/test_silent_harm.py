"""What would arrive wrong without a word: other bases' tensors, lost modules, blocks that are not each other's, changed live models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.conftest import make_llama
from tests.verb_models import IDS, drifted, input_folder, lora_folder, randomised, rotated_values
from tests.weight_models import lora_on
from xadapt import InputAdaConfig
from xadapt.base import open_base
from xadapt.checking.activations import ROWS, features
from xadapt.cli import main
from xadapt.refused import Refused
from xadapt.siblings import Pair
from xadapt.transferring.resuming import _key
from xadapt.verifying.behaviour import LogProbs
from xadapt.verifying.report import Verified, VerifyReport
from xadapt_auto import AUTO


def trained(folder: Path, config: Any, **saving: Any) -> Path:
    """What stock PEFT saves of an adapter with random tensors."""
    randomised(get_peft_model(make_llama(), config)).save_pretrained(folder, **saving)
    return folder


class TestTheBasesOwnTensors:
    """PEFT's save_pretrained may write the embeddings of the base beside the adapter."""

    @pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
    def test_a_copy_leaves_the_targets_embeddings_alone(self, tmp_path: Path, targets: list[str]) -> None:
        adapter = trained(tmp_path / "lora", LoraConfig(r=2, target_modules=targets), save_embedding_layers=True)
        assert any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
        target = drifted(make_llama())
        result = xadapt.transfer(adapter, make_llama(), target, "copy", out=tmp_path / "out")
        assert all("lora_" in name for name in load_file(result.out / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(copy.deepcopy(target), result.out).get_base_model()
        table = getattr(loaded.model.embed_tokens, "base_layer", loaded.model.embed_tokens)
        torch.testing.assert_close(table.weight, target.model.embed_tokens.weight, rtol=0, atol=0)

    def test_verify_leaves_them_alone_too(self, tmp_path: Path) -> None:
        adapter = trained(tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"]), save_embedding_layers=True)
        target = drifted(make_llama())
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        plain = lora_folder(tmp_path / "plain", targets=("q_proj",))
        xadapt.verify(make_llama(), target, adapter, plain, IDS)
        for name, tensor in target.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)

    def test_trained_ones_are_refused(self, tmp_path: Path) -> None:
        adapter = trained(tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"]), save_embedding_layers=True)
        with pytest.raises(ValueError, match=r"carries the base's .*, with other numbers"):
            xadapt.transfer(adapter, make_llama(seed=1), make_llama(), "copy", out=tmp_path / "out")


class TestWhatALoraCannotHold:
    def test_auto_does_not_lose_whole_modules(self, tmp_path: Path) -> None:
        config = InputAdaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = xadapt.save(randomised(get_peft_model(make_llama(), config)), tmp_path / "input")
        given = (adapter, make_llama(), drifted(make_llama()))
        with pytest.raises(ValueError, match=r"modules_to_save\): lm_head.weight.*method='input_ada' takes them"):
            xadapt.transfer(*given, "auto", out=tmp_path / "out")
        result = xadapt.transfer(*given, "input_ada", out=tmp_path / "out")
        assert "base_model.model.lm_head.weight" in load_file(result.out / "adapter_model.safetensors")

    def test_auto_takes_dora_as_it_is(self, tmp_path: Path) -> None:
        adapter = trained(tmp_path / "dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        result = xadapt.transfer(adapter, make_llama(), drifted(make_llama()), out=tmp_path / "out")
        assert result.methods == {"copy": 2}
        own, found = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, result.out))
        assert own.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in own.items())

    def test_a_lora_that_has_changed_its_base_is_not_copied(self, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        adapter = trained(tmp_path / "pissa", config)
        with pytest.raises(ValueError, match="takes a part out of the base weight"):
            xadapt.transfer(adapter, make_llama(), drifted(make_llama()), "copy", out=tmp_path / "out")

    def test_other_peft_methods_are_told_the_way(self, tmp_path: Path) -> None:
        adapter = trained(tmp_path / "loha", LoHaConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"none is installed\. As a LoRA it can be carried: xadapt export"):
            xadapt.transfer(adapter, make_llama(), drifted(make_llama()), out=tmp_path / "out")


class TestBlocks:
    def test_weights_say_which_blocks_a_pruned_sibling_kept(self) -> None:
        pruned = make_llama(layers=5)
        pruned.model.layers = nn.ModuleList(pruned.model.layers[number] for number in (0, 1, 2))
        bases = Pair(open_base(make_llama(layers=5)), open_base(pruned))
        for number in range(5):
            lines = bases.modules.of(f"model.layers.{number}.self_attn.q_proj")
            wanted = [f"model.layers.{number}.self_attn.q_proj"] if number < 3 else []
            assert [line.target for line in lines] == wanted

    def test_blocks_that_are_like_no_other_go_by_their_depth(self) -> None:
        bases = Pair(open_base(make_llama(layers=3)), open_base(make_llama(seed=1, layers=5)))
        found = [bases.modules.of(f"model.layers.{number}.mlp.up_proj")[0].target for number in range(3)]
        assert found == [f"model.layers.{number}.mlp.up_proj" for number in (0, 2, 4)]

    def test_one_tied_adapter_joins_whichever_blocks_there_are(self, tmp_path: Path) -> None:
        pruned = make_llama(layers=3)
        pruned.model.layers = pruned.model.layers[1:]  # so that its first block is the source's second
        config = InputAdaConfig(r=2, target_modules=["q_proj", "k_proj"], tie=r"self_attn\.[qk]_proj$")
        adapter = xadapt.save(randomised(get_peft_model(make_llama(layers=3), config)), tmp_path / "tied")
        result = xadapt.transfer(adapter, make_llama(layers=3), pruned, "input_ada", out=tmp_path / "out")
        assert len(result.layers) == 4
        assert not result.left_out

    def test_a_deeper_targets_further_blocks_stay_bare(self, tmp_path: Path) -> None:
        target = make_llama(seed=1, layers=3)
        result = xadapt.transfer(
            lora_folder(tmp_path / "lora", make_llama(layers=1)),
            make_llama(layers=1),
            target,
            "copy",
            out=tmp_path / "out",
        )
        assert {layer.path.split(".")[2] for layer in result.layers} == {"0"}
        xadapt.load(target, result.out)

    def test_what_was_finished_for_another_map_is_not_taken_up(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        swapped = {"model.layers.0": "model.layers.1", "model.layers.1": "model.layers.0"}
        keys = {
            _key(adapter, Pair(open_base(make_llama()), open_base(drifted(make_llama())), override), "copy", {})
            for override in (None, swapped)
        }
        assert len(keys) == 2


class TestCheck:
    def test_a_target_with_biases_that_the_source_has_not(self, tmp_path: Path) -> None:
        target = make_llama()
        for layer in target.model.layers:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
        found = xadapt.check(lora_folder(tmp_path / "lora"), make_llama(), target)
        assert [layer.weight_drift for layer in found.layers] == [0.0] * 4

    def test_features_are_those_before_a_change_in_place(self) -> None:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.layer(x).zero_()

        reads, returns = features(Changing(), ["layer"], {"x": torch.ones(2, 4)})["layer"]
        assert torch.equal(reads.rows, torch.ones(2, 4))
        assert bool(returns.rows.any())

    def test_of_many_rows_some_are_kept_and_all_are_looked_at(self) -> None:
        layer = nn.Sequential(nn.Linear(4, 4))
        many = torch.randn(3 * ROWS - 1, 4, generator=torch.Generator().manual_seed(0))
        reads, _ = features(layer, ["0"], {"input": many})["0"]
        assert (reads.rows.shape, reads.total) == ((ROWS, 4), 3 * ROWS - 1)
        assert torch.equal(reads.rows[1], many[3])
        many[1, 0] = torch.nan
        with pytest.raises(ValueError, match="What 0 of the model reads on the data holds NaN"):
            features(layer, ["0"], {"input": many})

    def test_each_module_keeps_its_mode(self) -> None:
        model = make_llama().train()
        model.model.layers[0].eval()
        features(model, ["model.layers.0.self_attn.q_proj"], {"input_ids": IDS})
        assert model.training
        assert not model.model.layers[0].training


class TestVerify:
    def test_live_models_are_as_before(self, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = trained(tmp_path / "lora", config)
        models = [make_llama().train(), drifted(make_llama()).train()]
        models[1].model.norm.weight.requires_grad_(False)

        def state(model: nn.Module) -> list[Any]:
            modules = [(path, type(module), module.training) for path, module in model.named_modules()]
            return [*modules, *((name, one.requires_grad) for name, one in model.named_parameters())]

        before = [state(model) for model in models]
        xadapt.verify(models[0], models[1], adapter, lora_folder(tmp_path / "other"), IDS)
        assert [state(model) for model in models] == before

    def test_a_metric_that_fails_is_no_adapter_that_does_not_load(self, tmp_path: Path) -> None:
        adapter, calls = lora_folder(tmp_path / "lora"), []

        def metric(model: nn.Module) -> float:
            calls.append(model)
            if len(calls) > 3:
                raise ValueError("no labels")
            return 1.0

        with pytest.raises(ValueError, match="The metric metric failed: ValueError: no labels"):
            xadapt.verify(make_llama(), drifted(make_llama()), adapter, adapter, IDS, metric=metric)

    def test_fingerprints_of_other_bases_are_noted(self, tmp_path: Path) -> None:
        adapter = input_folder(tmp_path / "input")
        target = drifted(make_llama())
        there = xadapt.transfer(adapter, make_llama(), target, "input_ada", out=tmp_path / "out").out
        assert xadapt.verify(make_llama(), target, adapter, there, IDS).notes == ()
        swapped = xadapt.verify(make_llama(), target, there, adapter, IDS).notes
        assert [note.partition(" was made")[0] for note in swapped] == ["The adapter", "The transferred adapter"]

    def test_a_change_within_rounding_is_none(self) -> None:
        sums = LogProbs(rows=1, source_norm=1e-12, target_norm=1e-12, source_kl=-1e-9, to_change=1e-14)
        with pytest.raises(ValueError, match="the adapter changes nothing on its own source"):
            sums.result()

    def test_what_loses_is_exit_code_3(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = VerifyReport(
            adapter="a",
            transferred="b",
            source="c",
            target="d",
            data="e",
            neutral=None,
            rows=(Verified(name="transferred", error="it does not fit"),),
        )
        assert report.refused
        adapter = lora_folder(tmp_path / "lora")
        wrong = lora_folder(tmp_path / "wrong", make_llama(hidden_size=64))
        make_llama().save_pretrained(tmp_path / "source")
        drifted(make_llama()).save_pretrained(tmp_path / "target")
        from tests.data_models import with_tokenizer

        for name in ("source", "target"):
            with_tokenizer(tmp_path / name)
        (tmp_path / "lines.txt").write_text("one two three\n")
        given = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
        given += ["--data", str(tmp_path / "lines.txt")]
        assert main(["verify", str(adapter), str(wrong), *given]) == 3
        assert "cannot be loaded" in capsys.readouterr().out
        assert main(["verify", str(adapter), str(adapter), *given]) == 0


class TestPlan:
    def test_it_says_what_would_be_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        adapter = input_folder(tmp_path / "input")
        other = xadapt.plan_transfer(adapter, make_llama(seed=1), make_llama(), "input_ada", out=tmp_path / "out")
        assert other.refused is not None
        assert "was not trained on" in other.refused
        shallow = (adapter, make_llama(), make_llama(layers=1), "input_ada")
        cut = xadapt.plan_transfer(*shallow, out=tmp_path / "out").refused
        assert cut is not None
        assert cut.startswith("2 of the adapter's layers have no counterpart")
        assert xadapt.plan_transfer(*shallow, out=tmp_path / "out", partial=True).refused is None
        make_llama().save_pretrained(tmp_path / "source")
        make_llama(layers=1).save_pretrained(tmp_path / "shallow")
        given = ["transfer", str(adapter), "--source", str(tmp_path / "source"), "--target", str(tmp_path / "shallow")]
        given += ["--method", "input_ada", "--plan", "--out", str(tmp_path / "out")]
        assert main(given) == 3
        assert "It would be refused: 2 of" in capsys.readouterr().out
        assert main([*given, "--partial"]) == 0


class TestAuto:
    def test_a_method_outside_the_candidates_is_not_replaced_by_a_copy(self) -> None:
        bases = Pair(open_base(make_llama()), open_base(rotated_values(make_llama())))
        with pytest.raises(Refused, match=r"not among the candidates copy: .*v_proj needs pinv_input"):
            AUTO.build(candidates="copy").transfer(lora_on(make_llama(), ["v_proj"]), bases)


class TestSeveralTargets:
    def test_a_variant_is_of_those_bases_that_are_read(self, tmp_path: Path) -> None:
        make_llama().save_pretrained(tmp_path / "source", variant="fp16")
        drifted(make_llama()).save_pretrained(tmp_path / "one", variant="fp16")
        targets = {"one": tmp_path / "one", "live": drifted(make_llama())}
        adapter = lora_folder(tmp_path / "lora")
        found = xadapt.transfer_all(adapter, tmp_path / "source", targets, "copy", out=tmp_path / "out", variant="fp16")
        assert {name: type(one).__name__ for name, one in found.items()} == dict.fromkeys(targets, "TransferResult")


class TestOverwriting:
    def test_what_lies_beside_an_adapter_is_not_lost(self, tmp_path: Path) -> None:
        run = lora_folder(tmp_path / "run")
        (run / "checkpoint-5").mkdir()
        given = (lora_folder(tmp_path / "lora"), make_llama(), drifted(make_llama()), "copy")
        with pytest.raises(ValueError, match="holds more than an adapter: checkpoint-5, which would be lost"):
            xadapt.transfer(*given, out=run, overwrite=True)
        (run / "checkpoint-5").rmdir()
        assert xadapt.transfer(*given, out=run, overwrite=True).out == run
