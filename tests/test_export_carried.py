"""Exports of adapters that carry more than an adapter: whole modules, tensors of the base, old names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.conftest import make_llama
from tests.feature_models import Mlp, OneLayer, adapted
from tests.test_export_limits import TARGETS, export, make_moved_unet
from xadapt import InputAdaConfig, OutputAdaConfig
from xadapt.carried_along import saved_modules
from xadapt.contract import Adapter
from xadapt.folding import layers_of


class TestSavedModules:
    """modules_to_save, which are replaced and not added to."""

    @pytest.mark.parametrize("dora", [False, True])
    def test_that_are_not_in_the_file(self, dora: bool) -> None:
        config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"], use_dora=dora)
        adapter = xadapt.detach(adapted(Mlp(), config))
        assert set(saved_modules(adapter)) == {"head.weight", "head.bias"}
        tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith("head.")}
        with pytest.raises(ValueError, match=r"brings head along whole .* no tensors for that"):
            layers_of([dataclasses.replace(adapter, tensors=tensors)], xadapt.open_base(Mlp()))

    def test_that_no_base_has(self) -> None:
        """PEFT lists "classifier" and "score" for every classifier, whatever its head is called."""
        config = LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head", "score"])
        assert len(layers_of([xadapt.detach(adapted(Mlp(), config))], xadapt.open_base(Mlp()))) == 2

    @pytest.mark.parametrize("name", ["ead", "head", "norm", "mlp"])
    def test_by_peft_s_rule(self, name: str) -> None:
        """The end of the string, also within a name: PEFT itself says what it saves."""
        tuner = adapted(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name]))
        adapter = xadapt.detach(tuner)
        own = {name for name in adapter.tensors if ".lora_" not in name}
        assert own
        assert set(saved_modules(adapter)) == own
        assert len(layers_of([adapter], xadapt.open_base(make_llama()))) == 2


class TestTensorsOfTheBase:
    """PEFT's save_pretrained writes the embeddings too, where they are adapted or resized, or on demand."""

    CONFIGS: ClassVar[dict[str, Callable[[], PeftConfig]]] = {
        "adapted head": lambda: LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
        "adapted embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        "neither": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
        "dora": lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        "output": lambda: OutputAdaConfig(r=2, target_modules=["lm_head", "q_proj"]),
    }

    def folder(self, name: str, tmp_path: Path, base: Any = None) -> Path:
        tuner = adapted(base or make_llama(), self.CONFIGS[name]())
        tuner.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
        carried = [key for key in load_file(tmp_path / "adapter/adapter_model.safetensors") if "base_layer.w" in key]
        assert bool(carried) == (name in ("adapted head", "adapted embedding", "output"))
        return tmp_path / "adapter"

    @pytest.mark.parametrize("name", CONFIGS)
    def test_that_are_the_base_s_are_left_out(self, name: str, tmp_path: Path) -> None:
        folder = self.folder(name, tmp_path)
        base = xadapt.open_base(make_llama())
        layers = layers_of([xadapt.read_adapter(folder)], base)
        expected = layers_of([xadapt.detach(adapted(make_llama(), self.CONFIGS[name]()))], base)
        assert [layer.path for layer in layers] == [layer.path for layer in expected]
        for layer, other in zip(layers, expected, strict=True):
            one, two = (found.update(base.weights()).matrix.tensor() for found in (layer, other))
            assert torch.equal(one, two)

    def test_in_another_dtype(self, tmp_path: Path) -> None:
        folder = self.folder("adapted head", tmp_path, make_llama().half())
        assert len(layers_of([xadapt.read_adapter(folder)], xadapt.open_base(make_llama()))) == 3

    @pytest.mark.parametrize("name", CONFIGS)
    def test_with_other_numbers(self, name: str, tmp_path: Path) -> None:
        folder = self.folder(name, tmp_path)
        with pytest.raises(
            ValueError, match=r"carries the base's .*weight, with other numbers .*embedding_layers=False"
        ):
            layers_of([xadapt.read_adapter(folder)], xadapt.open_base(make_llama(seed=1)))

    def test_of_a_vocabulary_that_was_resized(self, tmp_path: Path) -> None:
        base = make_llama()
        base.resize_token_embeddings(70)
        folder = self.folder("neither", tmp_path, base)
        with pytest.raises(
            ValueError, match=r"carries the base.s .*weight, of shape \(70, 32\), .* resize_token_embeddings"
        ):
            layers_of([xadapt.read_adapter(folder)], xadapt.open_base(make_llama()))


