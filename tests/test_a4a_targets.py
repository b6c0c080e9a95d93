"""Which layers of a target take maps, and which targets and maps belong to an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.a4a_attaching import embeds, make, processors
from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    flux_like,
    pixart_like,
    sd3_like,
    sd15_like,
)
from tests.test_a4a_model import real_sdxl
from xadapt_a4a import find_attention_layers
from xadapt_a4a.scales import layer_scales


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class TestLayers:
    def test_widths_and_order_are_the_models(self) -> None:
        assert [layer.width for layer in find_attention_layers(sd15_like())] == SD15_WIDTHS
        assert [layer.width for layer in find_attention_layers(pixart_like())] == [48] * 3
        names = [layer.name for layer in find_attention_layers(sd15_like())]
        assert names[0].startswith("down_blocks")
        assert names[-1].startswith("mid_block")

    def test_self_attention_beside_joint_attention_is_left_alone(self) -> None:
        """The `attn2` of SD3.5-medium attends to the image itself."""
        names = [layer.name for layer in find_attention_layers(sd3_like())]
        assert names == [f"transformer_blocks.{index}.attn" for index in range(3)]

    def test_single_blocks_of_flux_are_left_out(self) -> None:
        names = [layer.name for layer in find_attention_layers(flux_like())]
        assert names == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]

    def test_targets_without_cross_attention_are_refused(self) -> None:
        unet = sd15_like(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            mid_block_type=None,
        )
        with pytest.raises(ValueError, match=r"UNet2DConditionModel has no attention layer.*AttnProcessor2_0"):
            find_attention_layers(unet)
        with pytest.raises(ValueError, match="processors seen: none"):
            find_attention_layers(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="not str"):
            find_attention_layers("unet")

    def test_a_target_with_an_ip_adapter_of_diffusers_is_refused(self) -> None:
        unet = sd15_like()
        unet._load_ip_adapter_weights([base_file(SD15_WIDTHS)], low_cpu_mem_usage=False)
        with pytest.raises(ValueError, match="unload_ip_adapter"):
            find_attention_layers(unet)

    def test_lumina_is_refused_by_its_processor(self) -> None:
        """It has cross-attention of its own kind, and no `attn_processors` that could be asked."""
        from diffusers import LuminaNextDiT2DModel

        model = LuminaNextDiT2DModel(
            sample_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=20,
        )
        with pytest.raises(ValueError, match=r"layers\.0\.attn2 .* LuminaAttnProcessor2_0, which A4A cannot extend"):
            find_attention_layers(model)

    def test_unknown_processors_are_refused(self) -> None:
        unet = sd15_like()
        unet.set_attention_slice("auto")
        with pytest.raises(ValueError, match=r"SlicedAttnProcessor.*Known: AttnProcessor, AttnProcessor2_0"):
            find_attention_layers(unet)


class TestMismatch:
    def test_another_target_is_refused(self) -> None:
        adapter = make(sd15_like())
        with pytest.raises(ValueError, match=r"for UNet2DConditionModel with 7 attention layers; PixArt.* has 3"):
            adapter.attach(pixart_like(), adapter.encode(embeds()))
        deeper = make(pixart_like())
        with pytest.raises(ValueError, match="the first of them agree"):
            deeper.attach(pixart_like(layers=4), deeper.encode(embeds()))

    def test_maps_for_another_target_or_of_another_adapter_are_refused(self) -> None:
        target = sd15_like()
        adapter, other = make(target), make(target, seed=1)
        with pytest.raises(ValueError, match="maps are for another target: 3 layers"):
            adapter.attach(target, make(pixart_like()).encode(embeds()))
        with pytest.raises(ValueError, match="computed by another adapter"):
            adapter.attach(target, other.encode(embeds()))
        with pytest.raises(TypeError, match="takes a Bank, got Tensor"):
            adapter.attach(target, embeds())

    @pytest.mark.parametrize(
        ("scale", "error", "message"),
        [
            (float("nan"), ValueError, "not finite"),
            ([1.0, 0.5], ValueError, "2 numbers; the target has 7"),
            ({"sideways": 1.0}, ValueError, "names 'sideways', where no layer is"),
            ({"down": {"block_9": 1.0}}, ValueError, "down_blocks.9"),
            ("strong", TypeError, "'strong'"),
            ({"down": "strong"}, TypeError, "'strong'"),
        ],
    )
    def test_scales_that_are_none(self, scale: Any, error: type[Exception], message: str) -> None:
        target = sd15_like()
        adapter, before = make(target), processors(target)
        with pytest.raises(error, match=message):
            adapter.attach(target, adapter.encode(embeds()), scale)
        assert processors(target) == before
        with pytest.raises(error, match=message):
            adapter.set_scale(scale)

    def test_blocks_that_instant_style_names_in_sdxl(self) -> None:
        names = [layer.name for layer in find_attention_layers(real_sdxl())]
        for scale, blocks in (
            ({"up": {"block_0": [0.0, 1.0, 0.0]}}, {"up_blocks.0.attentions.1"}),
            (
                {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}},
                {"down_blocks.2.attentions.1", "up_blocks.0.attentions.1"},
            ),
        ):
            found = [name for name, one in zip(names, layer_scales(scale, names), strict=True) if one]
            assert {".".join(name.split(".")[:4]) for name in found} == blocks
            assert len(found) == 10 * len(blocks)
