"""Patterns whose keys overlap: PEFT takes the first that matches, and writes them sorted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel
from torch import Tensor, nn

import xadapt
from tests.conftest import make_llama
from tests.feature_models import Mlp, adapted, load, mlp_batch, with_second
from xadapt import InputAdaConfig
from xadapt.patterns import first_key, settled, targeted

Logits = Callable[[nn.Module], Tensor]
TARGETS = ["q_proj", "v_proj"]
OVERLAPPING: dict[str, dict[str, int]] = {
    "alpha_pattern": {"q_proj": 3, r".*\.1\..*": 7},
    "rank_pattern": {"v_proj": 2, r"layers\.1\..*": 3},
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS, **OVERLAPPING),
    "rslora": lambda: LoraConfig(r=4, target_modules=r".*[qv]_proj.*", use_rslora=True, **OVERLAPPING),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True, **OVERLAPPING),
    "loha": lambda: LoHaConfig(r=4, target_modules=TARGETS, **OVERLAPPING),
    "input": lambda: InputAdaConfig(r=4, target_modules=TARGETS, **OVERLAPPING),
    "tied": lambda: InputAdaConfig(
        r=4, target_modules=TARGETS, tie=r"(layers\.\d+)\.", rank_pattern={r".*\.1\..*": 3, ".*": 2, r"(.*\.1\..*)": 5}
    ),
}


def live(name: str, options: dict[str, Any] | None = None) -> PeftModel:
    return adapted(make_llama(), CONFIGS[name](), **(options or {}))


def patterns_in(folder: Path) -> dict[str, dict[str, Any]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name: config[name] for name in OVERLAPPING}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_what_is_saved_is_the_live_model(name: str, adapter_name: str, logits: Logits, tmp_path: Path) -> None:
    model = live(name, {"adapter_name": adapter_name})
    config: Any = model.peft_config[adapter_name]
    before = {name: dict(getattr(config, name)) for name in OVERLAPPING}
    folder = xadapt.save(model, tmp_path / "adapter", adapter_name)
    torch.testing.assert_close(logits(load(make_llama(), folder)), logits(model))
    assert (logits(model) - logits(make_llama())).abs().max() > 1e-3
    assert {name: list(getattr(config, name).items()) for name in OVERLAPPING} == {
        name: list(pattern.items()) for name, pattern in before.items()
    }


def test_stock_peft_saves_another_adapter(logits: Logits, tmp_path: Path) -> None:
    model = adapted(make_llama(), LoraConfig(r=4, target_modules=TARGETS, alpha_pattern=OVERLAPPING["alpha_pattern"]))
    model.save_pretrained(str(tmp_path))
    assert (logits(load(make_llama(), tmp_path)) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "method"), [("lora", "copy"), ("input", "input_ada"), ("tied", "input_ada")])
def test_a_live_model_is_carried_as_it_is(name: str, method: str, logits: Logits, tmp_path: Path) -> None:
    model = live(name)
    xadapt.transfer(model, make_llama(), make_llama(), method, out=tmp_path / "carried")
    torch.testing.assert_close(logits(load(make_llama(), tmp_path / "carried")), logits(model))


@pytest.mark.parametrize(
    "patterns",
    [
        {"alpha_pattern": {"v_proj": 3, "q_proj": 7}},
        {"rank_pattern": {"q_proj": 3, r".*\.1\..*q_proj": 3}},
        {"alpha_pattern": {r".*\.1\..*": 7, "q_proj": 3}},
        {"rank_pattern": {"v_proj": 2}},
    ],
    ids=["apart", "with one value", "in order", "one"],
)
def test_patterns_that_say_the_same_in_any_order_stay(patterns: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(make_llama(), LoraConfig(r=4, target_modules=TARGETS, **patterns))
    folder = xadapt.save(model, tmp_path / "adapter")
    assert patterns_in(folder) == {"alpha_pattern": {}, "rank_pattern": {}} | patterns


def test_only_layers_of_this_adapter_are_named(tmp_path: Path) -> None:
    """PEFT warns of a key that matches no layer."""
    model = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"], alpha_pattern={"lin0": 3, "lin.": 5}))
    with_second(model, LoraConfig(r=2, target_modules=["lin0", "lin1"], alpha_pattern={"lin0": 3, "lin(0|1)": 5}))
    assert patterns_in(xadapt.save(model, tmp_path / "one"))["alpha_pattern"] == {"^lin0": 3}
    model.set_adapter("second")
    folder = xadapt.save(model, tmp_path / "two", "second")
    assert patterns_in(folder)["alpha_pattern"] == {"^lin0": 3, "^lin1": 5}
    torch.testing.assert_close(load(Mlp(), folder)(mlp_batch()), model(mlp_batch()))


class Experts(nn.Module):
    """Two bare parameters of one module, which PEFT adapts as target_parameters, one layer within the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.randn(16, 16))
        self.up = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate @ self.up


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT looks among modules only
def test_parameters_have_patterns_too(tmp_path: Path) -> None:
    base = nn.Sequential(Experts())
    config = LoraConfig(target_modules=[], target_parameters=["0.gate", "0.up"], rank_pattern={"gate": 2, "0..*": 3})
    names = ["0.gate", "0.up"]
    assert list(targeted(config, dict(base.named_modules()))) == names
    assert settled(config, names) == {"rank_pattern": {r"^0\.gate": 2, r"^0\.up": 3}}
    model = adapted(base, config)
    folder = xadapt.save(model, tmp_path / "adapter")
    assert patterns_in(folder)["rank_pattern"] == {r"^0\.gate": 2, r"^0\.up": 3}
    torch.testing.assert_close(load(nn.Sequential(Experts()), folder)(mlp_batch()), model(mlp_batch()))


def test_it_asks_for_no_layers_where_no_order_is() -> None:
    assert settled(LoraConfig(rank_pattern={"q_proj": 2}), iter(lambda: pytest.fail("asked"), None)) == {}


@pytest.mark.parametrize("path", ["a.q_proj", "a.1.q_proj", "q_proj", "a.xq_proj", "a.1.v_proj"])
@pytest.mark.parametrize(
    "keys", [["q_proj", r".*\.1\..*"], [r".*\.1\..*", "q_proj"], ["^a.q_proj"], ["v_proj", "1.v_proj"], []]
)
def test_the_first_key_is_peft_s(keys: list[str], path: str) -> None:
    from peft.utils.other import get_pattern_key

    assert (first_key(keys, path) or path) == get_pattern_key(keys, path)
