"""accelerate's offloading: what is not in memory is brought back for a forward pass and for a merge, as with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import xadapt
from tests.conftest import make_llama
from tests.feature_models import randomise
from tests.language_models import CONFIGS, TARGETS, adapted_llama, loss_and_gradients, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning"),  # PEFT loads twice
]

Offload = Callable[[nn.Module], None]


@pytest.fixture(params=["memory", "disk"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Offload:
    if request.param == "memory":
        return lambda model: cpu_offload(model, execution_device="cpu")
    return lambda model: disk_offload(model, str(tmp_path / "offloaded"), execution_device="cpu")


def base_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.weight"):
            yield parameter


@pytest.mark.parametrize("name", CONFIGS)
class TestOffloaded:
    def test_forward(self, name: str, offload: Offload) -> None:
        model, offloaded = adapted_llama(name), adapted_llama(name)
        offload(offloaded)
        assert {weight.device.type for weight in base_weights(offloaded)} == {"meta"}
        assert torch.equal(outputs(offloaded), outputs(model))
        with model.disable_adapter(), offloaded.disable_adapter():
            assert torch.equal(outputs(offloaded), outputs(model))

    def test_merge(self, name: str, offload: Offload) -> None:
        model = adapted_llama(name)
        before = outputs(model)
        offload(model)
        model.merge_adapter()
        torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=0.0)
        assert {weight.device.type for weight in base_weights(model)} == {"meta"}
        model.unmerge_adapter()
        torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=0.0)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(outputs(model), before, atol=1e-5, rtol=0.0)

    def test_training_above_an_offloaded_base(self, name: str) -> None:
        loss, gradients = loss_and_gradients(adapted_llama(name))
        model = adapted_llama(name)
        for module in list(model.modules()):
            if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
                cpu_offload(base, execution_device="cpu")
        again, same = loss_and_gradients(model)
        assert again == loss
        torch.testing.assert_close(same, gradients)


def with_last_block_on_disk(folder: Path, offloaded: Path) -> nn.Module:
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=offloaded)
    return base.eval()


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, xadapt.load], ids=["peft", "xadapt"])
@pytest.mark.parametrize("name", [*CONFIGS, "lora"])
def test_loaded_onto_a_base_with_blocks_on_disk(name: str, load: Callable[..., PeftModel], tmp_path: Path) -> None:
    configs = {**CONFIGS, "lora": lambda: LoraConfig(r=4, target_modules=TARGETS)}
    model = get_peft_model(make_llama(), configs[name]())
    randomise(model, std=0.1)
    expected = outputs(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    checkpoint = tmp_path / "models--base"  # PEFT looks for the two dashes of hub folders
    make_llama().save_pretrained(checkpoint)
    base = with_last_block_on_disk(checkpoint, tmp_path / "offloaded")
    device_map = {f"base_model.model.{path}": device for path, device in base.hf_device_map.items()}  # type: ignore[union-attr, operator]
    loaded = load(base, tmp_path / "adapter", device_map=device_map, offload_folder=str(tmp_path / "again"))
    assert "meta" in {weight.device.type for weight in base_weights(loaded)}
    torch.testing.assert_close(outputs(loaded), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected, atol=1e-5, rtol=0.0)
