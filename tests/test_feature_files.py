"""Adapters out of the model and back: folders, state dicts, copies, pickles, PEFT's conversion to LoRA."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.feature_models import (
    CONFIG,
    SPACES,
    Mlp,
    OneLayer,
    adapted,
    attach,
    base_layer,
    every_case,
    feature_layers,
    features_for,
    load,
    mlp_batch,
    train,
    with_second,
)

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)
Logits = Callable[[nn.Module], Tensor]


def trained(space: str, **options: Any) -> PeftModel:
    return adapted(Mlp(), CONFIG[space](r=2, lora_alpha=3, target_modules=TARGETS, **options))


@both_spaces
class TestFolder:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_dora": True},
            {"modules_to_save": ["head"]},
            {"bias": "lora_only"},
            {"bias": "all"},
            {"use_rslora": True, "rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 7}},
        ],
        ids=str,
    )
    def test_loaded_it_does_what_it_did(self, space: str, options: dict[str, Any], tmp_path: Path) -> None:
        model = trained(space, **options)
        train(model, mlp_batch())
        model.save_pretrained(tmp_path)
        loaded = load(Mlp(), tmp_path)
        assert torch.equal(loaded(mlp_batch()), model(mlp_batch()))
        assert not torch.allclose(model(mlp_batch()), Mlp()(mlp_batch()))

    def test_what_it_holds(self, space: str, tmp_path: Path) -> None:
        trained(space).save_pretrained(tmp_path)
        phi = f"{space}_ada_phi"
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
            f"base_model.model.{layer}.{phi}.lora_{m}.weight" for layer in TARGETS for m in "AB"
        }
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == f"{space.upper()}_ADA"
        assert (config["r"], config["lora_alpha"]) == (2, 3)
        assert config["xadapt_version"]

    def test_the_config_alone(self, space: str, tmp_path: Path) -> None:
        config = CONFIG[space](r=3, lora_alpha=5, target_modules=["b", "a"], use_dora=True)
        config.save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(str(tmp_path))
        assert type(loaded) is type(config)
        assert (loaded.r, loaded.lora_alpha, set(loaded.target_modules), loaded.use_dora) == (3, 5, {"a", "b"}, True)
        assert "space" not in loaded.to_dict()  # said by the type, so that the two cannot differ

    def test_several_adapters_each_in_its_folder(self, space: str, tmp_path: Path) -> None:
        model = with_second(trained(space), CONFIG[space](r=3, target_modules=["lin1"]))
        model.save_pretrained(tmp_path)
        loaded = load(Mlp(), tmp_path)
        loaded.load_adapter(tmp_path / "second", "second")
        for name in ("default", "second"):
            model.set_adapter(name)
            loaded.set_adapter(name)
            assert torch.equal(loaded(mlp_batch()), model(mlp_batch()))

    def test_low_cpu_mem_usage(self, space: str, tmp_path: Path) -> None:
        model = trained(space, use_dora=space == "output")
        model.save_pretrained(tmp_path)
        loaded = load(Mlp(), tmp_path, low_cpu_mem_usage=True)
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert torch.equal(loaded(mlp_batch()), model(mlp_batch()))

    def test_trained_further(self, space: str, tmp_path: Path) -> None:
        trained(space).save_pretrained(tmp_path)
        frozen = load(Mlp(), tmp_path)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        going_on = load(Mlp(), tmp_path, is_trainable=True)
        losses = train(going_on, mlp_batch())
        assert losses[-1] < losses[0]

    def test_saved_while_merged_it_is_the_adapter_not_the_base(self, space: str, tmp_path: Path) -> None:
        model = trained(space)
        expected = model(mlp_batch())
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert torch.equal(load(Mlp(), tmp_path)(mlp_batch()), expected)

    def test_a_model_in_half_precision_keeps_its_adapter_in_single(self, space: str, tmp_path: Path) -> None:
        model = adapted(Mlp().to(torch.bfloat16), CONFIG[space](r=2, target_modules=TARGETS))
        x = mlp_batch().to(torch.bfloat16)
        assert {layer.lora_A["default"].weight.dtype for layer in feature_layers(model)} == {torch.float32}
        assert model(x).dtype == torch.bfloat16
        model.save_pretrained(tmp_path)
        assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
        loaded = load(Mlp().to(torch.bfloat16), tmp_path)
        assert torch.equal(loaded(x), model(x))
        narrow = adapted(
            Mlp().to(torch.bfloat16), CONFIG[space](r=2, target_modules=TARGETS), autocast_adapter_dtype=False
        )
        assert {layer.lora_A["default"].weight.dtype for layer in feature_layers(narrow)} == {torch.bfloat16}
        assert narrow(x).dtype == torch.bfloat16

    def test_auto_peft_model(self, space: str, tmp_path: Path, llama: nn.Module, logits: Logits) -> None:
        llama.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        llama.name_or_path = str(tmp_path / "base")  # type: ignore[assignment]
        model = adapted(llama, CONFIG[space](r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(AutoPeftModel.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize(("name", "space"), every_case())
def test_every_layer_comes_back(name: str, space: str, tmp_path: Path) -> None:
    model = adapted(OneLayer(base_layer(name)), CONFIG[space](r=2, target_modules=["layer"]))
    model.save_pretrained(tmp_path)
    loaded = load(OneLayer(base_layer(name)), tmp_path)
    x = features_for(base_layer(name))
    assert torch.equal(loaded(x), model(x))


@both_spaces
class TestStateDict:
    def test_injected_by_its_keys(self, space: str) -> None:
        """The tensors say which layers; the config's target_modules need not."""
        model = trained(space)
        state = {name.removeprefix("base_model.model."): t for name, t in get_peft_model_state_dict(model).items()}
        fresh = Mlp()
        config = CONFIG[space](r=2, lora_alpha=3, target_modules=["lin0"])
        with pytest.warns(RuntimeWarning, match="additional target modules: ..lin1"):
            inject_adapter_in_model(config, fresh, state_dict=state)
        result = set_peft_model_state_dict(fresh, state)
        assert not result.unexpected_keys
        torch.testing.assert_close(fresh(mlp_batch()), model(mlp_batch()))

    def test_get_and_set(self, space: str) -> None:
        model = trained(space)
        other = attach(Mlp(), CONFIG[space](r=2, lora_alpha=3, target_modules=TARGETS))
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
        assert torch.equal(other.eval()(mlp_batch()), model(mlp_batch()))


