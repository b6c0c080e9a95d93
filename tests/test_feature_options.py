"""The options of LoraConfig keep their meaning in feature space: which layers, which rank and scaling, what else trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.feature_models import (
    CONFIG,
    SPACES,
    Mlp,
    OneLayer,
    adapted,
    attach,
    feature_layers,
    mlp_batch,
    train,
    with_second,
)
from xadapt_feature import FeatureLayer

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)
Logits = Callable[[nn.Module], Tensor]


def paths(model: nn.Module) -> set[str]:
    """The adapted layers."""
    return {
        name.removeprefix("base_model.model.").removeprefix("model.")
        for name, module in model.named_modules()
        if isinstance(module, FeatureLayer)
    }


@both_spaces
class TestWhichLayers:
    def test_names_and_a_regular_expression(self, space: str) -> None:
        assert paths(attach(Mlp(), CONFIG[space](target_modules=["lin1"]))) == {"lin1"}
        assert paths(attach(Mlp(), CONFIG[space](target_modules=r"lin\d"))) == {"lin0", "lin1"}

    def test_the_default_for_a_known_architecture(self, space: str, llama: nn.Module) -> None:
        model = attach(llama, CONFIG[space]())
        assert {path.rsplit(".", 1)[-1] for path in paths(model)} == {"q_proj", "v_proj"}

    def test_exclude_modules(self, space: str) -> None:
        config = CONFIG[space](target_modules=r"lin\d|head", exclude_modules=["lin1"])
        assert paths(attach(Mlp(), config)) == {"lin0", "head"}

    def test_layers_to_transform(self, space: str, llama: nn.Module) -> None:
        model = attach(llama, CONFIG[space](target_modules=["q_proj"], layers_to_transform=[1]))
        assert paths(model) == {"layers.1.self_attn.q_proj"}

    def test_all_linear(self, space: str, llama: nn.Module) -> None:
        """All of a transformer's linears except its output head."""
        model = attach(llama, CONFIG[space](r=2, target_modules="all-linear"))
        names = {path.rsplit(".", 1)[-1] for path in paths(model)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert len(paths(model)) == 2 * 7

    @pytest.mark.parametrize("first", ["all-linear", ["q_proj"]], ids=str)
    def test_all_linear_as_a_second_adapter_meets_layers_not_what_is_inside_them(
        self, space: str, first: Any, llama: nn.Module, llama_like: Any, logits: Logits
    ) -> None:
        model = adapted(llama, CONFIG[space](r=2, target_modules=first))
        with_second(model, CONFIG[space](r=3, target_modules="all-linear"))
        assert len(paths(model)) == 2 * 7
        assert not any(path.endswith("base_layer") or "_phi" in path for path in paths(model))
        for layer in feature_layers(model):
            assert not isinstance(layer.base_layer, FeatureLayer)
            assert "second" in layer.lora_A
        model.set_adapter("second")
        assert not torch.allclose(logits(model), logits(llama_like()))

    def test_conv1d_of_gpt2(self, space: str, gpt2: nn.Module, logits: Logits) -> None:
        model = adapted(gpt2, CONFIG[space](r=2, target_modules=["c_attn", "c_proj"]))
        expected = logits(model)
        plain = model.merge_and_unload()
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)

    def test_a_model_that_is_one_layer_deep(self, space: str) -> None:
        model = attach(OneLayer(nn.Linear(4, 3)), CONFIG[space](r=1, target_modules=["layer"]))
        assert paths(model) == {"layer"}


