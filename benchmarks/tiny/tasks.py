"""Eight generated tasks to pre-train on, one new task to adapt to.

A line is a keyword, five digits, `>`, the answer, a full stop: `R 314159 > 951413 .` without the blanks. The instruction format of the
drifted siblings puts the keyword last: `Q 314159 R A 951413 .`. Every line of a format has the same length (short answers are padded),
so a batch is one tensor and an exact match needs a single forward pass: with all earlier answer characters right, the teacher-forced
argmax is the greedy answer, and with one wrong the line has failed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DIGITS = 5
VOCABULARY = "_0123456789.>QA" + "CRSHWMPLD"  # "_" pads; the second half are the keywords
CODE = {character: index for index, character in enumerate(VOCABULARY)}
PAD, ZERO, STOP = CODE["_"], CODE["0"], CODE["."]
IGNORE = -100  # the label that cross-entropy skips

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "C": lambda digits: digits,  # copy
    "R": lambda digits: digits.flip(1),  # reverse
    "S": lambda digits: digits.sort(1).values,  # sort
    "H": lambda digits: digits.roll(-1, 1),  # shift
    "W": lambda digits: digits.roll(DIGITS // 2, 1),  # swap halves
    "M": lambda digits: digits.max(1, keepdim=True).values,  # maximum
    "P": lambda digits: (digits[:, : DIGITS // 2] + digits[:, -(DIGITS // 2) :]) % 10,  # plus: add the halves, mod 10
    "L": lambda digits: digits.gather(
        1, 1 + digits[:, :1] % (DIGITS - 1)
    ),  # look up the digit that the first one points at
}
NEW_TASK = "D"  # sort in descending order; pre-training never shows this keyword
ALL_TASKS = {**TASKS, NEW_TASK: lambda digits: digits.sort(1, descending=True).values}


@dataclass(frozen=True)
class Batch:
    """`tokens` and `labels`, both (lines, length); labels are IGNORE outside the answer and its full stop."""

    tokens: Tensor
    labels: Tensor


def make_batch(keywords: str, lines: int, generator: torch.Generator, *, instruction: bool = False) -> Batch:
    """Draw `lines` lines, the tasks in `keywords` taking equal turns."""
    per_task = [lines // len(keywords) + (index < lines % len(keywords)) for index in range(len(keywords))]
    tokens = torch.cat(
        [_lines(keyword, count, generator, instruction) for keyword, count in zip(keywords, per_task, strict=True)]
    )
    labels = tokens.clone()
    labels[:, : tokens.shape[1] - DIGITS - 1] = IGNORE
    labels[labels == PAD] = IGNORE
    return Batch(tokens, labels)


def join(first: Batch, second: Batch) -> Batch:
    """Stack two batches whose lines may differ in length, padding at the end."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])

    def stack(a: Tensor, b: Tensor, fill: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, length - t.shape[1]), value=fill) for t in (a, b)])

    return Batch(stack(first.tokens, second.tokens, PAD), stack(first.labels, second.labels, IGNORE))


def decode(tokens: Tensor) -> str:
    """One line as text, padding dropped."""
    return "".join(VOCABULARY[index] for index in tokens.tolist()).rstrip("_")


def _lines(keyword: str, lines: int, generator: torch.Generator, instruction: bool) -> Tensor:
    digits = torch.randint(0, 10, (lines, DIGITS), generator=generator)
    answer = ALL_TASKS[keyword](digits)
    head = ["Q", digits, keyword, "A"] if instruction else [keyword, digits, ">"]
    padding = torch.full((lines, DIGITS - answer.shape[1]), PAD)
    parts = [_column(part, lines) if isinstance(part, str) else part + ZERO for part in [*head, answer, "."]]
    return torch.cat([*parts, padding], dim=1)


def _column(character: str, lines: int) -> Tensor:
    return torch.full((lines, 1), CODE[character])
