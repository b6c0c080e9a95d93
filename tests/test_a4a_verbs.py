"""A4A by the verbs: from an IP-Adapter file and pictures on disk to a folder, and what is said of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import xadapt
from tests.a4a_models import SD15_WIDTHS, base_file, batch_for, flat, run
from tests.a4a_pipes import make_target, write_image_encoder, write_images, write_pipeline
from xadapt import A4AModel
from xadapt.base import LiveBase, open_base
from xadapt.cli import main
from xadapt.data.amount import Amount
from xadapt.inspection import inspect
from xadapt.siblings import Pair
from xadapt_a4a import TrainA4A
from xadapt_a4a.encoding import own_pipeline
from xadapt_a4a.run import Progress

FILE = "ip-adapter_sd15.safetensors"
QUICK: dict[str, Any] = {"steps": 1, "depth": 1}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_file(flat(base_file(SD15_WIDTHS)), folder / FILE)
    for name in ("sd15", "sdxl"):
        write_pipeline(name, folder / name)
    write_image_encoder(folder / "encoder")
    write_images(folder / "pictures")
    return folder


def typed(world: Path, out: Path, *more: str) -> list[str]:
    given = {"--target": world / "sdxl/unet", "--data": world / "pictures", "--image-encoder": world / "encoder"}
    flags = [str(part) for pair in given.items() for part in pair]
    few = ["--method", "a4a", "--steps", "1", "--depth", "1", "--batch-size", "2"]
    return ["transfer", str(world / FILE), *flags, *few, "--out", str(out), *more]


class TestTransfer:
    def test_neither_the_source_nor_the_targets_pipeline_has_to_be_named(
        self, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(typed(world, tmp_path / "out", "--plan")) == 0
        assert "from a base that was not given" in " ".join(capsys.readouterr().out.split())
        assert main(typed(world, tmp_path / "out", "--json")) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["methods"] == {"a4a": 8}
        assert set(next(iter(told["layers"].values()))) == {"method", "width"}
        adapter = A4AModel.from_pretrained(tmp_path / "out")
        assert list(told["layers"]) == list(adapter.config.target_layers)
        assert adapter.config.ip_adapter == FILE
        target = open_base(world / "sdxl/unet").module()
        with torch.no_grad():
            bare = run(target)
            with adapter.attached(target, adapter.encode(torch.ones(1, 16)), guidance=False):
                assert not torch.equal(run(target), bare)

    def test_it_is_no_lora(self, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = make_target("sdxl")
        xadapt.transfer(world / FILE, None, target, "a4a", data=[batch_for(target)], out=tmp_path / "a4a", **QUICK)
        base = ["--base", str(world / "sdxl/unet"), "--out", str(tmp_path / "out")]
        assert main(["export", str(tmp_path / "a4a"), *base]) == 2
        assert "it is no LoRA, and cannot be made one. Use it as it is: xadapt.A4AModel.from" in capsys.readouterr().err
        assert main(["merge", str(world / FILE), *base]) == 2
        assert "`xadapt transfer --method a4a` carries it to others" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_to_a_live_target_from_batches(self, world: Path, tmp_path: Path) -> None:
        target = make_target("sdxl")
        result = xadapt.transfer(
            world / FILE, None, target, "a4a", data=[batch_for(target)], out=tmp_path / "out", **QUICK
        )
        assert result.written == "a4a"
        assert "by a4a on 8 layers" in result.summary()
        assert A4AModel.from_pretrained(tmp_path / "out").config.target_fingerprint

    def test_an_amount_that_nobody_heeds_is_refused(self, world: Path, tmp_path: Path) -> None:
        target = make_target("sdxl")
        given: dict[str, Any] = {"data": [batch_for(target)], "out": tmp_path / "out", **QUICK}
        with pytest.raises(ValueError, match="reads its data by itself and takes no samples, batch; leave that out"):
            xadapt.transfer(world / FILE, None, target, "a4a", amount=Amount(samples=3, batch=2), **given)
        assert not (tmp_path / "out").exists()

    def test_the_targets_own_scheduler_says_what_it_predicts(self, world: Path) -> None:
        """The pipeline of `sd15` here is one of v-prediction. A live model on its own cannot say so."""
        base = open_base(world / "sd15/unet")
        assert own_pipeline(base) == str(world / "sd15")
        target: Any = base.module()
        assert own_pipeline(LiveBase(target)) == ""
        adapter = xadapt.adapter_files.open_adapter(world / FILE)
        seen: dict[str, list[float]] = {}
        for name, given, prediction in (
            ("disk", base, "auto"),
            ("live", LiveBase(target), "auto"),
            ("told", base, "v_prediction"),
        ):
            steps = TrainA4A(**QUICK, prediction=prediction)
            losses: list[float] = seen.setdefault(name, [])

            def note(progress: Progress, losses: list[float] = losses) -> None:
                losses.append(progress.loss)

            steps.fit(adapter, Pair(None, given), [batch_for(target)], observer=note)
        assert seen["disk"] == seen["told"] != seen["live"]

    def test_every_option_says_what_it_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["transfer", "--method", "a4a", "--help"])
        told = " ".join(capsys.readouterr().out.partition("options of the method a4a")[2].split())
        assert "--lr1 FLOAT learning rate of the learnable features" in told
        for flag in ("steps", "lr3", "depth", "checkpoints", "image-encoder", "caption-column"):
            assert f"--{flag} " in told
        assert told.count("(default:") > 30
        bare = [
            part for part in told.split(" --")[1:] if part.partition(" ")[2].lstrip("INTFLOASR ").startswith("(def")
        ]
        assert bare == []


class TestInspect:
    def test_an_ip_adapter(self, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(world / FILE)]) == 0
        told = capsys.readouterr().out
        assert "kind ip_adapter" in told
        assert "image projection: base, 4 tokens of width 24" in told
        assert "7 of widths 32, 64" in told
        found = inspect(world / FILE)
        assert found.parameters == sum(tensor.numel() for tensor in flat(base_file(SD15_WIDTHS)).values())
        assert [layer.path for layer in found.layers][-1] == "ip_adapter.13"

    def test_an_a4a_adapter(self, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = make_target("sdxl")
        xadapt.transfer(world / FILE, None, target, "a4a", data=[batch_for(target)], out=tmp_path / "out", **QUICK)
        assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)["facts"]
        assert facts["carried from"].startswith(FILE)
        assert facts["for"].startswith("UNet2DConditionModel (")
        assert facts["its layers"] == "8 of widths 64"
        with pytest.raises(ValueError, match=r"of kind 'a4a'.*Leave base out"):
            inspect(tmp_path / "out", target)
