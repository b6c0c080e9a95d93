"""The siblings of the tiny denoiser: those of `benchmarks.tiny`, one in other inner bases, one trained on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tiny.denoiser_model import Progress, fit, pretrain, v_loss
from benchmarks.tiny.denoiser_siblings import Sibling, few_step, student
from benchmarks.tiny.denoiser_world import CONCEPT, STYLES, draw_styles
from benchmarks.tiny.siblings import random_rotation
from benchmarks.zoo.settings import DenoiserZoo

INDEPENDENT = 500  # added to the seed


def make_sibling(
    name: str, source: nn.Module, table: Tensor, settings: DenoiserZoo, seed: int, show: Progress
) -> nn.Module:
    """The model of that name; `source` stays as it is."""
    tiny = settings.tiny
    if name == "reparam":
        return reparam(source, torch.Generator().manual_seed(seed + 3000))
    if name == "drift":
        return drift(source, table, settings, seed, show)
    if name == "indep":
        return pretrain(tiny, table, seed + INDEPENDENT, "pre-training the independent model", show)
    return {"lcm": few_step, "student": student}[name](source, table, tiny, seed, show).model


def sampled(name: str, model: nn.Module, settings: DenoiserZoo) -> Sibling:
    """How that sibling is sampled: the few-step model in four steps, with guidance built in."""
    if name == "lcm":
        return Sibling(model, steps=4, guidance=1.0, fresh_noise=True)
    return Sibling(model, settings.tiny.sampling_steps, settings.tiny.guidance)


@torch.no_grad()
def reparam(source: nn.Module, generator: torch.Generator) -> nn.Module:
    """In every head of every attention, values rotated against to_out and queries against keys: the same function."""
    model = copy.deepcopy(source)
    for module in model.modules():
        if not hasattr(module, "to_q"):
            continue
        attention: Any = module
        size = attention.to_q.out_features // attention.heads
        values = torch.block_diag(*(random_rotation(size, generator) for _ in range(attention.heads)))
        match = torch.block_diag(*(random_rotation(size, generator) for _ in range(attention.heads)))
        for layer, rotation in ((attention.to_v, values), (attention.to_q, match), (attention.to_k, match)):
            layer.weight.copy_(rotation @ layer.weight)
            if layer.bias is not None:
                layer.bias.copy_(rotation @ layer.bias)
        out = attention.to_out[0]
        out.weight.copy_(out.weight @ values.T)
    return model


def drift(source: nn.Module, table: Tensor, settings: DenoiserZoo, seed: int, show: Progress) -> nn.Module:
    """The source, trained on with all styles but one of the two that the first task is made of."""
    model, (steps, rate) = copy.deepcopy(source), settings.drift
    styles = tuple(style for style in STYLES if style != ("inverted", "upright"))
    assert CONCEPT in styles
    fit(
        model,
        lambda generator: draw_styles(generator, settings.tiny.pretrain_batch, styles),
        lambda batch, generator: v_loss(model, table, batch, generator, settings.tiny.blank_share),
        steps=steps,
        learning_rate=rate,
        seed=seed + 2000,
        title="making the sibling: drift",
        progress=show,
    )
    return model
