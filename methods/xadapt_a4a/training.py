"""One training step of A4A, whatever drives it. The loss is the target's own (A4A, Eq. 14)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draws import Generators, drawn, seed_of
from .dropping import Drops, check_drops, without_images, without_text
from .objective import Objective, predict
from .reference import ReferenceAdapter

_NEEDED = ("image_embeds", "latents", "encoder_hidden_states")


def training_step(
    model: ReferenceAdapter,
    target: nn.Module,
    batch: Mapping[str, Any],
    objective: Objective,
    generator: Generators,
    *,
    image_drop: float = 0.0,
    text_drop: float = 0.0,
    both_drop: float = 0.0,
    forward: Callable[..., Any] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> float:
    """One forward and backward at λ = 1 (A4A, Eq. 14): the gradients are added to what is there, the loss is returned.

    Args:
        generator: one, or one for each sample.
        image_drop, text_drop, both_drop: the shares of samples whose reference, text, or both are dropped, for guidance.
        forward: the model as an accelerator has prepared it, where one is used.
        autocast, backward: the accelerator's, where one is used.
    """
    check_batch(batch)
    drops = Drops(image_drop, text_drop, both_drop)
    check_drops(model, batch, drops)
    size = len(batch["latents"])
    no_image, no_text = drops.choose(size, generator)
    maps = (forward or model)(*without_images(batch, no_image))
    batch = without_text(batch, no_text)
    with model.attached(target, model.bank(maps), 1.0, guidance=False):
        latents = batch["latents"]
        shape = latents.shape[1:]
        noise = drawn(lambda n, one: torch.randn(n, *shape, generator=one), size, generator).to(latents)
        noisy, times, goal = objective.noisy(latents, noise, generator)
        with autocast():
            predicted = predict(target, noisy, times, batch)
        loss = F.mse_loss(predicted.float(), goal.float())
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"The loss is {loss.item()}; {_reason(batch)}")
        backward(loss)
    return loss.item()


def train(
    model: ReferenceAdapter,
    target: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    objective: Objective,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    generator: torch.Generator,
    image_drop: float,
) -> list[float]:
    """The losses of `steps` steps over the batches, from the start again when they end: the plainest loop there is, for one
    process and without checkpoints. `Trainer` is the one with everything. The target stays frozen."""
    losses: list[float] = []
    with frozen(target), training(model):
        for batch, _ in zip(endless(batches), range(steps), strict=False):
            optimizer.zero_grad(set_to_none=True)
            losses.append(training_step(model, target, batch, objective, generator, image_drop=image_drop))
            optimizer.step()
    return losses


@contextmanager
def frozen(target: nn.Module) -> Iterator[None]:
    """The target without gradients for its weights and without dropout, and as it was afterwards."""
    asked = [(parameter, parameter.requires_grad) for parameter in target.parameters()]
    modes = [(module, module.training) for module in target.modules()]
    target.requires_grad_(False)
    target.eval()
    try:
        yield
    finally:
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)
        for module, mode in modes:
            module.training = mode


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, and in eval mode afterwards."""
    model.train()
    try:
        yield
    finally:
        model.eval()


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
    if not sizes["latents"]:
        raise ValueError("The batch has no sample in it. Leave empty batches out.")


def _reason(batch: Mapping[str, Any]) -> str:
    """Whose fault a loss that is no number is."""
    broken = [name for name in _NEEDED if not bool(torch.isfinite(batch[name]).all())]
    if broken:
        return f"the batch's {' and '.join(broken)} hold NaN or infinity. Encode those samples in float32, or leave them out."
    return "lower the learning rates, or train in float32 or bfloat16."


def endless(batches: Iterable[Mapping[str, Any]], seed: int = 0) -> Iterator[Mapping[str, Any]]:
    """The batches over and over. A one-shot iterator is not kept in memory, so it has to last.

    A DataLoader that shuffles draws its order from torch's own generator; that is seeded here for each pass, so that the order
    is the same in every process and after a resume.
    """
    for number in count():
        given = 0
        for batch in _seeded(batches, seed_of(seed, "order", number)):
            given += 1
            yield batch
        if not given:
            raise ValueError("There is no batch to train on.")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"The batches ended after {given} steps. Pass a list or a DataLoader, or set steps={given}."
            )


def _seeded(batches: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Mapping[str, Any]]:
    """One pass. The order is drawn when it begins, at the latest with its first batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        iterator = iter(batches)
        try:
            first = next(iterator)
        except StopIteration:
            return
    yield first
    yield from iterator
