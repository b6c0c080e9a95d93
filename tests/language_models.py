"""What the integration tests do with a tiny language model: configs for its layers, one batch, one training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoHaConfig, PeftConfig, PeftModel
from torch import Tensor, nn

from tests.conftest import make_llama
from tests.feature_models import adapted
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(14).reshape(2, 7)

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "input": lambda: InputAdaConfig(r=4, target_modules=TARGETS),
    "output": lambda: OutputAdaConfig(r=4, target_modules=TARGETS),
    "hybrid": lambda: HybridAdaConfig(r=4, feature_r=2, target_modules=TARGETS),
    "tied": lambda: InputAdaConfig(r=4, target_modules=["q_proj", "v_proj"], tie=r"(layers\.\d+)\.self_attn"),
}
MORE_CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    **CONFIGS,
    "full": lambda: FullAdaConfig(space="input", target_modules=TARGETS),
    "loha": lambda: feature_space(LoHaConfig(r=4, target_modules=TARGETS), "output"),
    "dora": lambda: InputAdaConfig(r=4, use_dora=True, target_modules=TARGETS),
}


def adapted_llama(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """The tiny Llama with a random adapter of one of `CONFIGS`."""
    return adapted(make_llama(seed, **options).to(dtype), MORE_CONFIGS[name](), std=0.1)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(input_ids=IDS).logits)


def loss_and_gradients(model: nn.Module, ids: Tensor = IDS) -> tuple[float, dict[str, Tensor]]:
    """One step in training mode, without the update."""
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses_in_training(model: nn.Module, steps: int = 10, **batch: Tensor) -> list[float]:
    """AdamW on one batch, by default `IDS` and the same as labels."""
    batch = batch or {"input_ids": IDS, "labels": IDS}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