@both_spaces
class TestRankAndScaling:
    def test_rank_pattern(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, rank_pattern={"lin1": 5}))
        assert [layer.r["default"] for layer in feature_layers(model)] == [2, 5]
        assert [layer.lora_A["default"].weight.shape[0] for layer in feature_layers(model)] == [2, 5]

    def test_alpha_pattern(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, lora_alpha=4, target_modules=TARGETS, alpha_pattern={"lin1": 6}))
        assert [layer.scaling["default"] for layer in feature_layers(model)] == [4 / 2, 6 / 2]

    @pytest.mark.parametrize("rslora", [False, True])
    def test_the_scaling_is_lora_s(self, space: str, rslora: bool) -> None:
        config = CONFIG[space](r=4, lora_alpha=6, target_modules=["layer"], use_rslora=rslora)
        torch.manual_seed(0)
        model = adapted(OneLayer(nn.Linear(8, 8)), config)
        (layer,) = feature_layers(model)
        scaling = 6 / math.sqrt(4) if rslora else 6 / 4
        delta = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        base = layer.base_layer
        expected = base(x + x @ delta.T) if space == "input" else base(x) + base(x) @ delta.T
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@both_spaces
class TestVariants:
    def test_dora_is_dora_of_the_identity(self, space: str) -> None:
        """Φ = m · (I + sBA) / ‖I + sBA‖ over the rows, as DoRA does with a weight."""
        model = adapted(OneLayer(nn.Linear(6, 6)), CONFIG[space](r=2, target_modules=["layer"], use_dora=True))
        (layer,) = feature_layers(model)
        phi = torch.eye(6) + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        magnitude = layer.lora_magnitude_vector["default"].weight
        phi = (magnitude / phi.norm(dim=1))[:, None] * phi
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        expected = (x @ phi.T) @ weight.T + bias if space == "input" else (x @ weight.T + bias) @ phi.T
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    def test_dora_starts_at_the_identity_and_trains_its_magnitude(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, use_dora=True))
        x = mlp_batch()
        torch.testing.assert_close(model(x), Mlp()(x))
        train(model, x)
        for layer in feature_layers(model):
            assert not torch.allclose(layer.lora_magnitude_vector["default"].weight, torch.ones(layer.features))

    def test_dropout_is_on_the_adapter_s_path_in_training_only(self, space: str) -> None:
        model, x = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, lora_dropout=0.5)), mlp_batch()
        torch.manual_seed(0)
        expected = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS))(x)
        assert torch.equal(model(x), expected)
        model.train()
        assert not torch.allclose(model(x), model(x))
        with model.disable_adapter():
            assert torch.equal(model(x), Mlp()(x))

    @pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
    def test_initialisations(self, space: str, init: Any) -> None:
        torch.manual_seed(0)
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, init_lora_weights=init))
        starts_at_identity = torch.allclose(model(mlp_batch()), Mlp()(mlp_batch()), atol=1e-6)
        assert starts_at_identity == (init is not False)

    def test_lora_bias_trains_a_constant(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=["lin0"], lora_bias=True))
        x = mlp_batch()
        torch.testing.assert_close(model(x), Mlp()(x))
        train(model, x)
        (layer,) = feature_layers(model)
        assert layer.lora_B["default"].bias.any()
        expected = model(x)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)

    def test_fan_in_fan_out_says_nothing_here(self, space: str, gpt2: nn.Module, logits: Logits) -> None:
        """It tells LoRA how the base stores its weight; Φ does not care, and a GPT-2 recipe has it set."""
        bare = logits(gpt2)
        model = attach(gpt2, CONFIG[space](r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        torch.testing.assert_close(logits(model), bare)


@both_spaces
class TestWhatElseTrains:
    def trainable(self, model: nn.Module) -> set[str]:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name.removeprefix("base_model.model.") for name in names if "lora_" not in name}

    def test_modules_to_save(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, modules_to_save=["head"]))
        assert self.trainable(model) == {
            "head.modules_to_save.default.weight",
            "head.modules_to_save.default.bias",
        }
        x = mlp_batch()
        train(model, x)
        expected = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), Mlp()(x))
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
    def test_bias(self, space: str, bias: str) -> None:
        expected = {
            "none": set(),
            "lora_only": {"lin0.base_layer.bias"},
            "all": {"lin0.base_layer.bias", "head.bias"},
        }
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS, bias=bias))
        assert self.trainable(model) == expected[bias]
        losses = train(model, mlp_batch())
        assert losses[-1] < losses[0]
        for name in expected[bias]:
            before = Mlp().get_parameter(name.replace(".base_layer", ""))
            assert not torch.equal(model.base_model.model.get_parameter(name), before)

    def test_trainable_token_indices(self, space: str, llama: nn.Module, logits: Logits) -> None:
        bare = logits(llama)
        model = attach(llama, CONFIG[space](r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
        torch.testing.assert_close(logits(model), bare)
        assert any("trainable_tokens" in name for name in self.trainable(model))
