"""`xadapt.verify`: the five models on the same inputs, and what is shown of a result that loses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.data_models import with_tokenizer
from tests.verb_models import IDS, drifted, input_folder, lora_folder, randomised, rotated_values, unet_lora_folder
from xadapt.adapter_files import open_adapter
from xadapt.base import open_base
from xadapt.cli import main
from xadapt.data import Amount
from xadapt.data.counting import counting
from xadapt.verifying.behaviour import Agreement
from xadapt.verifying.continuing import continued
from xadapt.verifying.metrics import lm_eval_metric, metric_from, numbers
from xadapt.verifying.report import Verified, VerifyReport


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("verify")
    lora_folder(work / "lora")
    input_folder(work / "input")
    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["v_proj"]))
    xadapt.save(randomised(model, std=1.0), work / "values")
    source = make_llama()
    source.save_pretrained(work / "source")
    drifted(source).save_pretrained(work / "target")
    return work


def rows(found: VerifyReport) -> dict[str, Verified]:
    return {row.name: row for row in found.rows}


class TestLanguageModels:
    def test_on_the_source_itself_everything_arrives(self, work: Path) -> None:
        found = xadapt.verify(make_llama(), make_llama(), work / "lora", work / "lora", IDS)
        agreement = rows(found)["transferred"].agreement
        assert agreement is not None
        assert agreement.direction == pytest.approx(1, abs=1e-5)
        assert agreement.strength == pytest.approx(1, abs=1e-4)
        assert agreement.score == pytest.approx(1, abs=1e-4)
        assert agreement.rows == IDS.numel()
        assert found.loses_to == ()

    def test_where_labels_leave_something_out_it_does_not_count(self, work: Path) -> None:
        labels = IDS.clone()
        labels[:, :-2] = -100  # the last two tokens are the answer
        elsewhere = IDS.clone()
        elsewhere[:, -1] = (elsewhere[:, -1] + 1) % 64  # behind the last position that counts
        target = drifted(make_llama())
        one, other = (
            xadapt.verify(make_llama(), target, work / "lora", work / "lora", [{"input_ids": ids, "labels": labels}])
            for ids in (IDS, elsewhere)
        )
        agreement = rows(one)["copy"].agreement
        assert agreement is not None
        assert agreement.rows == 2 * len(IDS)
        assert agreement == rows(other)["copy"].agreement
        everything = rows(xadapt.verify(make_llama(), target, work / "lora", work / "lora", IDS))["copy"].agreement
        assert everything is not None
        assert everything.score != agreement.score

    def test_labels_that_leave_out_everything(self, work: Path) -> None:
        batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
        with pytest.raises(ValueError, match="its labels are -100 throughout"):
            xadapt.verify(make_llama(), make_llama(), work / "lora", work / "lora", [batch])

    def test_labels_of_another_shape(self, work: Path) -> None:
        batch = {"input_ids": IDS, "labels": IDS[:, 1:]}
        with pytest.raises(ValueError, match="labels are one for each token"):
            xadapt.verify(make_llama(), make_llama(), work / "lora", work / "lora", [batch])

    def test_prompts_are_continued_by_the_adapted_source(self, work: Path) -> None:
        source = make_llama()
        source.generation_config.eos_token_id = None
        target = drifted(make_llama())
        found = xadapt.verify(source, target, work / "lora", work / "lora", IDS, continue_tokens=3)
        agreement = rows(found)["copy"].agreement
        assert agreement is not None
        assert agreement.rows == 3 * len(IDS)
        assert found.data.endswith("continued by up to 3 tokens, which alone count")
        with pytest.raises(ValueError, match="continue_tokens=-1: a whole number"):
            xadapt.verify(source, target, work / "lora", work / "lora", IDS, continue_tokens=-1)
        batch = {"input_ids": IDS, "labels": IDS}
        with pytest.raises(ValueError, match="says already what its answers are"):
            xadapt.verify(source, target, work / "lora", work / "lora", [batch], continue_tokens=3)

    def test_five_rows_and_the_bare_target_does_nothing(self, work: Path) -> None:
        found = xadapt.verify(
            make_llama(), drifted(make_llama()), work / "lora", work / "lora", IDS, neutral=IDS.flip(1)
        )
        assert [row.name for row in found.rows] == ["bare source", "adapted source", "bare", "copy", "transferred"]
        bare = rows(found)["bare"]
        assert bare.agreement is not None
        assert (bare.agreement.direction, bare.agreement.strength, bare.retention) == (0, 0, 1)
        assert rows(found)["copy"].agreement == rows(found)["transferred"].agreement
        retention = rows(found)["copy"].retention
        assert retention is not None
        assert 0 < retention < 1

    def test_a_changed_basis_breaks_the_copy_and_not_what_input_space_carries(self, work: Path, tmp_path: Path) -> None:
        source, target = make_llama(), rotated_values(make_llama())
        torch.testing.assert_close(source(input_ids=IDS).logits, target(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
        carried = tmp_path / "carried"
        xadapt.transfer(work / "values", source, target, "pinv_input", out=carried, ridge=0, trust_source=True)
        found = xadapt.verify(source, target, work / "values", carried, IDS)
        one, other = rows(found)["transferred"].agreement, rows(found)["copy"].agreement
        assert one is not None
        assert other is not None
        assert one.direction > 0.99
        assert other.direction < 0.7
        back = xadapt.verify(source, target, work / "values", work / "values", IDS)
        assert back.score == other.score

    def test_live_models_are_as_before(self, work: Path) -> None:
        source, target = make_llama(), drifted(make_llama())
        states = [copy.deepcopy(model.state_dict()) for model in (source, target)]
        xadapt.verify(source, target, work / "input", work / "lora", IDS[:2])
        for model, state in zip((source, target), states, strict=True):
            assert model.state_dict().keys() == state.keys()
            assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
            assert not hasattr(model, "peft_config")
            assert not any("lora" in name for name, _ in model.named_modules())

    def test_a_copy_that_cannot_be_loaded_is_shown_as_such(self, work: Path, tmp_path: Path) -> None:
        wider = make_llama(hidden_size=64)
        there = lora_folder(tmp_path / "there", make_llama(hidden_size=64))
        found = xadapt.verify(make_llama(), wider, work / "lora", there, IDS)
        copied = rows(found)["copy"]
        assert copied.agreement is None
        assert copied.error is not None
        assert "other widths" in copied.error
        assert found.score is not None

    def test_what_was_transferred_may_not_load_either(self, work: Path, tmp_path: Path) -> None:
        there = lora_folder(tmp_path / "there", make_llama(hidden_size=64))
        found = xadapt.verify(make_llama(), drifted(make_llama()), work / "lora", there, IDS)
        assert found.score is None
        assert "cannot be loaded" in found.verdict

    def test_chunks_of_rows_change_nothing(self, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given = (make_llama(), drifted(make_llama()), work / "lora", work / "lora", IDS)
        whole = xadapt.verify(*given)
        monkeypatch.setattr("xadapt.verifying.outputs.ROWS", 7)
        assert xadapt.verify(*given, amount=Amount(batch=3)).score == pytest.approx(whole.score, abs=1e-5)


class TestBadInput:
    def test_an_adapter_that_does_nothing(self, work: Path, tmp_path: Path) -> None:
        fresh = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        nothing = xadapt.save(fresh, tmp_path / "fresh")
        with pytest.raises(ValueError, match="the adapter changes nothing on its own source"):
            xadapt.verify(make_llama(), drifted(make_llama()), nothing, nothing, IDS)

    def test_another_vocabulary(self, work: Path, gpt2: Any) -> None:
        gpt2.resize_token_embeddings(70)
        with pytest.raises(ValueError, match="have different shapes"):
            xadapt.verify(make_llama(), gpt2, work / "lora", work / "lora", IDS)

    def test_one_live_model_for_both(self, work: Path) -> None:
        model = make_llama()
        with pytest.raises(ValueError, match="source and target are one live model"):
            xadapt.verify(model, model, work / "lora", work / "lora", IDS)

    def test_a_target_that_is_not_finite(self, work: Path) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.lm_head.weight[0, 0] = float("inf")
        with pytest.raises(ValueError, match="NaN or infinity"):
            xadapt.verify(make_llama(), broken, work / "lora", work / "lora", IDS)

    def test_a_layer_that_is_not_finite_where_attention_hides_it(self, work: Path) -> None:
        broken, plain = make_llama(), drifted(make_llama())
        with torch.no_grad():
            broken.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        told = r"model\.layers\.1\.self_attn\.q_proj\.weight of the live LlamaForCausalLM holds NaN or infinity"
        ids = IDS[:, :10]  # not whole vectors: of these, attention on the CPU makes numbers
        for source, target in ((broken, plain), (plain, broken)):
            for tokens in (0, 2):
                with pytest.raises(ValueError, match=told):
                    xadapt.verify(source, target, work / "lora", work / "lora", ids, continue_tokens=tokens)

    def test_what_is_not_adapted_is_not_looked_at(self, work: Path) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.model.norm.weight[0] = float("nan")
        with pytest.raises(ValueError, match="A model's output holds NaN"):
            xadapt.verify(broken, make_llama(), work / "lora", work / "lora", IDS)

    def test_a_base_on_disk_that_is_not_finite(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = make_llama()
        with torch.no_grad():
            source.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        source.save_pretrained(with_tokenizer(tmp_path / "nan"))
        with_tokenizer(tmp_path / "target")
        (tmp_path / "lines.txt").write_text("a b c d e f g h i j\n")
        given = ["verify", str(work / "lora"), str(work / "lora"), "--source", str(tmp_path / "nan")]
        given += ["--target", str(tmp_path / "target"), "--data", str(tmp_path / "lines.txt")]
        assert main(given) == 2
        assert "q_proj.weight of " + str(tmp_path / "nan") + " holds NaN" in capsys.readouterr().err

    def test_batches_that_the_model_does_not_take(self, work: Path) -> None:
        with pytest.raises(ValueError, match=r"does not take the data's batches \(latents\)"):
            xadapt.verify(
                make_llama(), drifted(make_llama()), work / "lora", work / "lora", [{"latents": torch.ones(1, 2)}]
            )


class TestMetrics:
    def test_one_of_the_users_own(self, work: Path) -> None:
        def mean_logit(model: Any) -> dict[str, float]:
            with torch.no_grad():
                return {"largest": float(model(input_ids=IDS).logits.max())}

        source, target = make_llama(), drifted(make_llama())
        found = rows(xadapt.verify(source, target, work / "values", work / "values", IDS, metric=mean_logit))
        assert found["bare source"].metrics == mean_logit(source)
        assert found["bare"].metrics == mean_logit(target)
        assert found["adapted source"].metrics != found["bare source"].metrics
        assert found["copy"].metrics == found["transferred"].metrics != found["bare"].metrics

    def test_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_metrics.py").write_text("def layers(model):\n    return model.config.num_hidden_layers\n")
        monkeypatch.chdir(tmp_path)
        assert numbers(metric_from("own_metrics:layers"), make_llama()) == {"layers": 2.0}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("no_colon", "write module:function"),
            ("no_such_module_here:f", "cannot be imported"),
            ("json:no_such_function", "has no function"),
        ],
    )
    def test_names_that_are_none(self, given: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            metric_from(given)

    def test_what_is_no_number(self) -> None:
        with pytest.raises(ValueError, match="gave accuracy='high'"):
            numbers(lambda model: {"accuracy": "high"}, make_llama())
        with pytest.raises(ValueError, match="failed: ZeroDivisionError"):
            numbers(lambda model: 1 / 0, make_llama())

    def test_a_task_of_lm_eval(self, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install xadapt[eval]")
        from xadapt.data.tokenizing import tokenizer_of

        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": letter}) + "\n" for letter in "abcd"))
        task = {
            **{"task": "letters", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"},
            **{"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}},
            **{
                "doc_to_text": "{{text}}",
                "doc_to_choice": ["h", "i"],
                "doc_to_target": 0,
                "metric_list": [{"metric": "acc"}],
            },
        }
        (tmp_path / "letters.yaml").write_text(json.dumps(task))  # JSON is YAML
        base = xadapt.open_base(with_tokenizer(tmp_path / "llama"))
        metric = lm_eval_metric([str(tmp_path / "letters.yaml")], tokenizer_of(base), batch=2)
        measured = numbers(metric, base.module())
        assert measured.keys() == {"letters acc"}
        assert 0 <= measured["letters acc"] <= 1
        (tmp_path / "other.yaml").write_text(json.dumps({**task, "task": "called_otherwise"}))
        with pytest.raises(ValueError, match="lm-eval knows no task 'other'"):
            lm_eval_metric([str(tmp_path / "other.yaml")], tokenizer_of(base), batch=2)
        with pytest.raises(ValueError, match="pass tokenizer="):
            lm_eval_metric([str(tmp_path / "letters.yaml")], None, batch=2)


class TestDenoisers:
    def test_random_latents_and_what_is_said_of_them(self, tmp_path: Path, unet: Any) -> None:
        adapter = unet_lora_folder(tmp_path / "lora")
        given = {"amount": Amount(samples=3, batch=2)}
        same = xadapt.verify(copy.deepcopy(unet), copy.deepcopy(unet), adapter, adapter, "random", **given)
        assert same.score == pytest.approx(1, abs=1e-4)
        assert any("not pictures" in note for note in same.notes)
        other = xadapt.verify(unet, drifted(unet, 0.3), adapter, adapter, "random", neutral="random", **given)
        assert other.score is not None
        assert 0 <= other.score < 0.9
        kept = rows(other)["copy"].retention
        assert kept is not None
        assert 0 < kept < 1

    def test_what_the_models_draw(self, tmp_path: Path, unet: Any) -> None:
        from tests.a4a_pipes import write_pipeline

        write_pipeline("sd15", tmp_path / "pipe")
        adapter = lora_folder(
            tmp_path / "lora", xadapt.open_base(tmp_path / "pipe", component="unet").module(), ("to_k",)
        )
        given = (tmp_path / "pipe", tmp_path / "pipe", adapter, adapter, "random")
        found = xadapt.verify(*given, prompts=["a"], component="unet", amount=Amount(samples=1))
        images = {row.name: row.images for row in found.rows}
        assert all(len(drawn) == 1 and drawn[0].startswith("data:image/png;base64,") for drawn in images.values())
        assert images["bare source"] == images["bare"] != images["copy"]
        assert images["copy"] == images["transferred"] == images["adapted source"]
        with pytest.raises(ValueError, match="is a component of none"):
            xadapt.verify(unet, drifted(unet), adapter, adapter, "random", prompts=["a"])


class TestVerdict:
    def report(self, **scores: float) -> VerifyReport:
        made = [Verified(name=name, agreement=Agreement(score, 1.0, score, 3)) for name, score in scores.items()]
        return VerifyReport(
            adapter="a", transferred="t", source="s", target="t", data="d", neutral=None, rows=tuple(made)
        )

    @pytest.mark.parametrize(
        ("scores", "loses"),
        [
            ({"bare": 0.0, "copy": 0.5, "transferred": 0.9}, ()),
            ({"bare": 0.0, "copy": 0.9, "transferred": 0.5}, ("copy",)),
            ({"bare": 0.6, "copy": 0.9, "transferred": 0.5}, ("bare", "copy")),
            ({"bare": 0.0, "copy": 0.5004, "transferred": 0.5}, ()),
        ],
    )
    def test_a_result_that_loses_says_to_what(self, scores: dict[str, float], loses: tuple[str, ...]) -> None:
        found = self.report(**scores)
        assert found.loses_to == loses
        assert ("worse than" in found.verdict) is bool(loses)


class TestCommandLine:
    def test_from_a_text_file(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = with_tokenizer(tmp_path / "source")
        target = with_tokenizer(tmp_path / "target")
        (tmp_path / "lines.txt").write_text("a b c d e f g h i j\n")
        given = ["verify", str(work / "lora"), str(work / "lora"), "--source", str(source), "--target", str(target)]
        assert main([*given, "--data", str(tmp_path / "lines.txt"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["score"] == pytest.approx(1, abs=1e-4)
        assert main([*given, "--data", str(tmp_path / "lines.txt")]) == 0
        assert "adapted source" in capsys.readouterr().out
        assert main([*given, "--data", str(tmp_path / "gone.txt")]) == 2


class TestContinuing:
    """Of GPT-2, whose positions are absolute: padding in front would move them."""

    def continued(self, eos: int | None = None) -> tuple[Any, dict[str, Tensor]]:
        model = make_gpt2().eval()
        model.generation_config.eos_token_id = eos
        adapter = open_adapter(
            get_peft_model(make_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        )
        ids, mask = IDS[:2, :6].clone(), torch.ones(2, 6, dtype=torch.long)
        mask[0, 3:] = 0
        (made,) = continued(open_base(model), adapter, [{"input_ids": ids, "attention_mask": mask}], 4)
        return model, made

    def test_what_was_said_is_what_a_plain_forward_finds_most_likely(self) -> None:
        model, made = self.continued()
        assert made["attention_mask"].tolist() == [[1] * 7 + [0] * 3, [1] * 10]
        assert (made["labels"] != -100).sum(1).tolist() == [4, 4]
        with torch.no_grad():  # the fresh adapter changes nothing
            likely = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits.argmax(-1)
        counted = counting(made)
        assert counted is not None
        assert torch.equal(likely[counted], made["labels"][made["labels"] != -100])

    def test_nothing_counts_behind_the_end(self) -> None:
        _, whole = self.continued()
        said = whole["labels"][1][whole["labels"][1] != -100]
        _, made = self.continued(eos=int(said[1]))
        kept = made["labels"][1][made["labels"][1] != -100]
        first = int((said == said[1]).nonzero()[0])
        assert kept.tolist() == said[: first + 1].tolist()
        assert int(made["attention_mask"][1].sum()) == 6 + first + 1
