"""The presets for real models, on pipelines, an IP-Adapter, encoders and images small enough to be made here."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[bench]")

from benchmarks.a4a import full
from benchmarks.a4a.cli import main
from benchmarks.a4a.full import NATIVE, PRESETS, FullSettings, Target, rates
from benchmarks.a4a.weights import fetch
from benchmarks.tiny.progress import Silent
from tests.a4a_clip import write_clip
from tests.a4a_models import SD15_WIDTHS, base_file, flat
from tests.a4a_pipes import write_image_encoder, write_images, write_pipeline

PIXART_WIDTHS = [48, 48, 48]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    write_pipeline("pixart", folder / "pixart")
    write_image_encoder(folder / "encoder")
    write_clip(folder / "clip")
    write_images(folder / "data", 4)
    write_images(folder / "references", 2)
    save_file(flat(base_file(SD15_WIDTHS)), folder / "ip-adapter_sd15.safetensors")
    save_file(flat(base_file(PIXART_WIDTHS)), folder / "ip-adapter_pixart.safetensors")
    return folder


def settings(shelf: Path) -> FullSettings:
    native = str(shelf / "ip-adapter_pixart.safetensors")
    target = Target(pipeline=str(shelf / "pixart"), resolution=16, native=native, sampling_steps=2, guidance=2.0)
    return FullSettings(
        preset="tried",
        summary="as small as it gets",
        targets={"pixart": target},
        ip_adapter=str(shelf / "ip-adapter_sd15.safetensors"),
        image_encoder=str(shelf / "encoder"),
        methods=("a4a", "random", "scratch", "frozen", NATIVE),
        steps=2,
        batch=2,
        processes=1,
        stops=(1, 2),
        depth=1,
        mixed_precision="no",
        checkpointing=False,
        checkpoint_every=1,
        references=2,
        prompts=("a b", "c"),
        scales=(0.0, 1.0),
        clip=str(shelf / "clip"),
        faces="",
    )


def parsed(shelf: Path, out: Path, **given: Any) -> argparse.Namespace:
    options = {"data": str(shelf / "data"), "references": shelf / "references", "out": out, "plan": False}
    nothing: dict[str, Any] = {"seeds": None, "methods": None, "targets": None, "rate": [], "faces": None}
    return argparse.Namespace(preset="tried", **{**nothing, **options, **given})


def run(shelf: Path, out: Path, **given: Any) -> dict[str, Any]:
    assert full.main(parsed(shelf, out, **given), Silent(), settings(shelf)) == 0
    return json.loads((out / "tried.json").read_text())


@pytest.fixture(scope="module")
def finished(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, run(shelf, out)


def test_every_method_is_trained_and_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    trained = {(row["method"], row["samples"]) for row in results["rows"]}
    assert trained == {(method, samples) for method in ("a4a", "random", "scratch", "frozen") for samples in (2, 4)}
    swept = {(row["method"], row["scale"]) for row in results["sweep"]}
    assert swept == {(method, scale) for method in (*(m for m, _ in trained), NATIVE) for scale in (0.0, 1.0)}
    assert all(-1 <= row["clip_i"] <= 1 and -1 <= row["clip_t"] <= 1 for row in results["sweep"])
    bare = {(row["clip_i"], row["clip_t"]) for row in results["sweep"] if row["scale"] == 0.0}
    assert len(bare) == 1  # without strength, all of them are the same target
    assert (out / "adapters" / "pixart-a4a-seed0" / "config.json").is_file()


def test_the_page_shows_the_images(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    page = (out / "tried.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5
    assert "published for the target (PTA-UM)" in page
    assert "CLIP-I" in page


def test_finished_cells_are_kept_and_others_run(finished: tuple[Path, dict[str, Any]], shelf: Path) -> None:
    out, results = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    again = run(shelf, out)
    assert again["rows"] == results["rows"]
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == stamps


def test_the_frozen_source_stays_and_the_trained_one_moves(finished: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    out, _ = finished
    given = base_file(SD15_WIDTHS)["ip_adapter"]["1.to_k_ip.weight"]

    def kept(method: str) -> bool:
        path = out / "adapters" / f"pixart-{method}-seed0" / "diffusion_pytorch_model.safetensors"
        return torch.equal(load_file(path)["source.to_k_ip.0.weight"], given)

    assert kept("frozen")
    assert not kept("a4a")
    assert not kept("random")


def test_without_data_it_says_what_the_paper_uses(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs --data.*CelebAMask-HQ"):
        full.main(parsed(shelf, tmp_path, data=None), Silent(), settings(shelf))
    with pytest.raises(ValueError, match="holds no reference images"):
        full.main(parsed(shelf, tmp_path, references=tmp_path), Silent(), settings(shelf))


def test_the_presets_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert PRESETS["paper"].steps * PRESETS["paper"].batch * PRESETS["paper"].processes == 240_000
    assert {one.pipeline for one in PRESETS["paper"].targets.values()} == {
        "stabilityai/stable-diffusion-xl-base-1.0",
        "PixArt-alpha/PixArt-XL-2-1024-MS",
    }
    assert ("sdxl", NATIVE, 0) in PRESETS["paper"].cells()
    assert ("pixart", NATIVE, 0) not in PRESETS["paper"].cells()  # none was published
    for preset in PRESETS:
        assert main([preset, "--plan"]) == 0
        assert "pixart-a4a-seed0" in capsys.readouterr().out
    assert main(["paper"]) == 2
    assert "needs --data" in capsys.readouterr().err


def test_options_that_say_nothing_are_refused() -> None:
    assert rates(["a4a=3e-4"]) == {"a4a": 3e-4}
    for given, message in ((["a4a"], "write METHOD=RATE"), (["b4b=1"], "no method 'b4b'")):
        with pytest.raises(ValueError, match=message):
            rates(given)
    changed = replace(PRESETS["small"], targets={})
    namespace = argparse.Namespace(seeds=[3], methods=["scratch"], targets=["sdxl"], rate=[], faces=None)
    with pytest.raises(ValueError, match="preset small has"):
        full.chosen(changed, namespace)


class TestWeights:
    def test_what_is_there_is_taken(self, tmp_path: Path) -> None:
        assert fetch(str(tmp_path)) == str(tmp_path)

    def test_a_name_that_is_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="is not there"):
            fetch("no/such/path/at/all")

    def test_a_gated_repository_says_where_to_accept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError

        class Refused(GatedRepoError):
            def __init__(self) -> None:  # without the response that the hub's client asks for
                Exception.__init__(self, "gated")

        def refuse(*_: Any, **__: Any) -> str:
            raise Refused

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(ValueError, match=r"is gated: accept its terms at https://huggingface.co/owner/name"):
            fetch("owner/name:file.safetensors")
