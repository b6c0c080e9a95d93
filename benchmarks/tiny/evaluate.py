"""Exact match, and how far a sibling is from its source."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from benchmarks.tiny.pretrain import answer_loss
from benchmarks.tiny.tasks import IGNORE, Batch


@torch.no_grad()
def exact_match(model: PreTrainedModel | torch.nn.Module, batch: Batch) -> float:
    """Share of lines whose whole answer, full stop included, is right."""
    predicted = model(input_ids=batch.tokens).logits[:, :-1].argmax(-1)
    wanted = batch.labels[:, 1:]
    return float(((predicted == wanted) | (wanted == IGNORE)).all(dim=1).float().mean())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel | torch.nn.Module, batch: Batch) -> float:
    """Mean cross-entropy of the answer characters."""
    return float(answer_loss(model(input_ids=batch.tokens).logits, batch.labels))


@torch.no_grad()
def weight_distance(source: torch.nn.Module, target: torch.nn.Module) -> float | None:
    """‖W_target - W_source‖ / ‖W_source‖ over all weights; None where the two do not have the same layers."""
    ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
    if ours.keys() != theirs.keys():
        return None
    moved = sum(float((theirs[name] - weight).square().sum()) for name, weight in ours.items())
    return float((moved / sum(float(weight.square().sum()) for weight in ours.values())) ** 0.5)
