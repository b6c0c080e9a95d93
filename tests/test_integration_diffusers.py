"""diffusers: adapters on a U-Net and a transformer by its own API; and a file of ours is never taken for a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import xadapt
from tests.feature_models import randomise
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

from tests.conftest import make_unet

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning",  # for LoRA too, at the second adapter
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
COMMON: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "input": lambda: InputAdaConfig(**COMMON),
    "output": lambda: OutputAdaConfig(**COMMON),
    "tied": lambda: InputAdaConfig(tie=r"attn2\.to_[kv]$", **COMMON),
    "hybrid": lambda: HybridAdaConfig(feature_r=2, **COMMON),
    "full": lambda: FullAdaConfig(space="output", target_modules=TARGETS),
    "loha": lambda: feature_space(LoHaConfig(r=4, alpha=4, target_modules=TARGETS), "input"),
    "convolutions": lambda: OutputAdaConfig(r=4, lora_alpha=4, target_modules=["conv1", "conv2", "to_q"]),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def make_sd3() -> SD3Transformer2DModel:
    """Joint attention: text and image tokens in one sequence."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
    )
    return model.eval()


def make_pixart() -> PixArtTransformer2DModel:
    """Cross-attention in a transformer. diffusers gives it no adapter API; PEFT's works."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return model.eval()


def noise_of(model: nn.Module, **options: Any) -> Tensor:
    """What a denoiser predicts for one fixed noisy latent and text."""
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 24, generator=generator)
    if isinstance(model, SD3Transformer2DModel):
        options["pooled_projections"] = torch.randn(1, 12, generator=generator)
    noise: Tensor = model(latent, timestep=torch.tensor([10]), encoder_hidden_states=text, **options).sample
    return noise


def predicted(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return noise_of(model, **options)


def with_adapter(name: str, make: Callable[[], Any] = make_unet) -> Any:
    """A denoiser with a random adapter, put on by diffusers' own `add_adapter`."""
    model = make()
    model.add_adapter(CONFIGS[name]())
    randomise(model, std=0.1)
    return model


# Every config on the U-Net; on the transformer those for which it has layers of its own kind.
every_pair = pytest.mark.parametrize(
    ("name", "make"),
    [(name, make_unet) for name in CONFIGS] + [(name, make_sd3) for name in ("input", "output", "hybrid")],
)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


class TestAdapterApi:
    @every_pair
    def test_add_set_disable_delete(self, name: str, make: Callable[[], Any]) -> None:
        bare = predicted(make())
        model = with_adapter(name, make)
        first = predicted(model)
        assert not close(first, bare)
        model.add_adapter(CONFIGS[name](), "second")
        randomise(model, std=0.1, seed=2)
        second = predicted(model)
        assert not close(second, first)
        model.set_adapter("default")
        assert torch.equal(predicted(model), first)
        model.disable_adapters()
        assert torch.equal(predicted(model), bare)
        model.enable_adapters()
        assert torch.equal(predicted(model), first)
        model.delete_adapters(["second", "default"])
        assert torch.equal(predicted(model), bare)

    @every_config
    def test_weights(self, name: str) -> None:
        bare, model = predicted(make_unet()), with_adapter(name)
        first = predicted(model)
        model.add_adapter(CONFIGS[name](), "second")
        randomise(model, std=0.1, seed=2)
        second = predicted(model)
        for weights, expected in (([1.0, 0.0], first), ([0.0, 1.0], second), ([0.0, 0.0], bare)):
            model.set_adapters(["default", "second"], weights)
            assert close(predicted(model), expected)
        model.set_adapters(["default", "second"], [0.5, 0.5])
        assert not any(close(predicted(model), other) for other in (bare, first, second))

    @pytest.mark.parametrize("name", ["input", "output", "tied", "hybrid"])
    def test_half_the_weight_is_half_of_alpha(self, name: str) -> None:
        model, halved = with_adapter(name), make_unet()
        config: Any = CONFIGS[name]()
        config.lora_alpha = 2
        halved.add_adapter(config)
        randomise(halved, std=0.1)
        full, half = predicted(model), predicted(halved)
        assert close(predicted(model, cross_attention_kwargs={"scale": 0.5}), half)
        assert close(predicted(model), full)
        model.set_adapters("default", 0.5)
        assert close(predicted(model), half)

    @every_config
    def test_fuse_and_unfuse(self, name: str) -> None:
        bare, model = predicted(make_unet()), with_adapter(name)
        first = predicted(model)
        for options in ({}, {"safe_fusing": True}, {"adapter_names": ["default"]}):
            model.fuse_lora(**options)
            assert close(predicted(model), first)
            model.unfuse_lora()
            assert close(predicted(model), first)
        model.disable_adapters()
        assert close(predicted(model), bare)

    @every_config
    def test_fuse_at_a_scale(self, name: str) -> None:
        model = with_adapter(name)
        model.set_adapters("default", 0.5)
        half = predicted(model)
        model.set_adapters("default", 1.0)
        model.fuse_lora(lora_scale=0.5)
        assert close(predicted(model), half)
        assert not close(predicted(with_adapter(name)), half)

    @every_config
    def test_unload(self, name: str) -> None:
        model = with_adapter(name)
        model.unload_lora()
        assert list(model.state_dict()) == list(make_unet().state_dict())
        assert torch.equal(predicted(model), predicted(make_unet()))


