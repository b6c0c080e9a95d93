"""The module map over architectures of real size, built from their published configs on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from xadapt.module_map import ModuleMap, map_modules

diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

Modules = Mapping[str, nn.Module]
SDXL_BLOCKS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_LARGE: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}


def llama(hidden: int, middle: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 128256) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return transformers.LlamaForCausalLM(config)


def mistral(vocabulary: int) -> nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=vocabulary)
    )  # the defaults are the 7B's


def qwen2(hidden: int, middle: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return transformers.Qwen2ForCausalLM(config)


def gemma2(hidden: int, middle: int, layers: int, heads: int, kv_heads: int) -> nn.Module:
    config = transformers.Gemma2Config(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return transformers.Gemma2ForCausalLM(config)


def phi3() -> nn.Module:
    config = transformers.Phi3Config(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, pad_token_id=0
    )
    return transformers.Phi3ForCausalLM(config)


def gemma3(with_images: bool) -> nn.Module:
    text = transformers.Gemma3TextConfig(
        vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34
    )
    if not with_images:
        return transformers.Gemma3ForCausalLM(text)
    vision = transformers.SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    return transformers.Gemma3ForConditionalGeneration(config)


def pythia() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192
    )
    return transformers.GPTNeoXForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sd15": lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
    "lcm": lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, time_cond_proj_dim=256),
    "sdxl": lambda: diffusers.UNet2DConditionModel(transformer_layers_per_block=(1, 2, 10), **SDXL_BLOCKS),
    "sdxl-turbo": lambda: diffusers.UNet2DConditionModel(
        sample_size=64, transformer_layers_per_block=(1, 2, 10), **SDXL_BLOCKS
    ),
    "ssd-1b": lambda: diffusers.UNet2DConditionModel(
        transformer_layers_per_block=(1, 2, 4),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
        mid_block_type="UNetMidBlock2D",
        **SDXL_BLOCKS,
    ),
    "sd35-large": lambda: diffusers.SD3Transformer2DModel(**SD35_LARGE),
    "sd35-large-turbo": lambda: diffusers.SD3Transformer2DModel(**SD35_LARGE),
    "flux-dev": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
    "flux-schnell": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=False),
    "flux2-dev": lambda: diffusers.Flux2Transformer2DModel(),
    "llama-3.2-1b": lambda: llama(2048, 8192, 16, 32, 8),
    "llama-3.2-1b-it": lambda: llama(2048, 8192, 16, 32, 8),
    "llama-3.2-3b": lambda: llama(3072, 8192, 28, 24, 8),
    "llama-2-7b": lambda: llama(4096, 11008, 32, 32, 32, 32000),
    "qwen2-7b": lambda: qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-7b": lambda: qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-3b": lambda: qwen2(2048, 11008, 36, 16, 2, 151936),
    "mistral-7b": lambda: mistral(32000),
    "mistral-7b-v0.3": lambda: mistral(32768),
    "phi-3-mini": phi3,
    "phi-3-mini-split": lambda: llama(3072, 8192, 32, 32, 32, 32064),
    "gemma-2-2b": lambda: gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-2b-it": lambda: gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": lambda: gemma2(3584, 14336, 42, 16, 8),
    "gemma-3-4b-text": lambda: gemma3(with_images=False),
    "gemma-3-4b": lambda: gemma3(with_images=True),
    "pythia-1b": pythia,
}


@cache
def modules_of(name: str) -> Modules:
    with torch.device("meta"):
        return dict(MODELS[name]().named_modules())


@cache
def mapped(source: str, target: str) -> ModuleMap:
    return map_modules(modules_of(source), modules_of(target))


COVERAGE = [  # source, target, what ModuleMap.coverage says
    ("sd15", "lcm", "282 of 282 source layers → 282 of 283 target layers (282 same)"),
    ("lcm", "sd15", "282 of 283 source layers → 282 of 282 target layers (282 same)"),
    ("sdxl", "sdxl-turbo", "794 of 794 source layers → 794 of 794 target layers (794 same)"),
    ("sdxl", "ssd-1b", "429 of 794 source layers → 429 of 429 target layers (246 same, 183 aligned)"),
    ("ssd-1b", "sdxl", "429 of 429 source layers → 429 of 794 target layers (246 same, 183 aligned)"),
    ("sd35-large", "sd35-large-turbo", "537 of 537 source layers → 537 of 537 target layers (537 same)"),
    ("flux-dev", "flux-schnell", "502 of 504 source layers → 502 of 502 target layers (502 same)"),
    ("flux-dev", "flux2-dev", "220 of 504 source layers → 106 of 203 target layers (152 part, 68 reshaped)"),
    ("llama-3.2-1b", "llama-3.2-1b-it", "114 of 114 source layers → 114 of 114 target layers (114 same)"),
    ("llama-3.2-1b", "llama-3.2-3b", "114 of 114 source layers → 114 of 198 target layers (114 reshaped)"),
    ("llama-3.2-3b", "llama-3.2-1b", "114 of 198 source layers → 114 of 114 target layers (114 reshaped)"),
    ("qwen2-7b", "qwen2.5-7b", "198 of 198 source layers → 198 of 198 target layers (198 same)"),
    ("qwen2-7b", "qwen2.5-3b", "198 of 198 source layers → 198 of 254 target layers (198 reshaped)"),
    (
        "mistral-7b",
        "mistral-7b-v0.3",
        "226 of 226 source layers → 226 of 226 target layers (224 same, 2 reshaped)",
    ),
    (
        "llama-2-7b",
        "mistral-7b",
        "226 of 226 source layers → 226 of 226 target layers (96 reshaped, 66 same, 64 heads)",
    ),
    ("phi-3-mini", "phi-3-mini-split", "130 of 130 source layers → 226 of 226 target layers (160 whole, 66 same)"),
    ("phi-3-mini-split", "phi-3-mini", "226 of 226 source layers → 130 of 130 target layers (160 part, 66 same)"),
    ("gemma-2-2b", "gemma-2-2b-it", "184 of 184 source layers → 184 of 184 target layers (184 same)"),
    ("gemma-2-2b", "gemma-2-9b", "184 of 184 source layers → 184 of 296 target layers (184 reshaped)"),
    (
        "gemma-3-4b-text",
        "gemma-3-4b",
        "240 of 240 source layers → 240 of 407 target layers (239 renamed, 1 same)",
    ),
    (
        "gemma-3-4b",
        "gemma-3-4b-text",
        "240 of 407 source layers → 240 of 240 target layers (239 renamed, 1 same)",
    ),
    (
        "pythia-1b",
        "llama-3.2-1b",
        "66 of 66 source layers → 98 of 114 target layers (48 whole, 48 renamed, 2 reshaped)",
    ),
]


@pytest.mark.parametrize(("source", "target", "coverage"), COVERAGE, ids=lambda value: value.replace(" ", "_")[:20])
def test_coverage(source: str, target: str, coverage: str) -> None:
    found = mapped(source, target)
    assert str(found.coverage) == coverage
    assert len(found.unmatched_source) == found.coverage.source - found.coverage.mapped_source
    for line in found.lines:
        assert line.reason
        assert line.source in modules_of(source)
        assert line.target in modules_of(target)
    for unmatched in (*found.unmatched_source, *found.unmatched_target):
        assert "no layer of the" not in unmatched.reason, f"{unmatched.path} has a better reason than that"


@pytest.mark.parametrize(("source", "target", "coverage"), COVERAGE, ids=lambda value: value.replace(" ", "_")[:20])
def test_no_layer_is_used_twice_but_fused_ones(source: str, target: str, coverage: str) -> None:
    lines = mapped(source, target).lines
    for fused, side in (("whole", "source"), ("part", "target")):
        single = [getattr(line, side) for line in lines if line.relation != fused]
        assert len(single) == len(set(single))
        assert not set(single) & {getattr(line, side) for line in lines if line.relation == fused}


@pytest.mark.parametrize("name", MODELS)
def test_each_maps_onto_itself(name: str) -> None:
    found = mapped(name, name)
    assert {line.relation for line in found.lines} == {"same"}
    assert all(line.source == line.target for line in found.lines)
    assert not found.unmatched_source
    assert not found.unmatched_target


def test_lcm_has_an_embedding_of_the_guidance_scale() -> None:
    (layer,) = mapped("sd15", "lcm").unmatched_target
    assert layer.path == "time_embedding.cond_proj"
    assert layer.reason == "the source has no 'cond_proj' in time_embedding"


def test_schnell_has_no_guidance_embedder() -> None:
    paths = [layer.path for layer in mapped("flux-dev", "flux-schnell").unmatched_source]
    assert paths == [f"time_text_embed.guidance_embedder.linear_{number}" for number in (1, 2)]


def test_pruned_depth_is_aligned_within_each_block() -> None:
    found = mapped("sdxl", "ssd-1b")
    (line,) = found.of("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k")
    assert line.target == "down_blocks.2.attentions.1.transformer_blocks.3.attn2.to_k"
    assert line.relation == "aligned"
    assert line.fits
    assert "transformer_blocks has 10 blocks and 4 in the target: 9 is aligned with 3" in line.reason
    gone = "mid_block.attentions.0.proj_in"
    assert found.why_unmatched(gone) == "the target has no 'attentions' in mid_block"


def test_other_depth_is_spread_evenly_and_keeps_the_ends() -> None:
    found = mapped("llama-3.2-1b", "llama-3.2-3b")
    targets = [found.of(f"model.layers.{number}.mlp.up_proj")[0].target for number in range(16)]
    blocks = [int(path.split(".")[2]) for path in targets]
    assert (blocks[0], blocks[-1]) == (0, 27)
    assert {later - earlier for earlier, later in itertools.pairwise(blocks)} == {1, 2}


def test_other_numbers_of_key_value_heads_are_told_from_other_widths() -> None:
    found = mapped("llama-2-7b", "mistral-7b")
    (line,) = found.of("model.layers.3.self_attn.k_proj")
    assert line.relation == "heads"
    assert line.reason == "another number of key-value heads (4096 × 4096 in the source, 1024 × 4096 in the target)"
    assert found.of("model.layers.3.self_attn.q_proj")[0].relation == "same"
    assert found.of("model.layers.3.mlp.up_proj")[0].relation == "reshaped"


def test_the_parts_of_phi_3_s_fused_layers_have_their_rows() -> None:
    found = mapped("phi-3-mini-split", "phi-3-mini")
    rows = {
        name: found.of(f"model.layers.5.{name}")[0].rows
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert list(rows.values()) == [(0, 3072), (3072, 6144), (6144, 9216), (0, 8192), (8192, 16384)]
    back = mapped("phi-3-mini", "phi-3-mini-split").of("model.layers.5.self_attn.qkv_proj")
    assert [line.target.rpartition(".")[2] for line in back] == ["q_proj", "k_proj", "v_proj"]
    assert [line.rows for line in back] == [(0, 3072), (3072, 6144), (6144, 9216)]


def test_flux_single_blocks_are_fused_in_flux_2() -> None:
    line = mapped("flux-dev", "flux2-dev").of("single_transformer_blocks.0.proj_mlp")[0]
    assert line.target == "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    assert line.relation == "part"
    assert line.rows is None, "the widths differ"


def test_a_language_model_is_found_inside_one_with_images() -> None:
    found = mapped("gemma-3-4b-text", "gemma-3-4b")
    (line,) = found.of("model.layers.7.self_attn.q_proj")
    assert line.target == "model.language_model.layers.7.self_attn.q_proj"
    assert line.reason == "the target has under model.language_model what the source has under model; the same shape"
    assert found.of("lm_head")[0].relation == "same"
    assert all("vision_tower" in layer.path or "projector" in layer.path for layer in found.unmatched_target)


def test_pythia_s_queries_alternate_with_keys_and_values() -> None:
    lines = mapped("pythia-1b", "llama-3.2-1b").of("gpt_neox.layers.0.attention.query_key_value")
    assert [line.rows for line in lines] == [None] * 3
    (line,) = mapped("pythia-1b", "llama-3.2-1b").of("gpt_neox.layers.0.mlp.dense_4h_to_h")
    assert line.target == "model.layers.0.mlp.down_proj"
    assert line.relation == "renamed"
    assert "dense_4h_to_h is called down_proj in the target" in line.reason
