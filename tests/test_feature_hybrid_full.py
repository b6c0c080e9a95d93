"""Hybrid adaptation (Revisit Model Adaptation, Eq. 6) and full adaptation, against their formulas written out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from tests.feature_models import (
    SPACES,
    Mlp,
    OneLayer,
    adapted,
    assert_same,
    attach,
    base_layer,
    feature_layers,
    features_for,
    load,
    mlp_batch,
    train,
    weights,
    with_second,
)
from xadapt import FullAdaConfig, HybridAdaConfig, feature_space
from xadapt_feature import FeatureLayer

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)


def config(kind: str, space: str, **options: Any) -> Any:
    if kind == "full":
        return FullAdaConfig(space=space, **{"target_modules": TARGETS, **options})
    return HybridAdaConfig(
        space=space, **{"r": 5, "feature_r": 2, "lora_alpha": 3, "target_modules": TARGETS, **options}
    )


def factors(layer: FeatureLayer, part: Any) -> tuple[Tensor, Tensor]:
    return part.lora_A["default"].weight, part.lora_B["default"].weight


class TestHybrid:
    @both_spaces
    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("name", ["linear", "linear without bias", "Conv1D"])
    def test_equation_6(self, space: str, rslora: bool, name: str) -> None:
        options = {"use_rslora": rslora, "target_modules": ["layer"]}
        model = adapted(OneLayer(base_layer(name)), config("hybrid", space, **options))
        (layer,) = feature_layers(model)
        (a1, b1), (a2, b2) = factors(layer, layer.hosted), factors(layer, layer.delta)
        s = 3 / math.sqrt(5) if rslora else 3 / 5  # both parts have the scaling of the rank in total
        d = 6 if space == "input" else 5
        assert (a1.shape, b1.shape) == ((2, d), (d, 2))
        assert (a2.shape, b2.shape) == ((3, 6), (5, 3))
        x, base = features_for(layer.base_layer), layer.base_layer
        parameter_space = s * (x @ a2.T) @ b2.T
        if space == "input":
            expected = base(x + s * (x @ a1.T) @ b1.T) + parameter_space
        else:
            expected = base(x) + s * (base(x) @ a1.T) @ b1.T + parameter_space
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    @both_spaces
    def test_both_parts_train(self, space: str) -> None:
        model = attach(Mlp(), config("hybrid", space))
        train(model, mlp_batch())
        for layer in feature_layers(model):
            for part in layer.hosts:
                assert factors(layer, part)[1].any()

    @both_spaces
    def test_parameters(self, space: str) -> None:
        model = attach(Mlp(), config("hybrid", space))
        widths = (16, 32) if space == "input" else (32, 24)
        expected = sum(2 * 2 * d for d in widths) + 3 * (16 + 32) + 3 * (32 + 24)
        assert model.get_nb_trainable_parameters()[0] == expected

    @both_spaces
    def test_the_merged_update_has_the_rank_in_total(self, space: str) -> None:
        model = adapted(Mlp(), config("hybrid", space))
        for layer in feature_layers(model):
            assert torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-4) == 5

    @both_spaces
    def test_rescale(self, space: str) -> None:
        model, x = adapted(Mlp(), config("hybrid", space)), mlp_batch()
        expected = model(x)
        half = adapted(Mlp(), config("hybrid", space, lora_alpha=1.5))(x)
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(model(x), half, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), expected)
        for layer in feature_layers(model):
            layer.scale_layer(0.5)
        torch.testing.assert_close(model(x), half, rtol=1e-5, atol=1e-5)
        for layer in feature_layers(model):
            layer.unscale_layer()
        torch.testing.assert_close(model(x), expected)

    @pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "use_dora", "lora_bias"])
    def test_options_that_would_mean_either_part_are_refused(self, name: str) -> None:
        value = {"lin0": 3} if "pattern" in name else True
        with pytest.raises(ValueError, match=f"HybridAdaConfig does not take {name}"):
            config("hybrid", "input", **{name: value})

    @pytest.mark.parametrize("rank", [0, -1, True, 1.5, "2"])
    def test_a_feature_rank_that_is_none(self, rank: Any) -> None:
        with pytest.raises(ValueError, match=r"feature_r=.*: a rank is a positive integer, for example feature_r=8"):
            config("hybrid", "input", feature_r=rank)

    @pytest.mark.parametrize("rank", [5, 6])
    def test_a_feature_rank_that_leaves_nothing(self, rank: int) -> None:
        with pytest.raises(ValueError, match=rf"feature_r={rank} leaves nothing of r=5.*InputAdaConfig\(r=5\)"):
            config("hybrid", "input", feature_r=rank)

    def test_weighted_adapters_are_refused(self) -> None:
        model = with_second(adapted(Mlp(), config("hybrid", "input")), config("hybrid", "input"))
        with pytest.raises(ValueError, match=r"add_weighted_adapter.*set_adapter\(\["):
            model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix")
        assert list(model.peft_config) == ["default", "second"]

    @pytest.mark.parametrize("name", ["conv2d", "embedding"])
    def test_other_layers_are_refused_and_stay(self, name: str) -> None:
        model = OneLayer(base_layer(name))
        before = weights(model)
        with pytest.raises(ValueError, match=r"layer: HybridAdaConfig adapts linear layers, not (Conv2d|Embedding)"):
            attach(model, config("hybrid", "output", target_modules=["layer"]))
        assert_same(model, before)

    def test_a_rank_above_the_width_of_either_part_is_told(self) -> None:
        model = OneLayer(nn.Linear(6, 4))
        with pytest.raises(ValueError, match="above the layer's width"):
            attach(model, config("hybrid", "input", r=9, feature_r=2, target_modules=["layer"]))
        assert not feature_layers(model)


class TestFull:
    @both_spaces
    @pytest.mark.parametrize("name", ["linear", "linear without bias", "Conv1D"])
    def test_the_formula(self, space: str, name: str) -> None:
        model = adapted(OneLayer(base_layer(name)), config("full", space, target_modules=["layer"]))
        (layer,) = feature_layers(model)
        a, base, x = layer.full_A["default"], layer.base_layer, features_for(layer.base_layer)
        d = 6 if space == "input" else 5
        assert a.shape == (d, d)
        expected = base(x + x @ a.T) if space == "input" else base(x) + base(x) @ a.T
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["conv2d", "embedding"])
    def test_on_channels_and_embeddings(self, name: str) -> None:
        model = adapted(OneLayer(base_layer(name)), config("full", "output", target_modules=["layer"]))
        x = features_for(base_layer(name))
        expected = model(x)
        assert not torch.allclose(expected, base_layer(name)(x))
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)

    def test_it_starts_at_zero(self) -> None:
        model = attach(Mlp(), config("full", "input"))
        assert not any(layer.full_A["default"].any() for layer in feature_layers(model))

    @both_spaces
    def test_batches_of_mixed_adapters_are_refused(self, space: str) -> None:
        """It would take no notice of the names."""
        for made in (config("full", space), feature_space(LoHaConfig(r=2, target_modules=TARGETS), space)):
            model = adapted(Mlp(), made)
            with pytest.raises(ValueError, match=r"adapter_names=\['default', '__base__'\].* cannot give each row"):
                model(mlp_batch(rows=2), adapter_names=["default", "__base__"])
            model(mlp_batch(rows=2))

    def test_a_space_that_is_none(self) -> None:
        for kind in ("full", "hybrid"):
            with pytest.raises(ValueError, match="space='inner' is not a feature space"):
                config(kind, "inner")

    def test_a_pattern_without_indices(self) -> None:
        with pytest.raises(ValueError, match="layers_pattern"):
            config("full", "input", layers_pattern="layers")


@both_spaces
@pytest.mark.parametrize("kind", ["hybrid", "full"])
class TestBoth:
    def test_starts_as_the_base_and_trains(self, kind: str, space: str) -> None:
        model, x = attach(Mlp(), config(kind, space)), mlp_batch()
        torch.testing.assert_close(model(x), Mlp()(x))
        losses = train(model, x)
        assert losses[-1] < losses[0]
        with model.disable_adapter():
            torch.testing.assert_close(model(x), Mlp()(x))

    def test_saved_and_loaded(self, kind: str, space: str, tmp_path: Path) -> None:
        model, x = adapted(Mlp(), config(kind, space, modules_to_save=["head"])), mlp_batch()
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = load(Mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(loaded(x), model(x))
            assert loaded.peft_config["default"].space == space

    def test_merging(self, kind: str, space: str) -> None:
        model, x = adapted(Mlp(), config(kind, space)), mlp_batch()
        before, expected = weights(model), model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert_same(model, before, atol=1e-6)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied.merge_and_unload(safe_merge=True)(x), expected, rtol=1e-5, atol=1e-5)

    def test_several_adapters(self, kind: str, space: str) -> None:
        model, x = with_second(adapted(Mlp(), config(kind, space)), config(kind, space)), mlp_batch()
        outputs = []
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            outputs.append(model(x))
        assert not torch.allclose(outputs[0], outputs[1])
        model.merge_adapter()
        torch.testing.assert_close(model(x), outputs[2], rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        model.delete_adapter("default")
        torch.testing.assert_close(model(x), outputs[1], rtol=1e-5, atol=1e-5)
