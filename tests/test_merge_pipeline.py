"""Merging into one component of a diffusers pipeline, which is written whole; and LoRA files as the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
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


def test_an_open_component_brings_its_pipeline_along(pipeline: Path, tmp_path: Path) -> None:
    adapter = adapter_for("unet", tmp_path / "adapter")
    xadapt.merge(adapter, xadapt.open_base(pipeline, component="unet"), tmp_path / "merged", component="unet")
    assert "text_encoder/config.json" in files_in(tmp_path / "merged")
    xadapt.merge(adapter, xadapt.open_base(pipeline, component="unet"), tmp_path / "alone")
    assert files_in(tmp_path / "alone") == files_in(pipeline / "unet")


@pytest.mark.parametrize("how", ["opened", "folder"])
@pytest.mark.parametrize("beside", ["nothing", "another pipeline"])
def test_what_lies_beside_a_bare_folder_stays_there(how: str, beside: str, pipeline: Path, tmp_path: Path) -> None:
    """A component says then which part of the adapter is meant."""
    (pipeline / "model_index.json").write_text('{"_class_name": "X"}')
    if beside == "nothing":
        (pipeline / "model_index.json").unlink()
    base: Any = pipeline / "unet"
    base = xadapt.open_base(base) if how == "opened" else base
    plan = xadapt.merge(adapter_for("unet", tmp_path / "adapter"), base, tmp_path / "merged", component="unet")
    assert files_in(tmp_path / "merged") == files_in(pipeline / "unet")
    assert len(plan.files) == 2


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_part_of_a_file_onto_a_bare_folder(component: str, suffix: str, pipeline: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in COMPONENTS:
        file = tmp_path / f"{name}.safetensors"
        adapter = adapter_for(name, tmp_path / name)
        xadapt.export_lora(adapter, pipeline, file, layout="kohya", component=name)
        tensors |= load_file(file)
    both, base = tmp_path / f"both{suffix}", pipeline / component
    save_file(tensors, both) if suffix == ".safetensors" else torch.save(tensors, both)
    options: Any = {"component": component, "allow_pickle": suffix == ".bin"}
    with pytest.raises(ValueError, match=r"choose one: component='text_encoder' or 'unet'"):
        xadapt.merge(both, base, tmp_path / "one", allow_pickle=True)
    xadapt.merge(tmp_path / component, pipeline, tmp_path / "one", component=component)
    xadapt.merge(both, base, tmp_path / "two", **options)
    one, two = tensors_of(tmp_path / "one" / component), tensors_of(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6)
    report = xadapt.export_lora(both, base, tmp_path / "lora", **options)
    assert report.exact
    assert len(report.layers) == len(xadapt.plan_merge(both, base, tmp_path / "x", **options).layers)


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
