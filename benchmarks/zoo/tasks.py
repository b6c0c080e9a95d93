"""The zoo's tasks: those of `benchmarks.tiny` to pre-train on, four new ones to adapt to, one more that a sibling brings along.

The vocabulary continues that of the tiny benchmark, so its lines of old tasks are lines here too. Numbers of five digits are
parted once and for all: a fifth of them is kept for scoring, and neither training nor calibration ever draws one of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.tiny import tasks as tiny
from benchmarks.tiny.tasks import DIGITS, IGNORE, PAD, ZERO, Batch

VOCABULARY = tiny.VOCABULARY + "XTIZ"
CODE = {character: index for index, character in enumerate(VOCABULARY)}
OLD_TASKS = "".join(tiny.TASKS)

NEW_TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "D": lambda digits: digits.sort(1, descending=True).values,  # sort in descending order
    "X": lambda digits: digits.flip(1).roll(-1, 1),  # reverse, then shift
    "T": lambda digits: digits.roll(1, 1),  # rotate right by one
    "I": lambda digits: (digits + 1) % 10,  # add one to each digit, mod 10
}
BROUGHT_ALONG: dict[str, Callable[[Tensor], Tensor]] = {  # of the sibling that has another LoRA merged in
    "Z": lambda digits: 9 - digits
}
_ALL = {**NEW_TASKS, **BROUGHT_ALONG}
TASK_NAMES = {
    "D": "sort, descending",
    "X": "reverse and shift",
    "T": "rotate right",
    "I": "add one to each digit",
}


def new_lines(keyword: str, lines: int, generator: torch.Generator, *, scored: bool = False) -> Batch:
    """Lines of a new task: `tokens` and `labels`, both (lines, 2 · DIGITS + 3).

    Args:
        scored: from the numbers that are kept for scoring; otherwise from all others.
    """
    digits = _numbers(lines, generator, scored)
    column = [torch.full((lines, 1), CODE[character]) for character in (keyword, ">", ".")]
    tokens = torch.cat([column[0], digits + ZERO, column[1], _ALL[keyword](digits) + ZERO, column[2]], dim=1)
    labels = tokens.clone()
    labels[:, : DIGITS + 2] = IGNORE
    return Batch(tokens, labels)


def old_lines(lines: int, generator: torch.Generator) -> Batch:
    """Lines of the tasks of pre-training, which take equal turns."""
    return tiny.make_batch(OLD_TASKS, lines, generator)


@torch.no_grad()
def answered_by(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The lines (lines, length) with the model's own greedy answers in the place of the right ones: inputs without labels."""
    tokens = tokens.clone()
    for position in range(DIGITS + 2, tokens.shape[1]):
        tokens[:, position] = model(input_ids=tokens[:, :position]).logits[:, -1].argmax(-1)
    return tokens


def answers_count(tokens: Tensor) -> dict[str, Tensor]:
    """Lines of new tasks as a forward takes them, with labels that say where the answers are: what counts when behaviours are
    compared. `xadapt.data` does not look at what they say."""
    labels = tokens.clone()
    labels[:, : DIGITS + 2] = IGNORE
    return {**arguments(tokens), "labels": labels}


def arguments(tokens: Tensor) -> dict[str, Tensor]:
    """A batch as a forward takes it: `input_ids` and `attention_mask`."""
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


def is_scored(digits: Tensor) -> Tensor:
    """Which rows of digits (lines, DIGITS) are kept for scoring: a fifth, without a pattern that a digit shows."""
    number = digits @ 10 ** torch.arange(DIGITS - 1, -1, -1)
    return ((number * 2654435761) >> 12) % 5 == 0


def _numbers(lines: int, generator: torch.Generator, scored: bool) -> Tensor:
    found: list[Tensor] = []
    while sum(map(len, found)) < lines:
        digits = torch.randint(0, 10, (4 * lines + 64, DIGITS), generator=generator)
        found.append(digits[is_scored(digits) == scored])
    return torch.cat(found)[:lines]
