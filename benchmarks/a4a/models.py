"""The tiny models: a source like SD1.5, targets like SDXL and PixArt-α, built from diffusers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.a4a import world
from xadapt_a4a.objective import Objective, objective_of

CONTEXT = {"sd15": 24, "sdxl": 40, "pixart": 20}  # the width of each one's text features
TEXT_SCALE = {"sd15": 1.0, "sdxl": 1.0, "pixart": 4.0}  # its caption projection starts with small outputs
POOLED = 16  # of the sdxl-like model's pooled text


def build(name: str, seed: int) -> nn.Module:
    """An untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = {"sd15": _sd15, "sdxl": _sdxl, "pixart": _pixart}[name]()
    return model.eval()


def _sd15() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=world.SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT["sd15"],
        attention_head_dim=2,
        norm_num_groups=8,
    )


def _sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=world.SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=CONTEXT["sdxl"],
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
    )


def _pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=3,
        out_channels=6,  # PixArt predicts a variance as well
        num_layers=3,
        cross_attention_dim=64,
        caption_channels=CONTEXT["pixart"],
        sample_size=world.SIDE,
        patch_size=1,
        use_additional_conditions=False,
    )


def objective(model: nn.Module) -> Objective:
    """How these models are trained: each on the noise schedule of its family, all to predict v.

    In images this small the noise that is left says little more than a few colours, and the error of the predicted noise weighs
    them less, the more they are hidden: there would be next to nothing to learn for an adapter.
    """
    return objective_of(model, "v_prediction")


class Text:
    """A model's text encoder: prompts in, what its forward takes out."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.table = TEXT_SCALE[name] * world.word_table(CONTEXT[name], seed)

    def __call__(self, prompts: Tensor) -> dict[str, Any]:
        """encoder_hidden_states (n, 3, width), and what else the model is conditioned on, for prompts (n, 3)."""
        words = self.table[prompts]
        conditions: dict[str, Any] = {"encoder_hidden_states": words}
        if self.name == "sdxl":
            pooled = words.mean(dim=1)[:, :POOLED]
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(len(words), 6)}
        if self.name == "pixart":
            conditions["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return conditions
