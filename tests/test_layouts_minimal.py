"""Minimal configs: asked of PEFT's own matching functions, they say what they were built from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from tests.conftest import make_llama
from xadapt.factors import alpha_of, rank_of
from xadapt.layouts import minimal_config

PARTS = st.sampled_from(["layers", "1", "11", "0", "q", "to_q", "to_out", "tooout", "to", "out", "proj", "a.b", "x-y"])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True)
VALUES = st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([1, 4.0, 0.3]))


def satisfied(layers: dict[str, tuple[int, float]], modules: list[str]) -> None:
    config = minimal_config(layers, modules)
    for name in modules:
        assert bool(check_target_module_exists(config, name)) == (name in layers), (name, config.target_modules)
    for name, values in layers.items():
        assert (rank_of(config, name), alpha_of(config, name)) == values, (
            name,
            config.rank_pattern,
            config.alpha_pattern,
        )


@given(st.data(), NAMES)
@settings(max_examples=300, deadline=None)
def test_random_names(data: st.DataObject, modules: list[str]) -> None:
    adapted = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    satisfied({name: data.draw(VALUES) for name in adapted}, modules)


@given(st.data(), NAMES)
@settings(max_examples=100, deadline=None)
def test_without_modules_the_layers_still_match(data: st.DataObject, names: list[str]) -> None:
    layers = {name: data.draw(VALUES) for name in names}
    config = minimal_config(layers)
    assert all(check_target_module_exists(config, name) for name in layers)
    assert {name: (rank_of(config, name), alpha_of(config, name)) for name in layers} == layers


class TestShape:
    def test_suffixes_and_exceptions(self) -> None:
        modules = [name for name, _ in make_llama().named_modules()]
        layers = {
            name: (8 if name.endswith("q_proj") else 4, 16.0) for name in modules if name.endswith(("q_proj", "v_proj"))
        }
        layers["model.layers.1.self_attn.v_proj"] = (4, 8)
        layers["lm_head"] = (4, 16.0)
        config = minimal_config(layers, modules)
        assert set(config.target_modules) == {"lm_head", "q_proj", "v_proj"}
        assert (config.r, config.lora_alpha) == (4, 16)
        assert config.rank_pattern == {"q_proj": 8}
        assert config.alpha_pattern == {"layers.1.self_attn.v_proj": 8}
        satisfied(layers, modules)

    def test_a_number_alone_is_no_suffix(self) -> None:
        """It would match any container's first child, also one the caller did not list."""
        config = minimal_config({"a.to_out.0": (4, 4)}, ["a.to_out.0", "a.to_q"])
        assert set(config.target_modules) == {"to_out.0"}

    def test_containers_of_the_names_given_are_not_matched(self) -> None:
        config = minimal_config({"b.attn": (4, 4)}, ["b.attn", "c.attn.q"])
        assert set(config.target_modules) == {"b.attn"}

    def test_a_path_that_ends_another(self) -> None:
        """FLUX has proj_out, and single_transformer_blocks.N.proj_out."""
        modules = ["proj_out", "blocks.0.proj_out", "blocks.0.to_q"]
        satisfied({"proj_out": (4, 4)}, modules)
        satisfied({"proj_out": (4, 4), "blocks.0.to_q": (4, 2)}, modules)
        config = minimal_config({"proj_out": (4, 4), "blocks.0.proj_out": (8, 4)}, modules)
        assert (config.r, config.rank_pattern) == (4, {"blocks.0.proj_out": 8})
        satisfied({"proj_out": (8, 4), "blocks.0.proj_out": (4, 4), "blocks.0.to_q": (4, 4)}, modules)

    def test_the_same_in_any_order(self) -> None:
        layers = {"a": (4, 1), "b": (8, 2), "c": (8, 1), "d": (4, 2)}
        one, other = minimal_config(layers, list(layers)), minimal_config(dict(reversed(layers.items())), list(layers))
        assert one == other
        assert (one.r, one.lora_alpha) == (4, 1)

    def test_options_pass_through(self) -> None:
        assert minimal_config({"a": (4, 1)}, lora_bias=True).lora_bias


class TestRefusals:
    def test_nothing_adapted(self) -> None:
        with pytest.raises(ValueError, match="at least one module path"):
            minimal_config({}, ["a"])

    def test_a_layer_the_base_has_not(self) -> None:
        with pytest.raises(ValueError, match="'b'"):
            minimal_config({"b": (4, 4)}, ["a"])
