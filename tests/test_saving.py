"""`xadapt.save`: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.peft_model import safe_save_file
from torch import nn

import xadapt
from xadapt import InputAdaConfig


def peft_model(names: tuple[str, ...] = ("default",), alpha: int = 8) -> PeftModel:
    torch.manual_seed(0)
    config = InputAdaConfig(r=2, lora_alpha=alpha, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, InputAdaConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def base_of(model: PeftModel) -> nn.Module:
    base = nn.Sequential(nn.Linear(4, 4))
    base.load_state_dict({"0.weight": model.base_model.model[0].weight, "0.bias": model.base_model.model[0].bias})
    return base


@pytest.mark.parametrize("name", ["default", "other"])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, name: str) -> None:
    model = peft_model(("default", "other"))
    model.set_adapter(name)
    xadapt.save(model, tmp_path / "adapter", name)
    loaded = xadapt.load(base_of(model), tmp_path / "adapter")
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded(x), model(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    model = peft_model()
    folder = xadapt.save(model, tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    nn.init.zeros_(model.base_model.model[0].lora_B["default"].weight)
    xadapt.save(model, folder)
    loaded = xadapt.load(base_of(model), folder)
    assert not loaded.base_model.model[0].lora_B["default"].weight.any()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("earlier", [False, True], ids=["new folder", "over an earlier adapter"])
def test_an_interrupted_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    model = peft_model()
    folder = tmp_path / "adapter"
    if earlier:
        xadapt.save(model, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(tensors: dict[str, torch.Tensor], path: str, **options: object) -> None:
        safe_save_file(tensors, path)
        Path(path).write_bytes(Path(path).read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr("peft.peft_model.safe_save_file", interrupted)
    nn.init.zeros_(model.base_model.model[0].lora_B["default"].weight)
    with pytest.raises(KeyboardInterrupt):
        xadapt.save(model, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() == earlier


@pytest.mark.parametrize("step", range(6))
def test_an_interruption_between_two_files_leaves_nothing_that_loads_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Config and tensors of the two adapters fit each other; together they are a third one, which nobody trained."""
    old, new = peft_model(), peft_model(alpha=400)
    folder, x = xadapt.save(old, tmp_path / "adapter"), torch.randn(3, 4)
    left = step

    def interrupting(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("xadapt.saving.os.replace", interrupting(os.replace))
        patch.setattr(Path, "unlink", interrupting(Path.unlink))
        if step < 4:  # the old config, the model card, the tensors, the new config
            with pytest.raises(KeyboardInterrupt):
                xadapt.save(new, folder)
        else:
            xadapt.save(new, folder)
    if 0 < step < 4:
        with pytest.raises(ValueError, match=r"no adapter_config\.json"):
            xadapt.load(base_of(old), folder)
    else:
        loaded = xadapt.load(base_of(old), folder)
        torch.testing.assert_close(loaded(x), (old if step == 0 else new)(x))
    xadapt.save(new, folder)
    torch.testing.assert_close(xadapt.load(base_of(old), folder)(x), new(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("earlier", [False, True], ids=["new folder", "over an earlier adapter"])
def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path, earlier: bool) -> None:
    folder = tmp_path / "adapter"
    if earlier:
        xadapt.save(peft_model(), folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    xadapt.save(peft_model(alpha=400), folder, is_main_process=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() == earlier


def test_the_name_of_the_only_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'default'\. Pass adapter_name='z'\."):
        xadapt.save(peft_model(("z",)), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Did you mean 'second'\? Known: first, second"):
        xadapt.save(peft_model(("first", "second")), tmp_path / "adapter", "secnod")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), "gpt2"], ids=["a base", "a name"])
def test_what_is_no_peft_model(tmp_path: Path, model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"save\(\) takes the PeftModel that get_peft_model or xadapt\.load returned, got"
    ):
        xadapt.save(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_refuses_what_it_would_destroy(tmp_path: Path) -> None:
    model = peft_model()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        xadapt.save(model, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no adapter"):
        xadapt.save(model, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"no adapter 'defualt'\. Pass adapter_name='default'\."):
        xadapt.save(model, tmp_path / "new", "defualt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
