"""What the student is to learn from the teacher, as tensors: the change of behaviour, put on the target's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xadapt.data.counting import counting


def wanted_log_probs(bare: Tensor, source_bare: Tensor, source_adapted: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of the target as it should be: its own, plus what the adapter changed on the source, renormalised.

    Args:
        bare, source_bare, source_adapted: logits (…, vocabulary).
        temperature: that all are divided by.
    """
    own, before, after = (
        F.log_softmax(logits.float() / temperature, dim=-1) for logits in (bare, source_bare, source_adapted)
    )
    return F.log_softmax(own + (after - before), dim=-1)


def divergence(student: Tensor, wanted: Tensor, mask: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Mean KL(wanted ‖ student) over positions, times temperature² (Hinton et al. 2015: gradients keep their size).

    Args:
        student: logits (…, vocabulary).
        wanted: log p of the same shape.
        mask: positions that count, of the leading shape; all by default.
    """
    found = F.log_softmax(student.float() / temperature, dim=-1)
    each = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1) * temperature**2
    return each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp_min(1)


def noise_error(student: Tensor, bare: Tensor, source_bare: Tensor, source_adapted: Tensor) -> Tensor:
    """Mean squared distance of the student's prediction from the target's own plus what the adapter changed on the source."""
    return F.mse_loss(student.float(), bare.float() + source_adapted.float() - source_bare.float())


def answer_of(result: Any, role: str) -> tuple[Tensor, bool]:
    """A network's logits, or its predicted noise; and whether these are logits. ValueError if it gives neither."""
    logits, sample = getattr(result, "logits", None), getattr(result, "sample", None)
    if isinstance(logits, Tensor):
        return logits, True
    if isinstance(sample, Tensor):
        return sample, False
    raise ValueError(
        f"The {role} returns a {type(result).__name__} without logits or sample. Distillation is for language models (…ForCausalLM) "
        "and diffusers' denoisers; leave return_dict out of the batches."
    )


def check_alike(source: Tensor, target: Tensor, is_logits: bool) -> None:
    """ValueError where the two bases' answers cannot be compared."""
    if source.shape == target.shape:
        return
    shapes = f"the source answers {tuple(source.shape)}, the target {tuple(target.shape)}"
    if is_logits and source.shape[:-1] == target.shape[:-1]:
        raise ValueError(
            f"The vocabularies have {source.shape[-1]} and {target.shape[-1]} tokens ({shapes}): a change of log-probabilities "
            "carries over between bases with one tokenizer only. Train on the target instead, on the adapter's own data."
        )
    raise ValueError(
        f"On one batch {shapes}: both have to see the same positions, and predict the same sort of latents."
    )


def mask_of(batch: dict[str, Any], logits: Tensor) -> Tensor | None:
    """The positions to learn from: those that count (`xadapt.data.counting`)."""
    counted = counting(batch)
    if counted is not None and counted.shape == logits.shape[:-1]:
        return counted.to(device=logits.device, dtype=torch.float32)
    return None
