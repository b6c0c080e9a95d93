"""Adapters read without a base: PEFT folders, LoRA files, live models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

import xadapt
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig
from xadapt.folding import layers_of
from xadapt.layouts import write_diffusers
from xadapt.layouts.plain import PlainLora
from xadapt.reading import detach, read_adapter
from xadapt.sources import adapters_from

MakeBase = Callable[..., nn.Module]
TARGETS = ["q_proj", "v_proj"]


def trained(base: nn.Module, config: Any) -> Any:
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (InputAdaConfig(r=2, target_modules=TARGETS), "input_ada"),
        (LoraConfig(r=2, target_modules=TARGETS), "lora"),
        (LoHaConfig(r=2, target_modules=TARGETS), "loha"),
    ],
    ids=["ours", "stock LoRA", "stock LoHa"],
)
def test_a_folder_has_its_kind_config_and_tensors(llama: nn.Module, config: Any, kind: str, tmp_path: Path) -> None:
    model = trained(llama, config)
    xadapt.save(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.kind.name == kind
    assert adapter.config.target_modules == set(TARGETS)
    expected = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
    assert adapter.tensors.keys() == expected.keys()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(tensor, expected[name])


def test_a_live_model_gives_what_its_folder_gives(llama: nn.Module, tmp_path: Path) -> None:
    model = trained(llama, InputAdaConfig(r=2, target_modules=TARGETS))
    xadapt.save(model, tmp_path / "adapter")
    live, stored = detach(model), read_adapter(tmp_path / "adapter")
    assert live.kind == stored.kind
    assert live.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(live.tensors[name], stored.tensors[name]) for name in stored.tensors)
    assert not any(tensor.requires_grad for tensor in live.tensors.values())


def test_of_several_adapters_one_is_chosen(llama: nn.Module) -> None:
    model = trained(llama, InputAdaConfig(r=2, target_modules=TARGETS))
    model.add_adapter("other", InputAdaConfig(r=3, target_modules=TARGETS))
    assert detach(model).config.r == 2
    assert detach(model, "other").config.r == 3
    with pytest.raises(ValueError, match=r"'default', 'other'"):
        detach(model, "no such")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Choose one adapter"):
        detach(model)


SCALED: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, alpha_pattern={"q_proj": 5}),
    "input": lambda: InputAdaConfig(r=2, target_modules=TARGETS, alpha_pattern={"q_proj": 5}),
    "output": lambda: OutputAdaConfig(r=2, use_rslora=True, target_modules=TARGETS),
    "hybrid": lambda: HybridAdaConfig(r=4, feature_r=1, target_modules=TARGETS),
    "rslora hybrid": lambda: HybridAdaConfig(r=4, feature_r=3, use_rslora=True, target_modules=TARGETS),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_rescaled_adapter_is_refused(name: str, llama: nn.Module) -> None:
    model = trained(llama, SCALED[name]())
    assert detach(model).tensors
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"q_proj of adapter 'default' was rescaled to .*weights="):
        detach(model)


def test_what_all_layers_share_is_read_too(llama: nn.Module, tmp_path: Path) -> None:
    model = trained(llama, VeraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    xadapt.save(model, tmp_path / "adapter")
    stored, live = read_adapter(tmp_path / "adapter"), detach(model)
    assert stored.tensors.keys() == live.tensors.keys()
    assert stored.tensors["base_model.vera_A"].shape == (2, 32)
    assert all(torch.equal(tensor, live.tensors[name]) for name, tensor in stored.tensors.items())


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        layers = {"unet": "mid_block.attentions.0.to_q", "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj"}
        components = {
            component: PlainLora(
                LoraConfig(r=2, lora_alpha=4, target_modules=[path]),
                {f"{path}.lora_A.weight": torch.randn(2, 8), f"{path}.lora_B.weight": torch.randn(8, 2)},
            )
            for component, path in layers.items()
        }
        return write_diffusers(components, tmp_path / "lora.safetensors")

    def test_one_component_is_chosen(self, file: Path) -> None:
        adapter = read_adapter(file, component="unet")
        assert adapter.kind.name == "lora"
        assert set(adapter.tensors) == {
            "mid_block.attentions.0.to_q.lora_A.weight",
            "mid_block.attentions.0.to_q.lora_B.weight",
        }
        with pytest.raises(ValueError, match=r"choose one: component='text_encoder' or 'unet'"):
            read_adapter(file)
        with pytest.raises(ValueError, match=r"component='transformer'; choose"):
            read_adapter(file, component="transformer")

    def test_a_path_is_a_whole_path(self, tmp_path: Path) -> None:
        """FLUX has proj_out, and single_transformer_blocks.N.proj_out; as the end of a path the first would match both."""
        tensors = {"proj_out.lora_A.weight": torch.randn(2, 8), "proj_out.lora_B.weight": torch.randn(8, 2)}
        lora = PlainLora(LoraConfig(r=2, target_modules=["proj_out"]), tensors)
        path = write_diffusers({"transformer": lora}, tmp_path / "lora.safetensors")
        base = nn.ModuleDict({"proj_out": nn.Linear(8, 8), "blocks": nn.ModuleDict({"proj_out": nn.Linear(8, 8)})})
        (layer,) = layers_of([read_adapter(path)], xadapt.open_base(base))
        assert layer.path == "proj_out"

    def test_a_folder_of_diffusers_is_read(self, file: Path, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        file.rename(folder / "pytorch_lora_weights.safetensors")
        assert read_adapter(folder, component="unet").kind.name == "lora"


def test_what_is_no_adapter_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "gone"):
        with pytest.raises(ValueError, match=str(path)):
            read_adapter(path)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(llama, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"prompt method .* adapts no layer"):
        read_adapter(tmp_path / "prompt")


def test_what_may_stand_for_an_adapter(llama: nn.Module, tmp_path: Path) -> None:
    model = trained(llama, InputAdaConfig(r=2, target_modules=TARGETS))
    folder = xadapt.save(model, tmp_path / "adapter")
    read = read_adapter(folder)
    found = adapters_from([str(folder), folder, model, read])
    assert len(found) == 4
    assert found[3] is read
    with pytest.raises(ValueError, match="empty list"):
        adapters_from([])
    with pytest.raises(TypeError, match="got int"):
        adapters_from(3)
