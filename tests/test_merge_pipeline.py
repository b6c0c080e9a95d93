"""Merging into one component of a diffusers pipeline, which is written whole; and LoRA files as the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from diffusers import DiffusionPipeline, UNet2DConditionModel

import xadapt
from tests.conftest import make_unet
from tests.layout_models import make_clip, make_pipeline
from tests.merge_models import files_in, make_adapter, tensors_of
from xadapt import InputAdaConfig

ABSENT = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))  # from the tiny pipeline
COMPONENTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "unet": (make_unet, ["to_q", "to_out.0", "conv1"]),
    "text_encoder": (make_clip, ["q_proj", "fc1"]),
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    make_pipeline("sd15").save_pretrained(tmp_path / "sd15")
    (tmp_path / "sd15" / "v1-5-pruned.safetensors").write_bytes(b"everything in one file")
    return tmp_path / "sd15"


def adapter_for(component: str, folder: Path) -> Path:
    make, targets = COMPONENTS[component]
    return make_adapter(folder, InputAdaConfig(r=2, lora_alpha=3, target_modules=targets), make)


@pytest.mark.parametrize("link", [False, True])
def test_it_is_written_whole(link: bool, pipeline: Path, tmp_path: Path, noise: Callable[[nn.Module], Tensor]) -> None:
    out = tmp_path / "merged"
    adapter, before = adapter_for("unet", tmp_path / "adapter"), files_in(pipeline)
    if link:  # a component that lies elsewhere
        (pipeline / "unet").rename(tmp_path / "elsewhere")
        (pipeline / "unet").symlink_to(tmp_path / "elsewhere")
    xadapt.merge(adapter, pipeline, out, component="unet")
    assert before - files_in(out) == {"v1-5-pruned.safetensors"}
    expected = noise(xadapt.load(UNet2DConditionModel.from_pretrained(pipeline / "unet"), adapter))
    torch.testing.assert_close(noise(UNet2DConditionModel.from_pretrained(out / "unet")), expected)
    whole: Any = DiffusionPipeline.from_pretrained(out, **ABSENT)
    torch.testing.assert_close(noise(whole.unet), expected)
    (encoder,) = (pipeline / "text_encoder").glob("*.safetensors")
    assert (out / "text_encoder" / encoder.name).read_bytes() == encoder.read_bytes()


def test_a_component_by_itself(pipeline: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", LoraConfig(r=2, target_modules=["to_q"]), make_unet)
    xadapt.merge(adapter, pipeline / "unet", tmp_path / "merged")
    assert files_in(tmp_path / "merged") == files_in(pipeline / "unet")


def test_which_component_is_not_guessed(pipeline: Path, tmp_path: Path) -> None:
    adapter = adapter_for("unet", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is a pipeline; say which part: component='NAME'. Known: .*unet"):
        xadapt.merge(adapter, pipeline, tmp_path / "merged")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_file_is_the_adapter_it_was_made_of(component: str, layout: str, pipeline: Path, tmp_path: Path) -> None:
    """Its text encoder's layers have `text_model.` before their names, which transformers 5 has dropped."""
    adapter, file = adapter_for(component, tmp_path / "adapter"), tmp_path / "lora.safetensors"
    xadapt.export_lora(adapter, pipeline, file, layout=layout, component=component)
    for name, source in (("one", adapter), ("two", file)):
        xadapt.merge(source, pipeline, tmp_path / name, component=component)
    bare, one, two = (tensors_of(folder / component) for folder in (pipeline, tmp_path / "one", tmp_path / "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(bare[name], one[name]) for name in bare)
