"""A sweep: adapters to targets by methods, each cell once; what is refused is a result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.frame.driver import main
from benchmarks.frame.settings import read_preset
from benchmarks.frame.store import Store
from benchmarks.frame.sweep import plan
from benchmarks.sweep.__main__ import DRIVER
from benchmarks.sweep.settings import Settings, stages
from tests.conftest import make_llama
from tests.verb_models import drifted, input_folder, lora_folder


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sweep")
    source = make_llama()
    source.save_pretrained(work / "source")
    drifted(source).save_pretrained(work / "near")
    make_llama(seed=7).save_pretrained(work / "other")
    lora_folder(work / "lora")
    input_folder(work / "input")
    lines = "\n".join(
        f'{name} = ["{work}/{first}", "{work}/{second}"]'
        for name, first, second in (("adapters", "lora", "input"), ("targets", "near", "other"))
    )
    (work / "my.toml").write_text(
        f'source = "{work}/source"\n{lines}\nmethods = ["auto", "lora_x"]\n[options.lora_x]\nrank = 8\n'
    )
    return work / "my.toml"


def test_every_adapter_goes_to_every_target(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(preset), "--out", str(tmp_path)]
    assert main(DRIVER, command) == 0
    store = Store(tmp_path)
    records = list(store.records())
    assert len(records) == 8
    refused = {(Path(r["settings"]["target"]).name, r["settings"]["method"]) for r in records if r["result"]["refused"]}
    assert refused == {("other", "auto")}
    table = (tmp_path / "my.md").read_text()
    assert table.count("refused") == 2
    assert table.count("written") == 6
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert main(DRIVER, command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == times
    assert "8 of 8 cells" in capsys.readouterr().out


def test_the_plan_names_the_cells(preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(DRIVER, [str(preset), "--out", str(tmp_path / "none"), "--plan"]) == 0
    assert capsys.readouterr().out.count(" by lora_x") == 4
    assert not (tmp_path / "none" / "cells").exists()


def test_another_adapter_in_the_same_folder_is_another_cell(preset: Path, tmp_path: Path) -> None:
    settings = read_preset(Settings, preset)
    (tmp_path / "adapter").mkdir()
    settings = replace(settings, adapters=(str(tmp_path / "adapter"),), targets=settings.targets[:1])
    names = []
    for content in ("one", "two", "one"):
        (tmp_path / "adapter" / "adapter_model.safetensors").write_text(content)
        names.append([cell.name for cell in plan(stages, settings, Store(tmp_path)).cells])
    assert names[0] == names[2]
    assert not set(names[0]) & set(names[1])


def test_mistakes_are_told_before_anything_runs(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(DRIVER, [str(preset), "--out", str(tmp_path), "--methods", '["lora_y"]']) == 2
    assert "lora_x" in capsys.readouterr().err
    assert main(DRIVER, [str(preset), "--out", str(tmp_path), "--methods", '["copy"]']) == 2
    assert "options are given for lora_x" in capsys.readouterr().err


def test_the_example_is_read() -> None:
    settings = read_preset(Settings, DRIVER.presets / "example.toml")
    assert settings.options["lora_x"] == {"rank": 64}
