"""`xadapt.inspect`: what it says is what the adapter is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import xadapt
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space

pytestmark = pytest.mark.usefixtures("two_threads")
MakeBase = Callable[..., nn.Module]
TARGETS = ["q_proj", "v_proj"]


def saved(base: nn.Module, config: Any, folder: Path) -> Path:
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return xadapt.save(model, folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (InputAdaConfig(r=2, target_modules=TARGETS), ("input_ada", "LoRA", "input", (2,))),
        (OutputAdaConfig(r=2, target_modules=TARGETS, use_dora=True), ("output_ada", "DoRA", "output", (2,))),
        (HybridAdaConfig(r=4, feature_r=1, target_modules=TARGETS), ("hybrid_ada", "LoRA (hybrid)", "output", (4,))),
        (FullAdaConfig(space="input", target_modules=TARGETS), ("full_ada", "full", "input", ())),
        (feature_space(LoHaConfig(r=2, target_modules=TARGETS), "input"), ("input_ada", "LOHA", "input", ())),
        (LoraConfig(r=2, target_modules=TARGETS, rank_pattern={"v_proj": 3}), ("lora", "LoRA", "parameter", (2, 3))),
        (LoHaConfig(r=2, target_modules=TARGETS), ("loha", "LOHA", "parameter", ())),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "peft_type") else "",
)
def test_it_says_what_the_adapter_is(llama: nn.Module, config: Any, expected: tuple[Any, ...], tmp_path: Path) -> None:
    found = xadapt.inspect(saved(llama, config, tmp_path / "adapter"))
    assert (found.kind, found.method, found.space, found.ranks) == expected
    assert [layer.path for layer in found.layers] == [
        f"model.layers.{block}.self_attn.{name}" for block in (0, 1) for name in TARGETS
    ]
    assert found.parameters == sum(layer.parameters for layer in found.layers) > 0
    assert found.bytes == 4 * found.parameters
    assert all(layer.norm > 0 for layer in found.layers)
    assert found.dtypes == ("float32",)


def test_norm_and_scaling_are_those_of_the_factors(llama: nn.Module, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, alpha_pattern={"v_proj": 1})
    folder = saved(llama, config, tmp_path / "adapter")
    tensors = xadapt.read_adapter(folder).tensors
    for layer in xadapt.inspect(folder).layers:
        scaling = (1 if "v_proj" in layer.path else 6) / 2
        product = tensors[f"{layer.path}.lora_B.weight"] @ tensors[f"{layer.path}.lora_A.weight"]
        assert layer.scaling == scaling
        assert layer.norm == pytest.approx(scaling * float(product.norm()), rel=1e-5)


def test_against_a_base_it_measures_the_update(llama: nn.Module, llama_like: MakeBase, tmp_path: Path) -> None:
    folder = saved(llama, OutputAdaConfig(r=2, target_modules=TARGETS), tmp_path / "adapter")
    base = llama_like(seed=1)
    merged: Any = xadapt.load(llama_like(seed=1), folder).merge_and_unload()  # type: ignore[operator]
    found = xadapt.inspect(folder, base)
    assert found.base is not None
    for layer in found.layers:
        before, after = (model.get_submodule(layer.path).weight.detach() for model in (base, merged))
        assert layer.update == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_a_tie_is_shown_on_every_layer_of_a_base(llama: nn.Module, llama_like: MakeBase, tmp_path: Path) -> None:
    config = InputAdaConfig(r=2, target_modules=TARGETS, tie=r"(layers\.\d+)\.")
    folder = saved(llama, config, tmp_path / "adapter")
    assert len(xadapt.inspect(folder).layers) == 2  # where it is stored
    assert len(xadapt.inspect(folder, llama_like(seed=1)).layers) == 4


def test_a_base_it_does_not_fit_is_refused(llama: nn.Module, llama_like: MakeBase, tmp_path: Path) -> None:
    folder = saved(llama, InputAdaConfig(r=2, target_modules=TARGETS), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not fit"):
        xadapt.inspect(folder, llama_like(hidden_size=64))
    with pytest.raises(ValueError, match="lacks"):
        xadapt.inspect(folder, llama_like(layers=1))


@pytest.mark.parametrize("dora", [False, True])
def test_layers_have_the_base_s_names(dora: bool, llama_like: MakeBase, tmp_path: Path) -> None:
    """transformers 5 has dropped CLIP's `text_model.`; the names of old are found in the base all the same."""
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora)
    folder = saved(llama_like(), config, tmp_path / "adapter")
    new = xadapt.inspect(folder, llama_like())
    file = folder / "adapter_model.safetensors"
    renamed = {
        key.replace("base_model.model.", "base_model.model.text_model.", 1): t for key, t in load_file(file).items()
    }
    save_file(renamed, file)
    old = xadapt.inspect(folder, llama_like())
    assert next(layer.path for layer in xadapt.inspect(folder).layers).startswith("text_model.model.")
    for layer, other in zip(old.layers, new.layers, strict=True):
        assert (layer.path, layer.rank, layer.norm, layer.update) == (other.path, other.rank, other.norm, other.update)
        assert layer.rank == 2


def test_a_fingerprint_by_the_names_of_old(llama: nn.Module, llama_like: MakeBase, tmp_path: Path) -> None:
    folder = saved(llama, InputAdaConfig(r=2, target_modules=TARGETS), tmp_path / "adapter")
    file, path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    renamed = {
        key.replace("base_model.model.", "base_model.model.text_model.", 1): t for key, t in load_file(file).items()
    }
    save_file(renamed, file)
    config = json.loads(path.read_text())
    config["base_fingerprint"] = {f"text_model.{layer}": text for layer, text in config["base_fingerprint"].items()}
    path.write_text(json.dumps(config))
    assert {layer.match for layer in xadapt.inspect(folder, llama_like()).layers} == {"same"}
