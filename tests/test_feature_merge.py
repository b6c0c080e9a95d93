"""Merging folds Φ into the base and unmerging gives the base back; a merge that cannot be done changes nothing."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from tests.feature_models import (
    CONFIG,
    SPACES,
    TOLERANCE,
    Mlp,
    OneLayer,
    adapted,
    assert_same,
    base_layer,
    every_case,
    feature_layers,
    features_for,
    mlp_batch,
    weights,
    with_second,
)

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)


def one_layer(name: str, space: str, **options: Any) -> tuple[PeftModel, Tensor]:
    model = adapted(OneLayer(base_layer(name)), CONFIG[space](r=2, lora_alpha=3, target_modules=["layer"], **options))
    return model, features_for(base_layer(name))


def two_adapters(space: str, **options: Any) -> PeftModel:
    first = CONFIG[space](r=2, lora_alpha=4, target_modules=TARGETS, **options)
    second = CONFIG[space](r=3, lora_alpha=2, target_modules=TARGETS, **options)
    return with_second(adapted(Mlp(), first), second)


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "space"), every_case())
class TestEveryLayer:
    def test_merged_is_unmerged(self, name: str, space: str) -> None:
        model, x = one_layer(name, space)
        expected, bare = model(x), base_layer(name)(x)
        model.merge_adapter()
        assert_close(model(x), expected)
        assert not torch.allclose(model(x), bare)
        # The base layer itself holds it now.
        assert_close(cast(nn.Module, model.base_model.model.layer).base_layer(x), expected)

    def test_unmerging_restores_the_base(self, name: str, space: str) -> None:
        model, x = one_layer(name, space)
        before, expected = weights(model), model(x)
        for _ in range(3):
            model.merge_adapter()
            model.unmerge_adapter()
        assert_same(model, before, atol=1e-6)
        assert_close(model(x), expected)

    def test_merge_and_unload_leaves_the_plain_layer(self, name: str, space: str) -> None:
        model, x = one_layer(name, space)
        expected = model(x)
        plain = model.merge_and_unload()
        assert type(plain.layer) is type(base_layer(name))
        assert plain.state_dict().keys() == OneLayer(base_layer(name)).state_dict().keys()
        assert_close(plain(x), expected)

    def test_the_update_is_the_difference_of_the_weights(self, name: str, space: str) -> None:
        """`get_delta_weight`, which PEFT's conversions read: before merging and after it."""
        model, _ = one_layer(name, space)
        (layer,) = feature_layers(model)
        base = cast(Tensor, layer.base_layer.weight).clone()
        delta = layer.get_delta_weight("default")
        model.merge_adapter()
        torch.testing.assert_close(layer.base_layer.weight - base, delta, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-5)

    def test_dora_and_offsets(self, name: str, space: str) -> None:
        """Variants go through Φ(I); an offset goes into the bias if the layer has one and no padding is in the way."""
        for options in ({"use_dora": True}, {"lora_bias": True}):
            if options == {"lora_bias": True} and getattr(base_layer(name), "bias", None) is None:
                continue
            model, x = one_layer(name, space, **options)
            expected = model(x)
            if options == {"lora_bias": True} and "conv" in name and space == "input":
                before = weights(model)
                with pytest.raises(ValueError, match=r"layer: .*padded border.* Run it unmerged, or train with"):
                    model.merge_adapter()
                assert_same(model, before)
                continue
            model.merge_adapter()
            assert_close(model(x), expected)


