"""An adapter's tensors against its config: what PEFT would leave out, or not load, is not folded either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.base_models import tied_llama
from tests.conftest import make_llama
from tests.feature_models import OneLayer, adapted, load
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig
from xadapt.folding import layers_of

TARGETS = ["q_proj", "k_proj", "v_proj"]
CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": LoraConfig,
    "input": InputAdaConfig,
    "output": OutputAdaConfig,
    "hybrid": HybridAdaConfig,
}
VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "export": xadapt.export_lora,
    "merge": xadapt.merge,
    "inspect": lambda adapter, base, out: xadapt.inspect(adapter, base),
}


def edited(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def saved(tmp_path: Path, kind: str = "lora", **options: Any) -> Path:
    model = adapted(make_llama(), CONFIGS[kind](**{"r": 2, "target_modules": TARGETS, **options}))
    return xadapt.save(model, tmp_path / "adapter")


def refused(verb: str, adapter: Path, tmp_path: Path) -> str:
    make_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is the test)
        VERBS[verb](adapter, tmp_path / "base", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
class TestRefusals:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_layers_that_the_config_does_not_target(self, kind: str, verb: str, tmp_path: Path) -> None:
        message = refused(verb, edited(saved(tmp_path, kind), target_modules=["q_proj", "v_proj"]), tmp_path)
        assert "tensors for layers that its config does not target" in message
        assert "model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj. " in message

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": r"model\.layers\.0\..*_proj"},
            {"layers_to_transform": [0]},
            {"exclude_modules": r".*\.1\..*"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_by_peft_s_rule(self, changes: dict[str, Any], verb: str, tmp_path: Path) -> None:
        message = refused(verb, edited(saved(tmp_path), **changes), tmp_path)
        assert "does not target" in message
        assert "layers.1.self_attn.q_proj" in message
        assert "layers.0" not in message

    @pytest.mark.parametrize("kind", ["lora", "input", "output"])
    def test_tensors_of_another_rank(self, kind: str, verb: str, tmp_path: Path) -> None:
        folder = edited(saved(tmp_path, kind), r=4, rank_pattern={"k_proj": 2})
        message = refused(verb, folder, tmp_path)
        assert "model.layers.0.self_attn.q_proj has rank 2, and its config says 4" in message
        assert "k_proj" not in message

    @pytest.mark.parametrize("changes", [{"r": 5}, {"feature_r": 2}], ids=lambda changes: next(iter(changes)))
    def test_parts_of_a_hybrid_of_another_rank(self, changes: dict[str, int], verb: str, tmp_path: Path) -> None:
        folder = edited(saved(tmp_path, "hybrid", r=4), **changes)
        assert "layers.0.self_attn.q_proj has rank" in refused(verb, folder, tmp_path)


def test_stock_peft_does_neither(tmp_path: Path) -> None:
    folder = edited(saved(tmp_path), r=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(make_llama(), folder)
    stock: Any = load(make_llama(), edited(folder, r=2, target_modules=["q_proj"])).merge_and_unload()
    for name, tensor in make_llama().state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor) == ("q_proj" not in name), name


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.k_proj": 1}, "alpha_pattern": {"q_proj": 5}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r".*\.self_attn\.[qk]_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("kind", ["lora", "output"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_what_peft_saves_is_taken(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, kind, **options)
    opened = xadapt.open_base(make_llama())
    layers = layers_of([xadapt.read_adapter(folder)], opened)
    stock: Any = load(make_llama(), folder).merge_and_unload()
    moved, bare = stock.state_dict(), make_llama().state_dict()
    assert {layer.weight_name for layer in layers} == {n for n in bare if not torch.equal(moved[n], bare[n])}
    for layer in layers:
        update = layer.update(opened.weights()).matrix.tensor()
        update = update.T if "embed" in layer.path and update.shape != bare[layer.weight_name].shape else update
        torch.testing.assert_close(moved[layer.weight_name] - bare[layer.weight_name], update, rtol=0, atol=1e-5)


def test_all_linear_that_no_base_has_spelled_out(tmp_path: Path) -> None:
    folder = edited(saved(tmp_path, target_modules="all-linear"), target_modules="all-linear")
    assert len(layers_of([xadapt.read_adapter(folder)], xadapt.open_base(make_llama()))) == 14


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_the_layers_that_a_weight_is_tied_to(tmp_path: Path) -> None:
    """With ensure_weight_tying, PEFT adapts the head with the embedding, and no target names it."""
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    folder = tmp_path / "adapter"
    adapted(tied_llama(), config).save_pretrained(str(folder), save_embedding_layers=False)
    assert any("lm_head" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert len(layers_of([xadapt.read_adapter(folder)], xadapt.open_base(tied_llama()))) == 2


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 1), nn.Embedding(9, 5)], ids=repr)
@pytest.mark.parametrize("rank", [3, 1])
def test_ranks_of_what_is_no_linear(layer: nn.Module, rank: int, tmp_path: Path) -> None:
    folder = xadapt.save(adapted(OneLayer(layer), LoraConfig(r=rank, target_modules=["layer"])), tmp_path / "adapter")
    base = xadapt.open_base(
        OneLayer(type(layer)(*([9, 5] if isinstance(layer, nn.Embedding) else [4, 6, layer.kernel_size])))
    )
    assert len(layers_of([xadapt.read_adapter(folder)], base)) == 1
    with pytest.raises(ValueError, match=f"layer has rank {rank}, and its config says 2"):
        layers_of([xadapt.read_adapter(edited(folder, r=2))], base)
