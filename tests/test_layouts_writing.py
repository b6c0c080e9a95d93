"""LoRA files we write: stock PEFT and stock diffusers load them, and add to every weight what the LoRA adds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from tests.conftest import make_gpt2, make_llama, make_unet
from tests.feature_models import randomise
from tests.layout_models import (
    COMPONENTS,
    assert_same,
    deltas,
    live_deltas,
    loras_for,
    make_clip,
    make_pipeline,
    random_lora,
)
from xadapt.layouts import PlainLora, minimal_config, read_lora, write_diffusers, write_kohya, write_peft

Writer = Callable[..., Path]


class TestPeft:
    @pytest.mark.parametrize("make", [make_llama, make_unet, make_clip])
    def test_stock_peft_loads_it(self, make: Callable[[], nn.Module], tmp_path: Path) -> None:
        lora = random_lora(make())
        folder = write_peft(lora, tmp_path / "lora")
        model = PeftModel.from_pretrained(make(), folder)
        assert_same(live_deltas(model.base_model.model), deltas(lora))

    def test_it_is_what_peft_writes(self, tmp_path: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True)
        model = get_peft_model(make_llama(), config)
        randomise(model, std=0.1)
        model.save_pretrained(tmp_path / "stock")
        lora = read_lora(tmp_path / "stock").components[""]
        write_peft(lora, tmp_path / "ours")
        stock, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours"))
        assert stock.keys() == ours.keys()
        assert all(torch.equal(stock[name], ours[name]) for name in stock)
        one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "ours"))
        differ = {key for key in one if one[key] != other[key]}
        assert differ <= {"target_modules"}  # full paths: no base was given to shorten them by

    def test_embeddings_and_conv1d(self, tmp_path: Path, logits: Callable[[nn.Module], Tensor]) -> None:
        config = LoraConfig(r=4, lora_alpha=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
        model = get_peft_model(make_gpt2(), config)
        randomise(model, std=0.1)
        model.eval().save_pretrained(tmp_path / "stock", save_embedding_layers=False)
        names = [name for name, _ in make_gpt2().named_modules()]
        lora = read_lora(tmp_path / "stock", modules={"": names}).components[""]
        assert set(lora.config.target_modules) == {"wte", "c_attn"}
        again = PeftModel.from_pretrained(make_gpt2(), write_peft(lora, tmp_path / "ours"))
        assert torch.allclose(logits(again), logits(model), atol=1e-6)

    def test_targets_that_miss_a_layer(self, tmp_path: Path) -> None:
        lora = random_lora(make_llama(), ".*(q|v)_proj")
        config = minimal_config(lora.ranks_and_alphas())
        config.target_modules = ["q_proj"]
        with pytest.raises(ValueError, match=r"do not match 2 layers.*v_proj"):
            write_peft(PlainLora(config, lora.tensors), tmp_path / "lora")

    def test_a_rank_the_config_does_not_say(self, tmp_path: Path) -> None:
        lora = random_lora(make_llama(), ".*q_proj")
        with pytest.raises(ValueError, match="its config says 9"):
            write_peft(PlainLora(LoraConfig(r=9, target_modules=["q_proj"]), lora.tensors), tmp_path / "lora")


class TestDiffusers:
    @pytest.mark.parametrize("family", COMPONENTS)
    def test_stock_diffusers_loads_it(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        loras = loras_for(pipeline, family)
        pipeline.load_lora_weights(write_diffusers(loras, tmp_path / "lora.safetensors"))
        for component, lora in loras.items():
            assert_same(live_deltas(getattr(pipeline, component)), deltas(lora))

    @pytest.mark.parametrize("family", COMPONENTS)
    def test_we_read_it_back(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        loras = loras_for(pipeline, family)
        modules = {name: [path for path, _ in getattr(pipeline, name).named_modules()] for name in loras}
        file = read_lora(write_diffusers(loras, tmp_path / "lora.safetensors"), modules=modules)
        assert (file.layout, file.not_understood) == ("diffusers", ())
        for component, lora in loras.items():
            assert_same(deltas(file.components[component]), deltas(lora), 1e-12)
            assert file.components[component].config == lora.config

    def test_one_component_loads_by_its_own_method(self, tmp_path: Path) -> None:
        lora, unet = random_lora(make_unet()), make_unet()
        write_diffusers({"unet": lora}, tmp_path / "lora.safetensors")
        unet.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="unet")
        assert_same(live_deltas(unet), deltas(lora))

    def test_a_text_encoder_s_mlp_alone(self, tmp_path: Path) -> None:
        """In PEFT's own spelling diffusers could not tell what it is."""
        pipeline = make_pipeline("sd15")
        lora = random_lora(pipeline.text_encoder, ".*fc2")
        pipeline.load_lora_weights(write_diffusers({"text_encoder": lora}, tmp_path / "lora.safetensors"))
        assert_same(live_deltas(pipeline.text_encoder), deltas(lora))

    @pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # PEFT 0.21 of every lora_B.bias
    def test_biases_and_dora_of_a_unet(self, tmp_path: Path, noise: Callable[[nn.Module], Tensor]) -> None:
        for number, options in enumerate(({"lora_bias": True}, {"use_dora": True})):
            model, other = make_unet(), make_unet()
            config = LoraConfig(r=4, lora_alpha=2, target_modules=["proj_in", "to_out.0", "conv1"], **options)
            peft_model = get_peft_model(model, config)
            randomise(peft_model, std=0.1)
            peft_model.save_pretrained(tmp_path / str(number))
            lora = read_lora(tmp_path / str(number)).components[""]
            write_diffusers({"unet": lora}, tmp_path / f"{number}.safetensors")
            other.load_lora_adapter(tmp_path, weight_name=f"{number}.safetensors", prefix="unet")
            assert torch.allclose(noise(other), noise(peft_model.eval()), atol=1e-5)

    def test_refusals(self, tmp_path: Path) -> None:
        def layer(path: str, *extra: str) -> PlainLora:
            names = ("lora_A.weight", "lora_B.weight", *extra)
            config = minimal_config({path: (2, 2)}, use_dora="lora_magnitude_vector" in extra)
            return PlainLora(config, {f"{path}.{name}": torch.ones(2, 2) for name in names})

        target = tmp_path / "lora.safetensors"
        t5 = "encoder.block.0.layer.0.SelfAttention.q"
        with pytest.raises(ValueError, match=r"1 layers.*SelfAttention.q \(diffusers loads only CLIP.*xadapt merge"):
            write_diffusers({"text_encoder_2": layer(t5)}, target)
        with pytest.raises(ValueError, match="DoRA"):
            write_diffusers({"text_encoder": layer("encoder.layers.0.mlp.fc1", "lora_magnitude_vector")}, target)
        with pytest.raises(ValueError, match=r"got 'text_encoder_3'; it has a place for unet"):
            write_diffusers({"text_encoder_3": layer(t5)}, target)
        with pytest.raises(ValueError, match="no components"):
            write_diffusers({}, target)
        assert not list(tmp_path.iterdir())


