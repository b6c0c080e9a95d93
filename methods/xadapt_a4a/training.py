"""A plain training loop for A4A: one device, no checkpoints. The loss is the target's own (A4A, Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import A4AModel
from .objective import Objective, predict

_NEEDED = ("image_embeds", "latents", "encoder_hidden_states")


def training_step(
    model: A4AModel,
    target: nn.Module,
    batch: Mapping[str, Any],
    objective: Objective,
    generator: torch.Generator,
    *,
    image_drop: float = 0.0,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> float:
    """One forward and backward at λ = 1 (A4A, Eq. 14): the gradients are added to what is there, the loss is returned.

    Args:
        image_drop: the share of samples whose reference is dropped, which guidance needs.
        backward: accelerator.backward, where one is used.
    """
    check_batch(batch)
    maps = model(*drop_images(model, batch, image_drop, generator))
    with model.attached(target, model.bank(maps), 1.0, guidance=False):
        noise = torch.randn(batch["latents"].shape, generator=generator).to(batch["latents"])
        noisy, times, goal = objective.noisy(batch["latents"], noise, generator)
        loss = F.mse_loss(predict(target, noisy, times, batch).float(), goal.float())
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"The loss is {loss.item()}; lower the learning rates, or train in float32.")
        backward(loss)
    return loss.item()


def train(
    model: A4AModel,
    target: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    objective: Objective,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    generator: torch.Generator,
    image_drop: float,
) -> list[float]:
    """The losses of `steps` steps over the batches, from the start again when they end. The target stays frozen."""
    frozen = [(parameter, parameter.requires_grad) for parameter in target.parameters()]
    losses: list[float] = []
    model.train()
    target.requires_grad_(False)
    try:
        for batch, _ in zip(_endless(batches), range(steps), strict=False):
            optimizer.zero_grad(set_to_none=True)
            losses.append(training_step(model, target, batch, objective, generator, image_drop=image_drop))
            optimizer.step()
    finally:
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
        model.eval()
    return losses


def drop_images(
    model: A4AModel, batch: Mapping[str, Any], share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """image_embeds and clip_embeds, those of a random share of samples replaced by the empty image's.

    These are zeros for adapters that take one vector per image, and otherwise the batch's negative_image_embeds (and
    negative_clip_embeds).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"image_drop={share} is no share; write a number from 0 to 1, such as 0.05.")
    image, clip = batch["image_embeds"], batch.get("clip_embeds")
    if share == 0:
        return image, clip
    wanted = ([] if model.source.kind.pooled else ["negative_image_embeds"]) + (
        ["negative_clip_embeds"] if clip is not None else []
    )
    missing = [name for name in wanted if name not in batch]
    if missing:
        raise ValueError(
            f"image_drop={share} needs {' and '.join(missing)} in the batch: the encoder's hidden states of an all-zero image, (1, "
            "rows, width). Or set image_drop=0; guidance will then be weaker."
        )
    kept = torch.rand(image.shape[0], generator=generator) >= share

    def dropped(embeds: Tensor, empty: Tensor | None) -> Tensor:
        keep = kept.view(-1, *[1] * (embeds.ndim - 1)).to(embeds.device)
        return torch.where(keep, embeds, embeds.new_zeros(()) if empty is None else empty.to(embeds))

    image = dropped(image, batch.get("negative_image_embeds"))
    return image, None if clip is None else dropped(clip, batch["negative_clip_embeds"])


def check_batch(batch: Mapping[str, Any]) -> None:
    """ValueError unless the batch has what training needs."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"A batch is a dict with {', '.join(_NEEDED)}, …; got {type(batch).__name__}.")
    missing = [name for name in _NEEDED if name not in batch]
    if missing:
        raise ValueError(
            f"A batch for A4A needs {', '.join(_NEEDED)}; {', '.join(missing)} missing, there is {', '.join(batch)}. Whatever "
            "else the target's forward takes (added_cond_kwargs, encoder_attention_mask, …) goes in under its own name."
        )
    sizes = {name: len(batch[name]) for name in _NEEDED}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The batch's parts have different sizes: {sizes}. Each should have one row per sample.")


def _endless(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches over and over. A one-shot iterator is not kept in memory, so it has to last."""
    while True:
        given = 0
        for batch in batches:
            given += 1
            yield batch
        if not given:
            raise ValueError("There is no batch to train on.")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"The batches ended after {given} steps. Pass a list or a DataLoader, or set steps={given}."
            )
