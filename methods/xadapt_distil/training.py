"""The loop: teacher and target answer, the student learns the difference, now and then all is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from xadapt.data.counting import anything_counts, samples_counting, without_labels
from xadapt.progress import track
from xadapt_aligned.collecting import checked

from .attaching import answers, device_of, moved
from .objective import answer_of, check_alike, divergence, mask_of, noise_error, wanted_log_probs
from .resuming import load_state, save_state

if TYPE_CHECKING:
    from .methods import Distil

WARM_UP = 0.05  # of the steps; from there the rate falls along a cosine, to zero


@dataclass(frozen=True)
class Run:
    """What a training run is of."""

    options: Distil
    teacher: PeftModel  # the source, with the adapter to learn from
    student: PeftModel  # the target, with the adapter to train
    settings: Mapping[str, Any]  # what a saved state has to agree with


def train(run: Run, batches: Iterable[Any]) -> list[float]:
    """Trains the student in place, from where it was saved. Returns the loss of each step.

    Each step draws from a generator of its own, seeded with the step, so a resumed run does what the whole one would have done.
    """
    options = run.options
    parameters = {name: p for name, p in run.student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=options.weight_decay)
    losses = load_state(options.checkpoint, run.settings, parameters, optimizer) if options.checkpoint else []
    accelerator = Accelerator()
    student, stepper = accelerator.prepare(run.student, optimizer, device_placement=[False, False])
    stream = _own_share(batches, len(losses) * options.gradient_accumulation_steps, accelerator)
    todo = range(len(losses), options.steps)
    for step in track(todo, "distilling") if accelerator.is_main_process else todo:
        for group in stepper.param_groups:
            group["lr"] = options.lr * rate(step, options.steps)
        given = list(islice(stream, options.gradient_accumulation_steps))
        with torch.random.fork_rng():
            torch.manual_seed(options.seed + 1 + step)
            loss = sum(_parts(run, student, given, accelerator))
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss at step {step} is {loss}. Lower the learning rate (lr={options.lr}), or load the bases in bfloat16 or "
                "float32: half precision overflows in some models."
            )
        accelerator.clip_grad_norm_(parameters.values(), options.clip)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        losses.append(loss)
        done = len(losses)
        if (
            options.checkpoint
            and accelerator.is_main_process
            and (done % options.save_every == 0 or done == options.steps)
        ):
            save_state(options.checkpoint, run.settings, parameters, optimizer, losses)
    return losses


def _parts(run: Run, student: Any, batches: list[dict[str, Any]], accelerator: Accelerator) -> Iterator[float]:
    """The shares of a step's loss, one for each of its batches, with the gradients of each added up."""
    for number, batch in enumerate(batches, 1):
        # Processes tell each other their gradients once, when they have all of a step's.
        with accelerator.no_sync(student) if number < len(batches) else nullcontext():
            loss = loss_on(run, student, batch) / len(batches)
            accelerator.backward(loss)
        yield loss.item()


def loss_on(run: Run, student: Any, batch: dict[str, Any]) -> Tensor:
    """How far the student is from the change of behaviour that it is to learn, on one batch.

    Args:
        student: the run's, as an accelerator has prepared it.
    """
    here, there = device_of(run.student), device_of(run.teacher)
    plain = without_labels(batch)
    before, after = (answer_of(found, "source")[0].to(here) for found in answers(run.teacher, moved(plain, there)))
    given = moved(plain, here)
    with torch.no_grad(), run.student.disable_adapter():
        bare, is_logits = answer_of(run.student(**given), "target")
    check_alike(before, bare, is_logits)
    found, _ = answer_of(student(**given), "target")
    if not is_logits:
        samples = samples_counting(batch, len(found))
        kept = slice(None) if samples is None else samples.to(here)
        return noise_error(found[kept], bare[kept], before[kept], after[kept])
    heat = run.options.temperature
    return divergence(found, wanted_log_probs(bare, before, after, heat), mask_of(batch, bare), heat)


def rate(step: int, steps: int) -> float:
    """The learning rate's factor."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _own_share(batches: Iterable[Any], done: int, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """The batches over and over, from the one after the `done` first on; of several processes, each takes every n-th."""
    count, index = accelerator.num_processes, accelerator.process_index
    return islice(_endless(batches), done * count + index, None, count)


def _endless(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    while True:
        found = False
        for batch in map(checked, batches):
            if anything_counts(batch):
                found = True
                yield batch
        if not found:
            raise ValueError("There is nothing to learn from: the labels of all batches are -100 throughout.")
