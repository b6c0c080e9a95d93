"""`xadapt inspect`, `export` and `merge`: the functions of the same names, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import xadapt
from tests.conftest import make_llama
from xadapt import FullAdaConfig, InputAdaConfig
from xadapt.cli import main
from xadapt.cli.options import as_flags

Logits = Callable[[nn.Module], torch.Tensor]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, an adapter in input space, and one that is no LoRA."""
    work = tmp_path_factory.mktemp("verbs")
    for name, seed in (("instruct", 1), ("newer", 2)):
        make_llama(seed).save_pretrained(work / name)
    for name, config in (
        ("adapter", InputAdaConfig(r=2, target_modules=["q_proj", "v_proj"])),
        ("full", FullAdaConfig(target_modules=["q_proj"])),
    ):
        model: Any = get_peft_model(make_llama(), config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        xadapt.save(model, work / name)
    return work


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


class TestInspect:
    def test_for_people(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(work / "adapter"), "--base", str(work / "instruct")]) == 0
        out = capsys.readouterr().out
        assert "LoRA in input space (kind input_ada), rank 2" in out
        assert "model.layers.1.self_attn.v_proj" in out
        assert "‖ΔW‖/‖W‖" in out

    def test_for_programs(self, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(work / "adapter"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["space"] == "input"
        assert told["ranks"] == [2]
        assert len(told["layers"]) == 4
        assert told["layers"][0]["update"] is None


class TestExport:
    def test_one_base(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logits: Logits) -> None:
        out = tmp_path / "lora"
        assert main(["export", str(work / "adapter"), "--base", str(work / "instruct"), "--out", str(out)]) == 0
        assert "exactly the adapter on" in capsys.readouterr().out
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "instruct"), out).eval()
        expected = xadapt.load(make_llama(1), work / "adapter").eval()
        torch.testing.assert_close(logits(plain), logits(expected), rtol=1e-5, atol=1e-5)

    def test_several_bases_get_a_folder_each(self, work: Path, tmp_path: Path, logits: Logits) -> None:
        bases = [argument for name in ("instruct", "newer") for argument in ("--base", str(work / name))]
        assert main(["export", str(work / "adapter"), *bases, "--out", str(tmp_path / "loras")]) == 0
        for name, seed in (("instruct", 1), ("newer", 2)):
            plain = PeftModel.from_pretrained(make_llama(seed), tmp_path / "loras" / name).eval()
            expected = xadapt.load(make_llama(seed), work / "adapter").eval()
            torch.testing.assert_close(logits(plain), logits(expected), rtol=1e-5, atol=1e-5)

    def test_bases_of_one_name_are_refused(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bases = ["--base", str(work / "instruct"), "--base", f"{work}/newer/../instruct"]
        assert main(["export", str(work / "adapter"), *bases, "--out", str(tmp_path / "loras")]) == 2
        assert "end in the same name" in capsys.readouterr().err
        assert not (tmp_path / "loras").exists()

    def test_a_base_that_fails_after_others(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bases = [argument for name in ("instruct", "gone", "newer") for argument in ("--base", str(work / name))]
        assert main(["export", str(work / "adapter"), *bases, "--out", str(tmp_path / "loras")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"xadapt export: {work}/gone: ")
        assert f"Written before it: {tmp_path}/loras/instruct." in err
        assert {path.name for path in (tmp_path / "loras").iterdir()} == {"instruct"}

    def test_folders_without_names_get_those_of_where_they_are(
        self, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(work / "instruct")
        (work / "instruct" / "below").mkdir(exist_ok=True)
        command = ["export", str(work / "adapter"), "--out", str(tmp_path / "loras"), "--base", "../newer/"]
        assert main([*command, "--base", "."]) == 0
        assert {path.name for path in (tmp_path / "loras").iterdir()} == {"instruct", "newer"}
        assert main([*command, "--overwrite", "--base", "below/.."]) == 0
        for strange in ("gone/..", "/"):
            assert main([*command, "--base", strange]) == 2
            assert f"The base {strange} has no name" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"loras"}

    def test_what_is_cut_is_reported(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["export", str(work / "full"), "--base", str(work / "instruct"), "--out", str(tmp_path / "lora")]
        assert main(command) == 2
        assert "--rank … or --energy 0.99" in capsys.readouterr().err
        assert main([*command, "--rank", "4"]) == 0
        out = capsys.readouterr().out
        assert "approximately the adapter" in out
        assert "‖ΔW − LoRA‖/‖ΔW‖" in out
        assert main([*command, "--energy", "0.9", "--overwrite", "--dtype", "bfloat16", "--json"]) == 0
        (report,) = json.loads(capsys.readouterr().out)
        assert report["dtype"] == "bfloat16"
        assert all(0 < layer["residual"] <= 0.1**0.5 for layer in report["layers"])

    def test_adapters_are_weighed(self, work: Path, tmp_path: Path, logits: Logits) -> None:
        adapter = str(work / "adapter")
        command = ["export", adapter, adapter, "--weight", "0.5", "--weight", "0.5"]
        assert main([*command, "--base", str(work / "instruct"), "--out", str(tmp_path / "lora")]) == 0
        plain = PeftModel.from_pretrained(make_llama(1), tmp_path / "lora").eval()
        expected = xadapt.load(make_llama(1), work / "adapter").eval()
        torch.testing.assert_close(logits(plain), logits(expected), rtol=1e-5, atol=1e-5)


class TestComponents:
    """--component chooses in a LoRA file also where the base is one component by itself."""

    def test_of_a_file_onto_a_bare_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        from tests.layout_models import make_clip, make_unet, random_lora
        from xadapt.layouts import write_kohya

        make_unet().save_pretrained(tmp_path / "net", variant="fp16")
        make_clip().save_pretrained(tmp_path / "clip")
        loras = {"unet": random_lora(make_unet(), ".*to_q"), "text_encoder": random_lora(make_clip(), ".*q_proj")}
        file = str(write_kohya(loras, tmp_path / "both.safetensors"))
        net = ["--base", str(tmp_path / "net"), "--variant", "fp16"]
        assert main(["export", file, *net, "--out", str(tmp_path / "x")]) == 2
        assert "choose one: --component text_encoder or unet." in capsys.readouterr().err
        assert main(["export", file, *net, "--out", str(tmp_path / "x"), "--component", "unet"]) == 0
        assert main(["merge", file, *net, "--out", str(tmp_path / "y"), "--component", "unet"]) == 0
        assert (tmp_path / "y" / "diffusion_pytorch_model.fp16.safetensors").is_file()
        command = ["export", file, "--base", str(tmp_path / "clip"), "--out", str(tmp_path / "z.safetensors")]
        command += ["--layout", "kohya", "--component", "text_encoder"]
        assert main(command) == 2
        assert "pass --name text_encoder for SD1.5, --name text_encoder_1 for" in capsys.readouterr().err
        assert main([*command, "--name", "text_encoder_1"]) == 0


class TestMerge:
    def test_it_writes_the_checkpoint(
        self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logits: Logits
    ) -> None:
        out = tmp_path / "merged"
        assert main(["merge", str(work / "full"), "--base", str(work / "instruct"), "--out", str(out)]) == 0
        assert "with the adapter in 2 layers" in capsys.readouterr().out
        expected = xadapt.load(make_llama(1), work / "full").eval()
        merged = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-5)

    def test_a_plan_writes_nothing(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["merge", str(work / "adapter"), "--base", str(work / "instruct"), "--out", str(tmp_path / "merged")]
        assert main([*command, "--plan"]) == 0
        out = capsys.readouterr().out
        assert "a plan: nothing is written" in " ".join(out.split())  # paths of any length may break the line
        assert "model.safetensors" in out
        assert main([*command, "--plan", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bytes_changed"] > 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("x exists already; overwrite=True replaces it.", "x exists already; --overwrite replaces it."),
        ("say allow_pickle=True: tensors", "say --allow-pickle: tensors"),
        ("which part: component='NAME'. Known", "which part: --component NAME. Known"),
        ("choose one: component='text_encoder' or 'unet'.", "choose one: --component text_encoder or unet."),
        ("pass component=…, or write layout='peft'.", "pass --component …, or write --layout peft."),
        ("rank=0: a rank, for example rank=16.", "--rank 0: a rank, for example --rank 16."),
        ("closely, with rank=… or energy=0.99 for", "closely, with --rank … or --energy 0.99 for"),
        ("dtype=torch.int8: a LoRA", "--dtype int8: a LoRA"),
        ("cannot count weights=[0.5, 2.0]: leave", "cannot count --weight 0.5 --weight 2.0: leave"),
        ("energy=-1.5: the share", "--energy -1.5: the share"),
        ("(tie_word_embeddings=False), lora_bias=True", "(tie_word_embeddings=False), lora_bias=True"),
        ("torch.load(weights_only=True), adapter_name='x'", "torch.load(weights_only=True), adapter_name='x'"),
        (
            "no tensors for variant=None; there is variant='fp16'",
            "no tensors for variant=None; there is --variant fp16",
        ),
        ("/runs/rank=4/layout=x/a is not there", "/runs/rank=4/layout=x/a is not there"),
    ],
)
def test_mistakes_are_told_in_flags(message: str, told: str) -> None:
    assert as_flags(message) == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["inspect", "{work}/gone"], "gone"),
        (["export", "{work}/adapter", "--base", "{work}/gone", "--out", "{work}/x"], "gone"),
        (["merge", "{work}/adapter", "--base", "{work}/instruct", "--out", "{work}/newer"], "exists already"),
        (
            [
                "merge",
                "{work}/adapter",
                "--weight",
                "1",
                "--weight",
                "2",
                "--base",
                "{work}/newer",
                "--out",
                "{work}/x",
            ],
            "1 adapters and 2 weights",
        ),
    ],
    ids=["no adapter", "no base", "out is there", "weights"],
)
def test_mistakes_are_one_line(arguments: list[str], told: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.format(work=work) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith(f"xadapt {arguments[0]}: ")
    assert not (work / "x").exists()
