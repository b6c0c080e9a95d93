"""A setting that would change nothing is refused, not ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import xadapt
from tests.conftest import make_llama
from tests.data_models import with_tokenizer
from tests.verb_models import IDS, lora_folder
from xadapt.base import open_base
from xadapt.cli import main
from xadapt.data import Amount, open_data
from xadapt.opening import check_choices


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("idle")
    make_llama().save_pretrained(work / "base")
    lora_folder(work / "lora")
    return work


NOTHING_TO_CHOOSE = "component='unet' chooses in a pipeline's folder"


class TestComponent:
    @pytest.mark.parametrize("verb", ["check", "transfer", "plan", "verify", "inspect", "export", "merge"])
    def test_nothing_has_one(self, verb: str, work: Path, tmp_path: Path) -> None:
        lora, base, out = work / "lora", work / "base", tmp_path / "out"
        calls: dict[str, Any] = {
            "check": lambda: xadapt.check(lora, base, base, component="unet"),
            "transfer": lambda: xadapt.transfer(lora, base, base, "copy", out=out, component="unet"),
            "plan": lambda: xadapt.plan_transfer(lora, base, base, "copy", out=out, component="unet"),
            "verify": lambda: xadapt.verify(base, base, lora, lora, IDS, component="unet"),
            "inspect": lambda: xadapt.inspect(lora, base, component="unet"),
            "export": lambda: xadapt.export_lora(lora, base, out, component="unet"),
            "merge": lambda: xadapt.merge(lora, base, out, component="unet"),
        }
        with pytest.raises(ValueError, match=NOTHING_TO_CHOOSE):
            calls[verb]()
        assert not out.exists()

    def test_on_the_command_line(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = str(work / "base")
        bases = ["--source", base, "--target", base, "--component", "unet"]
        assert main(["check", str(work / "lora"), *bases]) == 2
        assert "--component unet chooses in a pipeline's folder" in capsys.readouterr().err
        several = ["transfer", str(work / "lora"), *bases, "--target", str(work / "lora"), "--out", str(tmp_path / "o")]
        assert main(several) == 2
        assert "--component unet chooses" in capsys.readouterr().err
        assert main(["export", str(work / "lora"), "--base", base, "--component", "unet", "--out", "x"]) == 2

    def test_one_that_has_some_is_enough(self, work: Path, tmp_path: Path) -> None:
        (tmp_path / "pipeline").mkdir()
        (tmp_path / "pipeline" / "model_index.json").write_text("{}")
        opened = open_base(work / "base")
        for given in (tmp_path / "pipeline", "owner/name", tmp_path / "lora.safetensors", opened):
            check_choices("unet", None, [work / "lora"], [work / "base", given])
        with pytest.raises(ValueError, match=NOTHING_TO_CHOOSE):
            check_choices("unet", None, [work / "lora"], [work / "base", None, make_llama()])

    def test_a_variant_of_live_models(self, work: Path) -> None:
        with pytest.raises(ValueError, match="variant='fp16' chooses among a base's files"):
            xadapt.check(work / "lora", make_llama(), make_llama(), variant="fp16")


class TestAmount:
    @pytest.mark.parametrize("flag", ["--samples", "--max-tokens", "--batch", "--seed"])
    def test_without_data(self, flag: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bases = ["--source", str(work / "base"), "--target", str(work / "base")]
        assert main(["check", str(work / "lora"), *bases, flag, "8"]) == 2
        assert f"{flag}: of what --data names, and there is none" in capsys.readouterr().err

    def test_a_seed_is_the_methods_too(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["transfer", str(work / "lora"), "--source", str(work / "base"), "--target", str(work / "base")]
        command += ["--method", "copy", "--out", str(tmp_path / "out")]
        assert main([*command, "--samples", "8", "--batch", "2"]) == 2
        assert "--samples and --batch: of what --data names" in capsys.readouterr().err
        assert main([*command, "--seed", "1"]) == 0

    def test_in_python(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", work / "base", work / "base")
        with pytest.raises(ValueError, match="amount says how data is read, and no data was given"):
            xadapt.check(*given, amount=Amount())
        with pytest.raises(ValueError, match="tokenizer says how data is read"):
            xadapt.check(*given, tokenizer=object())
        with pytest.raises(ValueError, match="samples says how data is read, and no data was given"):
            xadapt.transfer(*given, "copy", out=tmp_path / "out", amount=Amount(samples=3))
        assert not (tmp_path / "out").exists()

    def test_what_a_sort_of_data_does_not_heed(self, unet: Any) -> None:
        llama, denoiser = open_base(make_llama()), open_base(unet)
        with pytest.raises(ValueError, match="max_tokens and batch would change nothing of batches; leave"):
            open_data([{"input_ids": IDS}], llama, llama, Amount(max_tokens=3, batch=2))
        with pytest.raises(ValueError, match="max_tokens would change nothing of a denoiser's data"):
            open_data("random", denoiser, denoiser, Amount(max_tokens=3))
        with pytest.raises(ValueError, match="tokenizer would change nothing of a tensor of token ids"):
            open_data(torch.ones(2, 3).long(), llama, llama, tokenizer=object())


class TestOthers:
    def test_a_plan_writes_no_report(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["transfer", str(work / "lora"), "--source", str(work / "base"), "--target", str(work / "base")]
        command += ["--method", "copy", "--out", str(tmp_path / "out"), "--plan", "--report", str(tmp_path / "r.html")]
        assert main(command) == 2
        assert "--plan writes nothing, so no --report either" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_a_limit_of_tasks_without_tasks(self, work: Path) -> None:
        with pytest.raises(ValueError, match=r"task_limit=3 is of lm-eval's tasks, and none was given"):
            xadapt.verify(work / "base", work / "base", work / "lora", work / "lora", IDS, task_limit=3)


class TestPlanSaysWhatIsLoaded:
    def test_both_models_or_none(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = (work / "lora", work / "base", make_llama())
        assert xadapt.plan_transfer(*given, "copy", out=tmp_path / "out").loads == ()
        learning = xadapt.plan_transfer(*given, "aligned", out=tmp_path / "out", data=IDS)
        assert learning.loads == (str(work / "base"), "the live LlamaForCausalLM")

    def test_only_the_target_where_a_method_reads_its_data_itself(self, tmp_path: Path) -> None:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        from tests.a4a_models import SD15_WIDTHS, base_file, flat
        from tests.a4a_pipes import make_target

        save_file(flat(base_file(SD15_WIDTHS)), tmp_path / "ip.safetensors")
        plan = xadapt.plan_transfer(
            tmp_path / "ip.safetensors", None, make_target("sdxl"), "a4a", out=tmp_path / "o", data="pictures"
        )
        assert plan.loads == (plan.target,)


class TestOptionsThatTheVerbHasToo:
    """`aligned` has a map of features, and every transfer a map of modules."""

    def test_in_python(self, work: Path, tmp_path: Path) -> None:
        given = (work / "lora", work / "base", work / "base", "aligned")
        data: dict[str, Any] = {"data": IDS.repeat(1, 2)}
        result = xadapt.transfer(*given, out=tmp_path / "out", method_map="procrustes", **data)
        assert result.options["map"] == "procrustes"
        assert {layer.evidence["inputs_map"] for layer in result.layers} == {"procrustes"}
        lines = {"model.layers.0.self_attn.q_proj": None}
        both: dict[str, Any] = {"map": lines, "method_map": "identity", "partial": True, **data}
        result = xadapt.transfer(*given, out=tmp_path / "both", **both)
        assert (result.options["map"], list(result.left_out)) == ("identity", list(lines))
        with pytest.raises(ValueError, match=r"map='procrustes' is no file: .* has is method_map='procrustes'"):
            xadapt.transfer(*given, out=tmp_path / "other", map="procrustes", **data)
        with pytest.raises(TypeError, match="ridge and method_ridge are one option"):
            xadapt.transfer(*given, out=tmp_path / "other", ridge=1.0, method_ridge=1.0, **data)

    def test_on_the_command_line(self, tmp_path: Path, work: Path) -> None:
        with_tokenizer(tmp_path / "base")
        (tmp_path / "lines.txt").write_text("a b c d\n" * 20)
        base = ["--source", str(tmp_path / "base"), "--target", str(tmp_path / "base")]
        command = ["transfer", str(work / "lora"), *base, "--method", "aligned", "--data", str(tmp_path / "lines.txt")]
        assert main([*command, "--out", str(tmp_path / "out"), "--method-map", "procrustes", "--ridge", "0.001"]) == 0
        options = json.loads((tmp_path / "out" / "xadapt_transfer.json").read_text())["options"]
        assert (options["map"], options["ridge"]) == ("procrustes", 0.001)
