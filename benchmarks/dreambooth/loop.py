"""The training loop of all families: an adapter on a frozen denoiser, with accelerate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.dreambooth.noise import add_noise
from benchmarks.dreambooth.optimizers import optimizer
from benchmarks.dreambooth.settings import Compute, Optimizer

if TYPE_CHECKING:
    from peft import PeftModel

    from benchmarks.dreambooth.examples import Examples
    from benchmarks.dreambooth.pipelines import Loaded


@dataclass(frozen=True)
class Lesson:
    """Images and what is said of them: conditions of one row."""

    examples: Examples
    conditions: dict[str, Tensor]
    weight: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how fast."""

    steps: int
    batch: int
    learning_rate: float
    optimizer: Optimizer
    guidance: float
    seed: int


@dataclass(frozen=True)
class Learnt:
    """Mean loss over the last fifth of the steps, and the time that one step took."""

    loss: float
    seconds_per_step: float


def fit(
    loaded: Loaded,
    model: PeftModel,
    lessons: list[Lesson],
    schedule: Schedule,
    compute: Compute,
    *,
    quiet: bool,
    logs: Path,
) -> Learnt:
    """Train what asks for gradients in `model`, which sits on the pipe's denoiser.

    Raises:
        ValueError: batch, micro batch and processes do not go together; or the loss is not finite any more.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # tqdm has no types

    accumulation, micro = shares(schedule.batch, compute.micro_batch, compute.processes)
    accelerator: Any = Accelerator(
        mixed_precision=compute.mixed_precision,
        gradient_accumulation_steps=accumulation,
        log_with=compute.log_with,
        project_dir=logs if compute.log_with else None,
    )
    if compute.log_with:
        accelerator.init_trackers(
            "dreambooth", config={"learning_rate": schedule.learning_rate, "steps": schedule.steps}
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    moved = optimizer(schedule.optimizer, parameters, schedule.learning_rate)
    denoiser: Any = loaded.denoiser
    if compute.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    wrapped, moved = accelerator.prepare(model, moved)
    process = loaded.family.process(loaded.pipe)
    generator = torch.Generator().manual_seed(schedule.seed * 1000 + accelerator.process_index)
    losses: list[float] = []
    wrapped.train()
    started = time.perf_counter()
    bar = tqdm(range(schedule.steps), desc="training", leave=False, disable=quiet or not accelerator.is_main_process)
    try:
        for step in bar:
            total = 0.0
            for _ in range(accumulation):
                with accelerator.accumulate(wrapped):
                    loss = torch.zeros((), device=accelerator.device)
                    for lesson in lessons:
                        own = _loss(loaded, wrapped, process, lesson, micro, schedule.guidance, generator)
                        loss = loss + lesson.weight * own
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, schedule.optimizer.clip)
                    moved.step()
                    moved.zero_grad(set_to_none=True)
                    total += float(loss.detach()) / accumulation
            if not math.isfinite(total):
                raise ValueError(
                    f"the loss is {total} at step {step}. Give a lower learning rate, or another mixed_precision (fp16 "
                    "overflows where bf16 does not)."
                )
            losses.append(total)
            if compute.log_with:
                accelerator.log({"loss": total}, step=step)
    finally:
        if compute.gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()
        if compute.log_with:
            accelerator.end_training()
    seconds = (time.perf_counter() - started) / schedule.steps
    model.eval()
    last = losses[-max(1, schedule.steps // 5) :]
    return Learnt(sum(last) / len(last), seconds)


def shares(batch: int, micro_batch: int, processes: int) -> tuple[int, int]:
    """(accumulated steps, images of one process in one of them), which make up the batch exactly."""
    if batch % processes:
        raise ValueError(f"a batch of {batch} is not to be shared by {processes} processes; give a divisor of it.")
    own = batch // processes
    micro = min(micro_batch, own)
    if micro < 1 or own % micro:
        raise ValueError(
            f"micro_batch = {micro_batch} does not divide the {own} images of one process; give a divisor."
        )
    return own // micro, micro


def _loss(
    loaded: Loaded, model: Any, process: Any, lesson: Lesson, count: int, guidance: float, generator: torch.Generator
) -> Tensor:
    sample, sizes = lesson.examples.draw(count, generator)
    x0 = loaded.family.scale(loaded.pipe, sample)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    times = process.draw(count, generator, x0)
    noisy = add_noise(x0, noise, times)
    conditions = {name: value.expand(count, *value.shape[1:]) for name, value in lesson.conditions.items()}
    told = loaded.family.with_size(conditions, sizes)
    output = loaded.family.predict(loaded.pipe, model, noisy.to(loaded.dtype), times, told, guidance)
    loss: Tensor = process.loss(output, x0, noise, times)
    return loss