class TestTraining:
    @every_pair
    def test_it_learns(self, name: str, make: Callable[[], Any]) -> None:
        model = make()
        model.requires_grad_(False)
        model.add_adapter(CONFIGS[name]())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = noise_of(model).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]

    @every_pair
    def test_gradient_checkpointing(self, name: str, make: Callable[[], Any]) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = with_adapter(name, make)
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.train()
            noise_of(model).pow(2).mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0]
        torch.testing.assert_close(gradients[1], gradients[0])


class TestFiles:
    @every_config
    @pytest.mark.parametrize("make", [make_unet, make_pixart])
    def test_saved_from_a_peft_model(self, name: str, make: Callable[[], Any], tmp_path: Path) -> None:
        model = get_peft_model(make(), CONFIGS[name]())
        randomise(model, std=0.1)
        model.eval().save_pretrained(tmp_path)
        assert not close(predicted(model), predicted(make()))
        assert torch.equal(predicted(xadapt.load(make(), tmp_path)), predicted(model))

    @every_config
    def test_state_dict_of_the_component(self, name: str) -> None:
        """What diffusers' training scripts do: the tensors alone, put back by PEFT's functions."""
        model, other = with_adapter(name), make_unet()
        inject_adapter_in_model(CONFIGS[name](), other)
        result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        assert not result.unexpected_keys
        assert torch.equal(predicted(other), predicted(model))

    @every_config
    @pytest.mark.parametrize("onto", ["bare", "adapted"])
    def test_diffusers_does_not_take_it_for_a_lora(self, name: str, onto: str, tmp_path: Path) -> None:
        """Its loader knows LoRA only. It must refuse ours, with its metadata or without, and leave the model working."""
        with_adapter(name).save_lora_adapter(tmp_path)
        (file,) = tmp_path.glob("*.safetensors")
        for source, options in ((tmp_path, {"use_safetensors": True}), (load_file(file), {})):
            model = make_unet() if onto == "bare" else with_adapter(name)
            before = predicted(model)
            with pytest.raises((TypeError, ValueError, IndexError)):
                model.load_lora_adapter(source, prefix=None, adapter_name="second", **options)
            assert torch.equal(predicted(model), before)

    @pytest.mark.parametrize("name", ["input", "output"])
    def test_a_lora_is_not_put_on_top(self, name: str) -> None:
        """A stock LoRA on the same layers would act on the features, were it let in."""
        lora = make_unet()
        lora.add_adapter(LoraConfig(**COMMON))
        randomise(lora, std=0.1)
        model = with_adapter(name)
        with pytest.raises(ValueError, match=f"{name} space"):
            model.load_lora_adapter(get_peft_model_state_dict(lora), prefix=None, adapter_name="second")
