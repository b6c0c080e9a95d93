"""The denoiser part for one seed: a source, its siblings, a new name for one style, and who draws it when asked by that name.

The source and the independent model are trained from different seeds and share the text space only. So a LoRA, which adds to
weights, means nothing on the other model, while a tied input adapter, which edits the text, means the same there. What that
rests on is checked in `full`, where the effect goes away: when no model has seen the concept in pre-training there are no words
that the new name could be a synonym of ("held out"), and one vector alone cannot say what takes two words ("one word").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.tiny.denoiser_adapters import Lesson, Trained, carry, train_adapter
from benchmarks.tiny.denoiser_eval import Judge, contact_sheet
from benchmarks.tiny.denoiser_model import Progress, pretrain
from benchmarks.tiny.denoiser_settings import ADAPTERS, COLUMNS, HEADINGS, PART, DenoiserSettings
from benchmarks.tiny.denoiser_siblings import Sibling, few_step, student
from benchmarks.tiny.denoiser_world import CONCEPT, NAME, ONE_WORD, STYLES, prompts, word_table

__all__ = ["DenoiserResult", "DenoiserSettings", "run_denoiser"]

INDEPENDENT = 500  # added to the seed
Row = dict[str, Any]
Rates = Mapping[str, tuple[float, ...]]  # adapter -> the learning rates to try
Images = dict[tuple[str, str], np.ndarray[Any, np.dtype[np.uint8]]]


@dataclass
class DenoiserResult:
    """What one seed gave. `images`: per (adapter, sibling) a sheet of generated digits, (16, 80) grey levels."""

    rows: list[Row] = field(default_factory=list)
    images: Images = field(default_factory=dict)
    learning_rates: list[Row] = field(default_factory=list)  # all that were tried, if the settings have a grid


def run_denoiser(settings: DenoiserSettings, seed: int, progress: Progress) -> DenoiserResult:
    """Pre-train, adapt on the source, carry to each sibling, score. The result depends on the settings and the seed alone.

    Args:
        progress: called with what is being done and the share of it that is done, 0 to 1.
    """
    return _Run(settings, seed, progress).everything()


class _Run:
    """One seed: the text space and the judge that everything shares, and the result as far as it has come."""

    def __init__(self, settings: DenoiserSettings, seed: int, progress: Progress) -> None:
        self.settings, self.seed, self.progress = settings, seed, progress
        self.table = word_table(settings.width, seed)
        self.judge = Judge.trained()
        self.labels = torch.arange(10).repeat(settings.images_per_digit)
        self.result = DenoiserResult()

    def everything(self) -> DenoiserResult:
        settings = self.settings
        rates: Rates = {kind: settings.learning_rate_grid or (settings.learning_rates[kind],) for kind in ADAPTERS}
        source, independent = self.pair()
        siblings = {name: self.sibling(name, source, independent) for name in settings.siblings}
        rates = self.score({"source": source} | siblings, rates, NAME, retrain=True)
        if "one word" in settings.checks:
            self.score({"one word: source": source, "one word: indep": independent}, rates, ONE_WORD)
        if "held out" in settings.checks:
            source, independent = self.pair(held_out=True)
            self.score({"held out: source": source, "held out: indep": independent}, rates, NAME)
        return self.result

    def pair(self, *, held_out: bool = False) -> tuple[Sibling, Sibling]:
        """The source and the independent model, trained on all styles or on all but the concept."""
        styles = tuple(style for style in STYLES if not (held_out and style == CONCEPT))
        remark = ", concept held out" if held_out else ""

        def trained(seed: int, title: str) -> Sibling:
            model = pretrain(self.settings, self.table, seed, f"pre-training {title}{remark}", self.progress, styles)
            return Sibling(model, self.settings.sampling_steps, self.settings.guidance)

        return trained(self.seed, "the source"), trained(self.seed + INDEPENDENT, "the independent model")

    def sibling(self, name: str, source: Sibling, independent: Sibling) -> Sibling:
        if name == "indep":
            return independent
        distil = {"lcm": few_step, "student": student}[name]
        return distil(source.model, self.table, self.settings, self.seed, self.progress)

    def score(
        self, siblings: Mapping[str, Sibling], rates: Rates, name: tuple[str, str], *, retrain: bool = False
    ) -> Rates:
        """Train each adapter on the first sibling, the source, and score it on all; the learning rates that it took."""
        (place, source), *others = siblings.items()
        lesson = Lesson(self.settings, self.table, name, self.seed)
        adapters = {kind: self.train(source, kind, lesson, rates[kind], place) for kind in ADAPTERS}
        taken = {kind: (adapter.learning_rate,) for kind, adapter in adapters.items()}
        with TemporaryDirectory() as scratch:
            for kind, adapter in adapters.items():
                adapter.model.save_pretrained(str(Path(scratch, kind)))
            for place, sibling in siblings.items():
                self.row("bare", place, sibling, sibling.model, name)
                for kind, adapter in adapters.items():
                    self.row(
                        kind, place, sibling, carry(Path(scratch, kind), sibling.model, sibling.blocks), name, adapter
                    )
        for place, sibling in others if retrain else ():
            adapter = self.train(sibling, "copy", lesson, taken["copy"], place)
            self.row("retrained", place, sibling, adapter.model, name, adapter)
        return taken

    def train(self, base: Sibling, kind: str, lesson: Lesson, rates: tuple[float, ...], place: str) -> Trained:
        """Train the adapter at each rate and take the one with the lowest validation loss on `base`."""
        tried = []
        for rate in rates:
            title = f"{COLUMNS[kind]} adapter on {HEADINGS.get(place, place)}, learning rate {rate:g}"
            tried.append(train_adapter(base.model, kind, lesson, rate, title, self.progress))
        best = min(tried, key=lambda adapter: adapter.loss)
        for adapter in tried if len(tried) > 1 else ():
            rate, loss, chosen = adapter.learning_rate, adapter.loss, adapter is best
            row = {
                "part": PART,
                "seed": self.seed,
                "space": kind,
                "learning_rate": rate,
                "loss": loss,
                "chosen": chosen,
            }
            self.result.learning_rates.append(row)
        return best

    def row(
        self,
        column: str,
        place: str,
        sibling: Sibling,
        model: nn.Module,
        name: tuple[str, str],
        adapter: Trained | None = None,
    ) -> None:
        """Generate digits, score them, keep some to look at."""
        images = sibling.generate(model, self.table, prompts(self.labels, name), self.seed + 6000)
        self.result.images[column, place] = contact_sheet(images, self.labels)
        row: Row = {
            "part": PART,
            "seed": self.seed,
            "adapter": column,
            "sibling": place,
            "score": self.judge.accuracy(images, self.labels),
            "distance": self.judge.distance(images),
        }
        if adapter is not None:
            row |= {"learning_rate": adapter.learning_rate, "parameters": adapter.parameters, "loss": adapter.loss}
        self.result.rows.append(row)