@both_spaces
class TestSeveral:
    def test_at_once_is_the_sum(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        before = weights(model)
        model.base_model.set_adapter(["default", "second"])
        expected = model(x)
        model.merge_adapter(adapter_names=["default", "second"])
        assert_close(model(x), expected)
        model.unmerge_adapter()
        assert_same(model, before, atol=1e-6)

    def test_one_after_another_is_the_sum_too(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        before = weights(model)
        model.base_model.set_adapter(["default", "second"])
        expected = model(x)
        model.merge_adapter(adapter_names=["second"])
        with pytest.warns(UserWarning, match="Already following adapters were merged second"):
            model.merge_adapter(adapter_names=["default"])
        assert_close(model(x), expected)
        model.unmerge_adapter()
        assert_same(model, before, atol=1e-6)
        assert_close(model(x), expected)

    def test_the_one_that_is_named_not_the_active_one(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        model.set_adapter("second")
        expected = model(x)
        model.set_adapter("default")
        assert_close(model.merge_and_unload(adapter_names=["second"])(x), expected)

    def test_set_adapter_takes_the_merged_one_out(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        model.set_adapter("second")
        expected = model(x)
        model.set_adapter("default")
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.set_adapter("second")
        assert_close(model(x), expected)

    def test_a_merged_adapter_is_not_deleted_from_under_the_base(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        model.merge_adapter()
        merged = model(x)
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
        assert torch.equal(model(x), merged)


@both_spaces
def test_in_half_precision_the_base_comes_back_no_worse_than_lora_s(space: str) -> None:
    errors = {}
    for config in (CONFIG[space], LoraConfig):
        bare = Mlp().to(torch.bfloat16)
        before = weights(bare)
        model = adapted(bare, config(r=4, target_modules=TARGETS))
        for _ in range(4):
            model.merge_adapter()
            model.unmerge_adapter()
        base = model.unload()
        errors[config] = max((base.state_dict()[name] - tensor).abs().max().item() for name, tensor in before.items())
    assert errors[CONFIG[space]] <= errors[LoraConfig] + torch.finfo(torch.bfloat16).eps / 8


@both_spaces
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_keeps_the_dtype_and_rounds_once(space: str, dtype: torch.dtype) -> None:
    model = adapted(Mlp().to(dtype), CONFIG[space](r=4, target_modules=TARGETS))
    exact = adapted(Mlp().to(dtype).double(), CONFIG[space](r=4, target_modules=TARGETS))
    plain, expected = model.merge_and_unload(), exact.merge_and_unload()
    for name, tensor in plain.state_dict().items():
        assert tensor.dtype == dtype
        reference = expected.state_dict()[name]
        tolerance = max(torch.finfo(dtype).eps, TOLERANCE[torch.float32])
        torch.testing.assert_close(tensor.double(), reference, rtol=tolerance, atol=tolerance)


@both_spaces
def test_weights_tied_in_the_base_stay_tied(space: str) -> None:
    model = Mlp()
    model.head.weight = nn.Parameter(model.lin0.weight[:8, :].repeat(1, 2)[:, :24].clone())
    shared = model.head.weight
    other = nn.Linear(24, 8)
    other.weight = shared
    model.other = other
    peft_model = adapted(model, CONFIG[space](r=2, target_modules=["head"]))
    peft_model.merge_adapter()
    assert other.weight.data_ptr() == feature_layers(peft_model)[0].base_layer.weight.data_ptr()


@both_spaces
class TestMovedWhileMerged:
    def test_to_another_dtype(self, space: str) -> None:
        model, x = adapted(Mlp().bfloat16(), CONFIG[space](r=2, target_modules=TARGETS)), mlp_batch()
        layer = feature_layers(model)[0]
        base = layer.base_layer.weight.clone()
        model.merge_adapter()
        model.to(torch.float64)
        model.unmerge_adapter()
        assert layer.base_layer.weight.dtype == torch.float64
        torch.testing.assert_close(layer.base_layer.weight, base.double(), rtol=2e-2, atol=2e-2)
        expected = model(x.double())
        model.merge_adapter()
        torch.testing.assert_close(model(x.double()), expected)

    def test_to_another_device(self, space: str) -> None:
        model = two_adapters(space)
        model.merge_adapter(["default"])
        model.to("meta")
        layer = feature_layers(model)[0]
        assert layer.get_delta_weight("second").device.type == "meta"
        model.unmerge_adapter()
        assert not layer.merged


@both_spaces
class TestWhatCannotBeMerged:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_what_is_not_finite_is_found_before_anything_is_changed(
        self, space: str, bad: float, how: str, safe_merge: bool
    ) -> None:
        """Also when it sits in the last layer; and without safe_merge, since it could not be taken out again."""
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=[*TARGETS, "head"]))
        feature_layers(model)[-1].lora_A["default"].weight.data[0, 0] = bad
        before = weights(model)
        with pytest.raises(ValueError, match=r"head: NaNs detected in the merged weights. The adapter default"):
            getattr(model, how)(safe_merge=safe_merge)
        assert_same(model, before)
        assert not any(layer.merged for layer in feature_layers(model))

    def test_a_product_that_is_too_large_is_not_written(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["head"]))
        for matrix in ("lora_A", "lora_B"):
            getattr(feature_layers(model)[0], matrix)["default"].weight.data.fill_(1e30)
        before = weights(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter()
        assert_same(model, before)

    def test_safe_merge_merges_what_is_sound(self, space: str) -> None:
        model, x = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS)), mlp_batch()
        expected = model(x)
        assert_close(model.merge_and_unload(safe_merge=True)(x), expected)

    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    def test_a_constant_without_a_bias_to_hold_it(self, space: str, how: str) -> None:
        """lin0 has a bias, lin1 has none: lin0 is not merged either."""
        config = CONFIG[space](r=2, target_modules=TARGETS, lora_bias=True)
        with pytest.warns(
            UserWarning, match=r"type Linear has no bias.*merging the adapter into lin1 won.t be possible"
        ):
            model = adapted(Mlp(), config)
        before = weights(model)
        with pytest.raises(ValueError, match=r"lin1: .*Linear has no bias that could hold it.*lora_bias=False"):
            getattr(model, how)()
        assert_same(model, before)

    @pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
    def test_layers_that_share_one_weight(self, space: str, how: str, llama: nn.Module) -> None:
        """Replicated layers have adapters of their own, but no weights."""
        config = CONFIG[space](r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
        model = adapted(llama, config)
        assert len(feature_layers(model)) == 3
        before = weights(model)
        with pytest.raises(ValueError, match=r"1\.self_attn\.q_proj and .*2\.self_attn\.q_proj share one weight"):
            getattr(model, how)()
        assert_same(model, before)

    def test_what_is_merged_already(self, space: str) -> None:
        model, x = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS)), mlp_batch()
        expected = model(x)
        model.merge_adapter()
        once = weights(model)
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            model.merge_adapter()
        assert_same(model, once)
        assert_close(model(x), expected)

    def test_what_is_not_merged_cannot_be_unmerged(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS))
        before = weights(model)
        with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
            model.unmerge_adapter()
        assert_same(model, before)

    def test_names_that_are_no_list(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=TARGETS))
        before = weights(model)
        with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'default'"):
            model.merge_adapter(adapter_names="default")  # type: ignore[arg-type]
        assert_same(model, before)