@both_spaces
@pytest.mark.parametrize("merged", [False, True])
class TestCopies:
    def check(self, model: PeftModel, copied: PeftModel) -> None:
        x = mlp_batch()
        torch.testing.assert_close(copied(x), model(x))
        if model.get_model_status().merged_adapters:
            copied.unmerge_adapter()
            assert model.get_model_status().merged_adapters == ["default"]
            model.unmerge_adapter()
        torch.testing.assert_close(copied(x), model(x))
        # They share nothing.
        expected = model(x).clone()
        train(copied, x)
        assert torch.equal(model(x), expected)
        assert not torch.allclose(copied(x), expected)

    def make(self, space: str, merged: bool) -> PeftModel:
        model = trained(space)
        if merged:
            model.merge_adapter()
        return model

    def test_deepcopy(self, space: str, merged: bool) -> None:
        model = self.make(space, merged)
        self.check(model, copy.deepcopy(model))

    def test_pickle(self, space: str, merged: bool) -> None:
        model = self.make(space, merged)
        self.check(model, pickle.loads(pickle.dumps(model)))

    def test_torch_save(self, space: str, merged: bool) -> None:
        model, buffer = self.make(space, merged), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        self.check(model, torch.load(buffer, weights_only=False))


class TestConvertToLora:
    """In input space the converted LoRA of the same rank is exact (lora_A = A, lora_B = WB up to a change of basis)."""

    def as_lora(self, model: PeftModel, base: nn.Module, rank: int) -> PeftModel:
        config, state = convert_to_lora(model, rank=rank)
        assert type(config) is LoraConfig
        lora = attach(base, config).eval()
        result = set_peft_model_state_dict(lora, state)
        assert not result.unexpected_keys
        return lora

    def test_input_space(self) -> None:
        model, x = trained("input"), mlp_batch()
        lora = self.as_lora(model, Mlp(), rank=2)
        torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)

    def test_output_space_without_a_bias(self) -> None:
        model = adapted(Mlp(), CONFIG["output"](r=2, target_modules=["lin1"]))
        lora = self.as_lora(model, Mlp(), rank=2)
        torch.testing.assert_close(lora(mlp_batch()), model(mlp_batch()), rtol=1e-4, atol=1e-5)

    @both_spaces
    def test_conv1d_of_transformers(self, space: str) -> None:
        layer = base_layer("Conv1D")
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        x = features_for(layer)
        model = adapted(OneLayer(copy.deepcopy(layer)), CONFIG[space](r=2, target_modules=["layer"]))
        config, state = convert_to_lora(model, rank=2)
        config.fan_in_fan_out = True
        lora = attach(OneLayer(layer), config)
        set_peft_model_state_dict(lora, state)
        torch.testing.assert_close(lora(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["linear", "conv2d", "embedding"])
    def test_what_a_lora_without_a_bias_cannot_say_is_refused(self, name: str) -> None:
        """In output space Φ moves the bias; and PEFT converts linears only."""
        model = adapted(OneLayer(base_layer(name)), CONFIG["output"](r=2, target_modules=["layer"]))
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=2)

    def test_a_constant_is_refused(self) -> None:
        model = adapted(OneLayer(base_layer("linear")), CONFIG["input"](r=2, target_modules=["layer"], lora_bias=True))
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=2)
