"""A saved adapter knows the base it was trained on, and says once when it is loaded onto another."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig, get_peft_model
from torch import nn

import xadapt
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space
from xadapt.provenance import _told
from xadapt.version import __version__

MakeBase = Callable[..., nn.Module]
TARGETS = ["q_proj", "v_proj"]
CONFIGS: list[Any] = [
    InputAdaConfig(r=2, target_modules=TARGETS),
    InputAdaConfig(r=2, target_modules=TARGETS, tie=r"(layers\.\d+)\."),
    OutputAdaConfig(r=2, target_modules=TARGETS),
    HybridAdaConfig(r=4, target_modules=TARGETS),
    FullAdaConfig(target_modules=TARGETS),
    feature_space(LoHaConfig(r=2, target_modules=TARGETS), "output"),
]
ids = lambda config: type(config).__name__  # noqa: E731


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    _told.clear()


@pytest.mark.parametrize("config", CONFIGS, ids=ids)
def test_every_adapted_layer_has_a_fingerprint(config: Any, llama: nn.Module, tmp_path: Path) -> None:
    model = get_peft_model(llama, config)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["xadapt_version"] == __version__
    assert set(told["base_fingerprint"]) == {
        f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in TARGETS
    }
    assert all(len(line.split()) == 3 for line in told["base_fingerprint"].values())


def test_inspect_says_same_and_differs(llama_like: MakeBase, tmp_path: Path) -> None:
    xadapt.save(get_peft_model(llama_like(), InputAdaConfig(r=2, target_modules=TARGETS)), tmp_path / "adapter")
    for seed, match in ((0, "same"), (1, "differs")):
        found = xadapt.inspect(tmp_path / "adapter", llama_like(seed=seed))
        assert {layer.match for layer in found.layers} == {match}


def test_a_config_used_again_takes_the_new_base(llama_like: MakeBase) -> None:
    config = InputAdaConfig(r=2, target_modules=TARGETS)
    first = dict(get_peft_model(llama_like(), config).peft_config["default"].base_fingerprint or {})
    second = get_peft_model(llama_like(seed=1), config).peft_config["default"].base_fingerprint
    assert second is not None
    assert first != second


def test_loading_elsewhere_is_said_once_and_changes_nothing(
    llama_like: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    xadapt.save(get_peft_model(llama_like(), InputAdaConfig(r=2, target_modules=TARGETS)), tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, logger="xadapt"):
        xadapt.load(llama_like(), tmp_path / "adapter")
        assert not caplog.records
        model = xadapt.load(llama_like(seed=1), tmp_path / "adapter")
        xadapt.load(llama_like(seed=1), tmp_path / "adapter")
    (record,) = caplog.records
    assert "4 of its 4 layers have other weights here" in record.getMessage()
    # Saved again from there, it still tells where it was trained.
    xadapt.save(model, tmp_path / "again")
    read = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "again")]
    assert read[0]["base_fingerprint"] == read[1]["base_fingerprint"]


def test_a_layer_that_this_base_lacks_is_no_matter(llama_like: MakeBase, tmp_path: Path) -> None:
    """An adapter whose layers were renumbered for a shallower model still tells of all the layers it was trained on."""
    xadapt.save(get_peft_model(llama_like(), InputAdaConfig(r=2, target_modules=TARGETS)), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_fingerprint"]["model.layers.7.self_attn.q_proj"] = "32x32 float32 0123456789abcdef"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    xadapt.load(llama_like(), tmp_path / "adapter")
