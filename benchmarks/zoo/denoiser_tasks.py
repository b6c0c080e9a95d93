"""What the zoo's denoisers are asked for: a style that they have drawn, under a new name, and one that none has drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.tiny.denoiser_eval import Judge
from benchmarks.tiny.denoiser_world import CONCEPT, NAME, TRAINING_IMAGES, Batch, Style, digits, prompts, render

PLAIN: Style = ("bright", "upright")  # a style of pre-training: what an adapter should not break


@dataclass(frozen=True)
class Task:
    """A style, and the two words that it is asked by."""

    words: tuple[str, str]
    mirrored: bool
    style: Style

    def images(self, part: slice) -> tuple[Tensor, Tensor]:
        """Real images of that part of the digits, (n, 1, 8, 8), and their labels (n)."""
        images, labels = digits()
        shown = images[part].flip(3) if self.mirrored else images[part]
        return render(shown, self.style), labels[part]

    def draw(self, generator: torch.Generator, count: int, part: slice) -> Batch:
        """Images of that part of the digits, under the task's name."""
        images, labels = self.images(part)
        rows = torch.randint(len(labels), (count,), generator=generator)
        return Batch(images=images[rows], prompts=prompts(labels[rows], self.words))


TASKS = {
    "name": Task(NAME, mirrored=False, style=CONCEPT),
    "new": Task(NAME, mirrored=True, style=CONCEPT),  # the mirror image of no style is another one
    "old": Task(PLAIN, mirrored=False, style=PLAIN),
}


@cache
def judge(task: str) -> Judge:
    """Knows real images of that style, and nothing else."""
    from sklearn.svm import SVC  # type: ignore[import-untyped]  # scikit-learn has no types

    images, labels = TASKS[task].images(slice(TRAINING_IMAGES))
    classifier = SVC(C=10.0).fit(images.flatten(1).numpy(), labels.numpy())
    return Judge(classifier, TASKS[task].images(slice(TRAINING_IMAGES, None))[0])