class TestOldNames:
    """transformers 5 has dropped CLIP's `text_model.`; adapters that were trained before have it."""

    CONFIGS: ClassVar[dict[str, Callable[[], PeftConfig]]] = {
        "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"]),
        "dora": lambda: LoraConfig(
            r=2, use_dora=True, target_modules=["q_proj"], alpha_pattern={"^encoder.layers.0.self_attn.q_proj": 3}
        ),
        "loha": lambda: LoHaConfig(
            r=2, target_modules=r"encoder.*q_proj", rank_pattern={"layers.1.self_attn.q_proj": 3}
        ),
    }

    def clip(self) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        config = CLIPTextConfig(
            vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4
        )
        model = CLIPTextModel(config).eval()
        if hasattr(model, "text_model"):
            pytest.skip("this transformers has the old names")
        return model

    def old(self, name: str) -> tuple[Adapter, Adapter]:
        """An adapter, and the same one as it was saved with the names of old."""
        adapter = xadapt.detach(adapted(self.clip(), self.CONFIGS[name]()))
        config = copy.deepcopy(adapter.config)
        for option in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(config, option)
            setattr(config, option, {key.replace("encoder.", "text_model.encoder."): v for key, v in pattern.items()})
        if isinstance(config.target_modules, str):
            config.target_modules = rf"text_model\.{config.target_modules}"
        tensors = {f"text_model.{key}": tensor for key, tensor in adapter.tensors.items()}
        return adapter, dataclasses.replace(adapter, config=config, tensors=tensors)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_mean_the_layers_of_the_base(self, name: str) -> None:
        base = xadapt.open_base(self.clip())
        new, old = (layers_of([adapter], base) for adapter in self.old(name))
        assert len(new) == len(old) == 2
        for layer, other in zip(new, old, strict=True):
            assert layer.path == other.path
            one, two = (found.update(base.weights()).matrix.tensor() for found in (layer, other))
            assert float(one.norm()) > 0
            assert torch.equal(one, two)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_and_the_other_way_round(self, name: str) -> None:
        model = nn.Module()
        model.text_model = self.clip()
        base, straight = xadapt.open_base(model), xadapt.open_base(self.clip())
        adapter = self.old(name)[0]
        new, wrapped = layers_of([adapter], straight), layers_of([adapter], base)
        assert [f"text_model.{layer.path}" for layer in new] == [layer.path for layer in wrapped]
        for layer, other in zip(new, wrapped, strict=True):
            one, two = layer.update(straight.weights()), other.update(base.weights())
            assert torch.equal(one.matrix.tensor(), two.matrix.tensor())

    @pytest.mark.parametrize("name", CONFIGS)
    def test_beside_the_new_ones_are_refused(self, name: str) -> None:
        new, old = self.old(name)
        both = dataclasses.replace(new, tensors={**new.tensors, **old.tensors})
        with pytest.raises(ValueError, match=r"q_proj in the base: the adapter holds that layer twice"):
            layers_of([both], xadapt.open_base(self.clip()))


@pytest.mark.parametrize(("make", "named"), [(Mlp, None), (make_llama, "somewhere/llama")])
def test_the_config_names_no_base_that_is_not_there(make: Any, named: str | None, tmp_path: Path) -> None:
    base = make()
    if named:
        base.config._name_or_path = named
    target = "lin0" if make is Mlp else "q_proj"
    report = export(adapted(make(), LoraConfig(r=2, target_modules=[target])), base, tmp_path / "lora")
    assert LoraConfig.from_pretrained(str(report.out)).base_model_name_or_path == named


def test_kohya_without_the_bias_is_an_approximation_that_is_reported(tmp_path: Path) -> None:
    tuner = adapted(make_moved_unet(), OutputAdaConfig(r=2, target_modules=["to_out.0", "to_q"]))
    out = tmp_path / "lora.safetensors"
    report = export(tuner, make_moved_unet(), out, layout="kohya", drop_bias=True)
    assert not report.exact
    assert all((layer.dropped_bias > 0) == layer.path.endswith("to_out.0") for layer in report.layers)
    assert {name.rpartition(".")[2] for name in load_file(out)} == {"weight", "alpha"}


def test_a_constant_before_padding_is_no_bias(tmp_path: Path) -> None:
    """At the border the kernel meets zeros instead of the constant, so no bias could say the same."""
    conv = nn.Conv2d(4, 6, 3, padding=1)
    tuner = adapted(OneLayer(conv), InputAdaConfig(r=2, target_modules=["layer"], lora_bias=True))
    with pytest.raises(ValueError, match="at the padded border"):
        export(tuner, OneLayer(nn.Conv2d(4, 6, 3, padding=1)), tmp_path / "lora")
    assert not list(tmp_path.iterdir())
