"""`xadapt.files`: what is written may be read by those who may read any other new file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import xadapt
from tests.conftest import make_llama
from tests.verb_models import input_folder
from xadapt.files import beside, save_tensors, usual_access


@pytest.fixture(params=[0o027, 0o002], ids=["rw-r-----", "rw-rw-r--"])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(place: Path) -> dict[str, int]:
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files if path.is_file()}


def test_a_file_of_tensors(tmp_path: Path, mask: int) -> None:
    file = tmp_path / "one.safetensors"
    save_tensors({"a": torch.ones(2)}, file, {"format": "pt"})
    assert modes(tmp_path) == {"one.safetensors": 0o666 & ~mask}  # and nothing else is left there
    file.chmod(0o600)
    usual_access(file)
    assert modes(file) == {"one.safetensors": 0o666 & ~mask}


def test_names_beside_are_free(tmp_path: Path) -> None:
    names = {beside(tmp_path / "x") for _ in range(10)}
    assert len(names) == 10
    assert {name.parent for name in names} == {tmp_path}


def test_everything_that_is_written(tmp_path: Path, mask: int) -> None:
    adapter = input_folder(tmp_path / "adapter")
    make_llama().save_pretrained(tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        usual_access(file)  # transformers' own
    xadapt.transfer(adapter, tmp_path / "base", tmp_path / "base", "input_ada", out=tmp_path / "carried")
    xadapt.export_lora(adapter, tmp_path / "base", tmp_path / "lora")
    xadapt.merge(adapter, tmp_path / "base", tmp_path / "merged")
    for place in ("adapter", "carried", "lora", "merged"):
        found = modes(tmp_path / place)
        assert any(name.endswith(".safetensors") for name in found)
        assert set(found.values()) == {0o666 & ~mask}, (place, found)
        assert stat.S_IMODE((tmp_path / place).stat().st_mode) == 0o777 & ~mask
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