class TestPlaces:
    @pytest.mark.parametrize("write", [write_diffusers, write_kohya])
    def test_files(self, write: Writer, tmp_path: Path) -> None:
        loras = {"unet": random_lora(make_unet(), ".*to_q")}
        target = tmp_path / "new" / "lora.safetensors"
        write(loras, target)
        before = target.read_bytes()
        with pytest.raises(ValueError, match="overwrite=True"):
            write(loras, target)
        with pytest.raises(ValueError, match=r"end in \.safetensors"):
            write(loras, tmp_path / "lora.bin")
        write({"unet": random_lora(make_unet(), ".*to_k")}, target, overwrite=True)
        assert target.read_bytes() != before
        assert [entry.name for entry in target.parent.iterdir()] == ["lora.safetensors"]

    def test_folders(self, tmp_path: Path) -> None:
        lora, other = random_lora(make_llama(), ".*q_proj"), random_lora(make_llama(), ".*v_proj")
        write_peft(lora, tmp_path / "lora")
        (tmp_path / "lora" / "README.md").write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            write_peft(other, tmp_path / "lora")
        write_peft(other, tmp_path / "lora", overwrite=True)
        assert_same(deltas(read_lora(tmp_path / "lora").components[""]), deltas(other))
        assert (tmp_path / "lora" / "README.md").read_text() == "mine"
        (tmp_path / "else").mkdir()
        with pytest.raises(ValueError, match="only an adapter folder"):
            write_peft(other, tmp_path / "else", overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_nothing(self, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lora = random_lora(make_unet(), ".*to_q")
        target = tmp_path / "lora.safetensors"
        if overwrite:
            write_diffusers({"unet": lora}, target)
        before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}

        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "replace", full)
        for write in (write_diffusers, write_kohya):
            with pytest.raises(OSError, match="No space"):
                write({"unet": lora}, target, overwrite=overwrite)
        with pytest.raises(OSError, match="No space"):
            write_peft(lora, tmp_path / "folder")
        assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before

    def test_metadata_says_no_more_than_it_must(self, tmp_path: Path) -> None:
        path = write_diffusers({"unet": random_lora(make_unet(), ".*to_q", alpha=4)}, tmp_path / "lora.safetensors")
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["unet.target_modules"] == ["to_q"]
        assert "unet.peft_version" not in metadata
