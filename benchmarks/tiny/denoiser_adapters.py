"""Adapters on the words' way into the denoiser, attn2.to_k and attn2.to_v: trained on one model, loaded onto another.

All of these layers read the same words, so an input adapter there is an edit of the text, and can be the same one in
every layer (`tied`): like textual inversion it then knows nothing about the model that it was trained on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import xadapt
from benchmarks.tiny.denoiser_model import Progress, fit, v_loss
from benchmarks.tiny.denoiser_settings import DenoiserSettings
from benchmarks.tiny.denoiser_world import TRAINING_IMAGES, draw_concept

TARGETS = r".*attn2\.to_[kv]"
TIE = r"attn2\.to_[kv]$"


def adapter_config(kind: str, rank: int) -> PeftConfig:
    """The config of one column of the table; all at the same rank and scale, the tied one at a sixth of the parameters."""
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS}
    if kind == "copy":
        return LoraConfig(**options)
    if kind == "output":
        return xadapt.OutputAdaConfig(**options)
    return xadapt.InputAdaConfig(**options, tie=TIE if kind == "tied" else None)


@dataclass(frozen=True)
class Lesson:
    """What an adapter is to learn: the concept under that name, in the text space of the table."""

    settings: DenoiserSettings
    table: Tensor
    name: tuple[str, str]
    seed: int


@dataclass(frozen=True)
class Trained:
    """A trained adapter on its model."""

    model: PeftModel
    learning_rate: float
    loss: float  # of v, on images of the concept that the adapter was not trained on
    parameters: int


def train_adapter(
    base: nn.Module, kind: str, lesson: Lesson, learning_rate: float, title: str, progress: Progress
) -> Trained:
    """A copy of `base` with an adapter that was trained on the first `adapt_images` images of the concept."""
    settings = lesson.settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed + 3000)
        model = get_peft_model(copy.deepcopy(base), adapter_config(kind, settings.rank))
    images = slice(settings.adapt_images)
    fit(
        model,
        lambda generator: draw_concept(generator, settings.adapt_batch, images, lesson.name),
        lambda batch, generator: v_loss(model, lesson.table, batch, generator),
        steps=settings.adapt_steps,
        learning_rate=learning_rate,
        seed=lesson.seed + 4000,
        title=title,
        progress=progress,
    )
    return Trained(model, learning_rate, validation_loss(model, lesson), trainable(model))


@torch.inference_mode()
def validation_loss(model: nn.Module, lesson: Lesson) -> float:
    """v loss on images of the concept that the adapter was not trained on, always the same ones with the same noise."""
    generator = torch.Generator().manual_seed(5000)
    unseen = slice(lesson.settings.adapt_images, TRAINING_IMAGES)
    return float(v_loss(model, lesson.table, draw_concept(generator, 512, unseen, lesson.name), generator))


def trainable(model: nn.Module) -> int:
    """How many parameters ask for gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def carry(folder: Path, target: nn.Module, blocks: Mapping[int, int] | None = None) -> PeftModel:
    """A copy of `target` with the adapter of `folder` on it. `blocks` renumbers it (source block -> target block)."""
    return xadapt.load(copy.deepcopy(target), renumbered(folder, blocks) if blocks else folder).eval()


def renumbered(folder: Path, blocks: Mapping[int, int]) -> Path:
    """The adapter in `folder` for a model that kept only some blocks: a new folder beside it."""
    other = folder.with_name(folder.name + ".renumbered")
    other.mkdir(exist_ok=True)
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.search(r"transformer_blocks\.(\d+)\.", name)
        assert match is not None, name
        if int(match[1]) in blocks:
            tensors[f"{name[: match.start(1)]}{blocks[int(match[1])]}{name[match.end(1) :]}"] = tensor
    save_file(tensors, other / "adapter_model.safetensors")
    return other
