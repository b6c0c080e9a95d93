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

    def test_what_is_cut_is_reported(self, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["export", str(work / "full"), "--base", str(work / "instruct"), "--out", str(tmp_path / "lora")]
        assert main(command) == 2
        assert "--rank, --energy" in capsys.readouterr().err
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
        assert "a plan: nothing is written" in out
        assert "model.safetensors" in out
        assert main([*command, "--plan", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bytes_changed"] > 0
        assert list(tmp_path.iterdir()) == []


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
