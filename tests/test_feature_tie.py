"""Tied input adaptation: layers that read the same features share one adapter, stored once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoHaConfig, PeftModel, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.feature_models import adapted, assert_same, attach, feature_layers, load, train, weights, with_second
from xadapt import InputAdaConfig, feature_space
from xadapt_feature.tie import TiedLayer, tie_key


class Block(nn.Module):
    """k and v read the same features; o reads others of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.o = nn.Linear(16, 8), nn.Linear(16, 12), nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.o(self.k(x) * self.v(x)[..., :8]))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


ALL, PER_BLOCK = r"\.[kv]$", r"(blocks\.\d+)\.[kv]$"
NAMES = ("k", "v")


def config(tie: Any = ALL, **options: Any) -> InputAdaConfig:
    return InputAdaConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["k", "v"], **options}, tie=tie)


def batch() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def tied(tie: Any = ALL, **options: Any) -> PeftModel:
    return adapted(Blocks(), config(tie, **options))


def untied_twin(model: PeftModel) -> PeftModel:
    """The same function with an adapter of its own for every layer, as a reference."""
    twin = attach(Blocks(), config(None, **{"r": feature_layers(model)[0].r["default"]}))
    for ours, theirs in zip(feature_layers(model), feature_layers(twin), strict=True):
        for matrix in ("lora_A", "lora_B"):
            getattr(theirs, matrix)["default"].weight.data.copy_(getattr(ours, matrix)["default"].weight)
    return twin.eval()


class TestGroups:
    @pytest.mark.parametrize(
        ("tie", "groups"),
        [
            (ALL, [{"0.k", "0.v", "1.k", "1.v"}]),
            (PER_BLOCK, [{"0.k", "0.v"}, {"1.k", "1.v"}]),
            ([r"0\.[kv]$", r"1\.[kv]$"], [{"0.k", "0.v"}, {"1.k", "1.v"}]),
            (r"\.(k)$", [{"0.k", "1.k"}, {"0.v"}, {"1.v"}]),  # the rest keep their own
        ],
        ids=["all", "per block", "two patterns", "some"],
    )
    def test_equal_captured_groups_share_one_adapter(self, tie: Any, groups: list[set[str]]) -> None:
        model = tied(tie)
        shared: dict[int, set[str]] = {}
        for name, module in model.named_modules():
            if hasattr(module, "hosted"):
                shared.setdefault(id(module.lora_A["default"].weight), set()).add(name.split("blocks.")[1])
        assert sorted(shared.values(), key=sorted) == sorted(groups, key=sorted)
        assert model.get_nb_trainable_parameters()[0] == len(groups) * 2 * 2 * 16

    def test_the_key_of_a_layer(self) -> None:
        assert tie_key(None, "a.k") is None
        assert tie_key(r"\.k$", "a.v") is None
        assert tie_key(r"\.k$", "a.k") == tie_key(r"\.k$", "b.k")
        assert tie_key(r"(\w)\.k$", "a.k") != tie_key(r"(\w)\.k$", "b.k")

    def test_the_forward_is_that_of_equal_adapters(self) -> None:
        model = tied()
        torch.testing.assert_close(model(batch()), untied_twin(model)(batch()))
        assert not torch.allclose(model(batch()), Blocks()(batch()))

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_add_up_over_the_layers(self, checkpointing: bool) -> None:
        model = tied()
        twin = untied_twin(model)
        run: Callable[[nn.Module], Tensor] = lambda m: m(batch())  # noqa: E731
        if checkpointing:
            run = lambda m: torch.utils.checkpoint.checkpoint(m, batch(), use_reentrant=False)  # noqa: E731
        for one in (model, twin):
            run(one).pow(2).sum().backward()
        for matrix in ("lora_A", "lora_B"):
            (gradient,) = {getattr(layer, matrix)["default"].weight.grad for layer in feature_layers(model)}
            parts = [getattr(layer, matrix)["default"].weight.grad for layer in feature_layers(twin)]
            torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-5)


