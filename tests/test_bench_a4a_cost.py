"""benchmarks/a4a_cost: what is timed computes what it says, and a short run writes its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[bench]")

from benchmarks.a4a_cost.__main__ import cells, main
from benchmarks.a4a_cost.models import Shape
from benchmarks.a4a_cost.steps import Bench
from xadapt_a4a.targets import find_attention_layers

SOURCE = Shape(name="source", kind="sd15", divide=8, side=8)


@pytest.mark.parametrize("kind", ["sd15", "pixart"])
def test_the_reference_acts_in_every_variant_that_has_one(kind: str) -> None:
    bench = Bench(
        Shape(name=kind, kind=kind, divide=8 if kind == "sd15" else 24, side=8), SOURCE, 4, "cpu", torch.float32
    )
    steps = bench.denoising()
    bare, carried, native = (steps[name]() for name in ("bare", "a4a", "native"))
    assert not torch.allclose(bare, carried)
    assert not torch.allclose(bare, native)
    bench.attachment.detach()
    torch.testing.assert_close(steps["a4a"](), bare, rtol=0, atol=0)


def test_training_steps_change_the_adapters_alone() -> None:
    bench = Bench(Shape(name="pixart", kind="pixart", divide=24, side=8), SOURCE, 16, "cpu", torch.float32)
    target = {name: one.clone() for name, one in bench.target.state_dict().items()}
    adapter = [one.clone() for one in bench.adapter.parameters()]
    for step in bench.training().values():
        step()
    assert all(torch.equal(one, target[name]) for name, one in bench.target.state_dict().items())
    moved = [not torch.equal(a, b) for a, b in zip(adapter, bench.adapter.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_full_shapes_have_the_layers_of_the_real_models() -> None:
    for target, _ in cells("cuda", short=False):
        with torch.device("meta"):
            layers = find_attention_layers(target.build("meta", torch.float32))
        assert len(layers) == {"sdxl": 70, "sd15": 16, "pixart": 28}[target.kind]
        assert {layer.width for layer in layers} == {
            "sdxl": {640, 1280},
            "sd15": {320, 640, 1280},
            "pixart": {1152},
        }[target.kind]


def test_a_short_run_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.a4a_cost import __main__ as command

    monkeypatch.setattr(command, "TOKENS", (4,))
    monkeypatch.setattr(
        command, "cells", lambda device, short: [one for one in cells(device, True) if "PixArt" in one[0].name]
    )
    main(["--short", "--seconds", "0.05", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert row["rounds"] >= 10
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert all(size > 0 for size in row["bytes"].values())
    assert "both models ÷ native" in (tmp_path / "cpu.md").read_text()
