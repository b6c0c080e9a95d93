"""Adapters on tiny targets of every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    flux_like,
    hunyuan_like,
    pixart_like,
    sana_like,
    sd3_like,
    sd15_like,
    sdxl_like,
)
from xadapt_a4a import A4AModel

TARGETS: dict[str, Callable[..., nn.Module]] = {
    "sd15": sd15_like,
    "sdxl": sdxl_like,
    "pixart": pixart_like,
    "sd3": sd3_like,
    "flux": flux_like,
    "sana": sana_like,
    "hunyuan": hunyuan_like,
}
every_target = pytest.mark.parametrize("name", TARGETS)


def make(target: nn.Module, seed: int = 0, **options: Any) -> A4AModel:
    torch.manual_seed(seed)
    return A4AModel.from_ip_adapter(base_file(SD15_WIDTHS), target, **{"depth": 1, **options}).eval()


def embeds(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, generator=torch.Generator().manual_seed(seed))


def processors(target: nn.Module) -> list[Any]:
    return [module.processor for module in target.modules() if hasattr(module, "processor")]