class TestStored:
    def test_once(self, tmp_path: Path) -> None:
        model = tied(PER_BLOCK)
        model.save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
            f"base_model.model.blocks.{i}.k.input_ada_phi.lora_{m}.weight" for i in range(2) for m in "AB"
        }
        names = [name for name in model.state_dict() if "lora_" in name]
        assert len(names) == 4

    @pytest.mark.parametrize("tie", [ALL, PER_BLOCK, [r"0\.[kv]$"]], ids=str)
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_and_comes_back(self, tie: Any, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
        model = tied(tie)
        train(model, batch())
        model.save_pretrained(tmp_path)
        loaded = load(Blocks(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(loaded(batch()), model(batch()))
        assert not any(parameter.is_meta for parameter in loaded.parameters())

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_is_tied_to_itself(self, how: Callable[[PeftModel], PeftModel]) -> None:
        model = tied()
        copied = how(model)
        expected = model(batch()).clone()
        train(copied, batch())
        assert torch.equal(model(batch()), expected)
        assert len({id(layer.lora_A["default"].weight) for layer in feature_layers(copied)}) == 1


class TestOnEveryLayer:
    """What PEFT does to each adapter layer, it does to tied ones: they have no adapter of their own, but a base."""

    def test_merge_and_unmerge(self) -> None:
        model = tied()
        before, expected = weights(model), model(batch())
        model.merge_adapter()
        torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
        assert all(layer.merged for layer in feature_layers(model))
        model.unmerge_adapter()
        assert_same(model, before, atol=1e-6)
        torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)

    def test_merge_and_unload(self) -> None:
        model = tied(PER_BLOCK)
        expected = model(batch())
        plain = model.merge_and_unload()
        assert not feature_layers(plain)
        assert plain.state_dict().keys() == Blocks().state_dict().keys()
        torch.testing.assert_close(plain(batch()), expected, rtol=1e-5, atol=1e-5)

    def test_disable(self) -> None:
        for merged in (False, True):
            model = tied()
            expected = model(batch())
            if merged:
                model.merge_adapter()
            with model.disable_adapter():
                torch.testing.assert_close(model(batch()), Blocks()(batch()), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)

    def test_several_adapters(self) -> None:
        model = with_second(tied(), config(r=3))
        first = model(batch())
        model.set_adapter("second")
        second = model(batch())
        assert not torch.allclose(first, second)
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Unmerging"):
            model.set_adapter("default")
        torch.testing.assert_close(model(batch()), first, rtol=1e-5, atol=1e-5)
        with pytest.warns(UserWarning, match="Setting active adapter to second"):
            model.delete_adapter("default")
        torch.testing.assert_close(model(batch()), second, rtol=1e-5, atol=1e-5)

    def test_a_row_at_a_time(self) -> None:
        model = with_second(tied(), config(r=3))
        mixed = model(batch()[:3], adapter_names=["second", "__base__", "default"])
        torch.testing.assert_close(mixed[1], Blocks()(batch())[1], rtol=1e-5, atol=1e-5)
        for row, name in ((0, "second"), (2, "default")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(batch())[row], rtol=1e-5, atol=1e-5)

    def test_add_weighted_adapter(self) -> None:
        model = with_second(tied(), config(r=3))
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", "cat")
        model.set_adapter("sum")
        combined = model(batch())
        model.base_model.set_adapter(["default", "second"])
        torch.testing.assert_close(combined, model(batch()), rtol=1e-5, atol=1e-5)

    def test_status_counts_the_layers(self) -> None:
        status = tied().get_model_status()
        assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (4, True, ["default"])

    def test_scaling_is_done_once(self) -> None:
        model = tied()
        expected, half = model(batch()), tied(lora_alpha=1.5)(batch())
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(model(batch()), half, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(batch()), expected)
        for layer in feature_layers(model):
            layer.scale_layer(0.5)
        torch.testing.assert_close(model(batch()), half, rtol=1e-5, atol=1e-5)
        for layer in feature_layers(model):
            layer.unscale_layer(0.5)
        torch.testing.assert_close(model(batch()), expected)
        for layer in feature_layers(model):
            layer.set_scale("default", 0.5)
        torch.testing.assert_close(model(batch()), half, rtol=1e-5, atol=1e-5)

    def test_with_another_peft_method(self, tmp_path: Path) -> None:
        loha = feature_space(LoHaConfig(r=2, target_modules=["k", "v"]), "input", tie=ALL)
        model = adapted(Blocks(), loha)
        assert len([name for name in model.state_dict() if "hada_w1_a" in name]) == 1
        expected = model(batch())
        model.save_pretrained(tmp_path)
        assert torch.equal(load(Blocks(), tmp_path)(batch()), expected)
        torch.testing.assert_close(model.merge_and_unload()(batch()), expected, rtol=1e-5, atol=1e-5)

    def test_injected_into_the_model_itself(self) -> None:
        model = Blocks()
        inject_adapter_in_model(config(), model)
        assert sum(isinstance(layer, TiedLayer) for layer in feature_layers(model)) == 3
        torch.testing.assert_close(model(batch()), Blocks()(batch()))


class TestErrors:
    def refused(self, tie: Any, match: str, **options: Any) -> None:
        model = Blocks()
        before = weights(model)
        with pytest.raises(ValueError, match=match):
            attach(model, config(tie, **options))
        assert_same(model, before)
        assert not feature_layers(model)

    def test_layers_of_different_widths(self) -> None:
        self.refused(
            r"\.[ko]$", r"ties blocks.0.k \(16 input features\) to blocks.0.o \(8\).*", target_modules=["k", "o"]
        )

    def test_a_pattern_that_matches_nothing(self) -> None:
        self.refused(r"to_[kv]$", r"tie='to_\[kv\]\$' matches none of the 4 target layers, e\.g\. 'blocks\.0\.k'")

    def test_a_pattern_that_is_none(self) -> None:
        with pytest.raises(ValueError, match=r"tie='\[kv' is no regular expression"):
            config("[kv")

    @pytest.mark.parametrize(("tie", "error"), [("", ValueError), ([r"k$", ""], ValueError), (3, TypeError)], ids=repr)
    def test_a_pattern_that_says_nothing(self, tie: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match=r"tie(=''| takes a regular expression).*it could be r'attn2"):
            config(tie)

    def test_ties_no_two_layers(self) -> None:
        with pytest.warns(UserWarning, match=r"ties no two of the 4 target layers.*must not be captured"):
            attach(Blocks(), config(r"(blocks\.\d+\.[kv])$"))

    @pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
    def test_a_rank_or_alpha_of_its_own(self, pattern: str) -> None:
        self.refused(ALL, rf"{pattern} gives 7 to blocks\.0\.v and [23] to blocks\.0\.k", **{pattern: {"v": 7}})
        tied(PER_BLOCK, **{pattern: {r"blocks\.0\.(k|v)": 7}})  # the group as a whole may have one

    @pytest.mark.parametrize(
        ("tie", "target_modules"),
        [
            (None, ["k", "v"]),
            (PER_BLOCK, ["k", "v"]),
            (ALL, ["k"]),
            (ALL, ["v"]),
            (ALL, r".*0\.[kv]"),
            (None, ["v", "o"]),
        ],
        ids=[
            "untied",
            "tied otherwise",
            "leaders only",
            "followers only",
            "one block only",
            "a follower and a free one",
        ],
    )
    def test_a_second_adapter_that_is_not_on_the_same_groups(self, tie: Any, target_modules: Any) -> None:
        model = tied()
        before, expected = weights(model), model(batch())
        with pytest.raises(ValueError, match=r"blocks\.0\.k, .*blocks\.1\.v share one adapter, and with this one"):
            model.add_adapter("second", config(tie, target_modules=target_modules))
        assert_same(model, before)
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(batch()), expected)

    def test_a_second_adapter_on_more_layers(self) -> None:
        model = tied(r"\.[kvo]$", target_modules=["k"])
        before = weights(model)
        with pytest.raises(ValueError, match=r"blocks\.0\.k, blocks\.1\.k share one adapter, and with this one"):
            model.add_adapter("second", config(r"\.[kvo]$", target_modules=["k", "v"]))
        assert_same(model, before)


class TestOtherAdapters:
    """What counts is how the layers are tied, not what a config says."""

    @pytest.mark.parametrize("tie", [r"blocks\.\d\.[kv]$", [r"\.(?:k|v)$"]], ids=str)
    def test_the_same_groups_in_other_words(self, tie: Any) -> None:
        model = with_second(tied(), config(tie))
        model.set_adapter("second")
        assert len({id(layer.lora_A["second"].weight) for layer in feature_layers(model)}) == 1
        assert not torch.allclose(model(batch()), Blocks()(batch()))

    def test_free_layers_beside_tied_ones(self) -> None:
        model = with_second(tied(), InputAdaConfig(r=2, target_modules=["o"]))
        model.set_adapter("second")
        assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 2 * 8

    def test_a_tie_ends_with_its_adapters(self) -> None:
        model = with_second(tied(), config())
        with pytest.warns(UserWarning, match="Setting active adapter"):
            model.delete_adapter("default")
        with pytest.raises(ValueError, match="share one adapter"):
            model.add_adapter("untied", config(None))  # "second" is tied still
        model.delete_adapter("second")
        model.add_adapter("untied", config(None))
        model.set_adapter("untied")
        assert model.get_nb_trainable_parameters()[0] == 4 * 2 * 2 * 16
        assert not any(isinstance(layer, TiedLayer) for layer in feature_layers(model))

    def test_what_is_left_of_a_deleted_adapter_stays_where_the_next_one_fails(self) -> None:
        model = tied()
        model.delete_adapter("default")
        before = weights(model)
        with pytest.raises(ValueError, match="matches none"):
            model.add_adapter("second", config(r"to_[kv]$"))
        assert_same(model, before)
