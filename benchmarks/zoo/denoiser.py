"""The denoiser part of the zoo: one seed's source, siblings and adapters on the words' way into the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks.tiny.denoiser_adapters import adapter_config
from benchmarks.tiny.denoiser_model import FIRST_TIME, fit, pretrain, rotate, tiny_pixart, v_loss
from benchmarks.tiny.denoiser_world import STYLES, draw_styles, prompts, word_table
from benchmarks.tiny.progress import Reporter
from benchmarks.zoo.carry import put_on
from benchmarks.zoo.denoiser_siblings import make_sibling, sampled
from benchmarks.zoo.denoiser_tasks import TASKS, judge
from benchmarks.zoo.settings import DenoiserZoo
from benchmarks.zoo.shelf import Shelf
from benchmarks.zoo.world import Arguments
from xadapt.contract import Adapter
from xadapt.data.counting import with_neutral

_KINDS = {"lora": "copy", "input": "input", "output": "output"}  # space -> what benchmarks.tiny calls its adapter


class DenoiserWorld:
    """See `World`. Scores are the share of digits that a classifier takes for the digit asked for, in the task's style."""

    part = "denoiser"

    def __init__(self, settings: DenoiserZoo, seed: int, folder: Path, progress: Reporter) -> None:
        self.settings, self.seed, self.progress = settings, seed, progress
        self.siblings, self.tasks, self.spaces = settings.siblings, settings.tasks, settings.spaces
        self.distil = settings.distil
        made_with = {key: value for key, value in asdict(settings).items() if key not in _LATER}
        self.shelf = Shelf(folder / f"denoiser-seed{seed}", made_with)
        self.table = word_table(settings.tiny.width, seed)
        # A world lives as long as its run, and so may what it has made.
        self.source = cache(self._source)
        self.sibling = cache(self._sibling)
        self.adapter = cache(self._adapter)
        self.calibration = cache(self._calibration)
        self.unlabelled = cache(self._unlabelled)

    def _source(self) -> nn.Module:
        tiny, seed = self.settings.tiny, self.seed
        return self._made(
            "source",
            lambda: tiny_pixart(tiny, 0),
            lambda show: pretrain(tiny, self.table, seed, "pre-training the source", show),
        )

    def _sibling(self, name: str) -> nn.Module:
        def empty() -> nn.Module:
            model: Any = tiny_pixart(self.settings.tiny, 0)
            if name == "student":
                model.transformer_blocks = model.transformer_blocks[:-1]
            return model

        def make(show: Callable[[str, float], None]) -> nn.Module:
            source = copy.deepcopy(self.source()).requires_grad_(True)
            return make_sibling(name, source, self.table, self.settings, self.seed, show)

        return self._made(f"sibling-{name}", empty, make)

    def _made(
        self, name: str, empty: Callable[[], nn.Module], make: Callable[[Callable[[str, float], None]], nn.Module]
    ) -> nn.Module:
        def train() -> nn.Module:
            with self.progress.shares() as show:
                return make(show)

        model: nn.Module = self.shelf.model(name, empty, train)
        return model.requires_grad_(False).eval()

    def _adapter(self, task: str, space: str) -> Adapter:
        return self.shelf.adapter(f"adapter-{task}-{space}", lambda: self._train(self.source(), task, space))

    def retrained(self, sibling: str, task: str) -> nn.Module:
        target = self.sibling(sibling)
        adapter = self.shelf.adapter(f"retrained-{sibling}-{task}", lambda: self._train(target, task, "lora"))
        return put_on(target, adapter)

    def _calibration(self, task: str, space: str, much: bool = False) -> Sequence[Arguments]:
        """The task's name, and old words, by which nothing is judged, over noisy images of old styles: none of the task is needed."""
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed + 7000)
        few = settings.calibration_batches
        if much:
            new = [self._inputs(generator, task) for _ in range(settings.distil_batches)]
            return with_neutral(new, [self._inputs(generator, None) for _ in range(few)])
        old, new = ([self._inputs(generator, asked) for _ in range(few)] for asked in (None, task))
        return with_neutral(new, old)

    def _unlabelled(self, task: str, space: str) -> list[Arguments]:
        generator = torch.Generator().manual_seed(self.seed + 8000)
        return [self._inputs(generator, task) for _ in range(self.settings.trust_batches)]

    def _inputs(self, generator: torch.Generator, task: str | None) -> Arguments:
        """Noisy images of the old styles, asked for by their own words or by the task's name."""
        batch = draw_styles(generator, self.settings.batch, STYLES)
        asked = batch.prompts
        if task is not None:
            asked = prompts(asked[:, 0], TASKS[task].words)
        time = FIRST_TIME + (1 - FIRST_TIME) * torch.rand(len(asked), generator=generator)
        noisy = rotate(batch.images, torch.randn(batch.images.shape, generator=generator), time)
        return {"hidden_states": noisy, "encoder_hidden_states": self.table[asked], "timestep": 1000 * time}

    def score(self, model: nn.Module, sibling: str, task: str) -> float:
        return self._score(model, sibling, task, self.settings.images_per_digit)

    def kept(self, model: nn.Module, sibling: str) -> float:
        return self._score(model, sibling, "old", self.settings.tiny.images_per_digit)

    def _score(self, model: nn.Module, sibling: str, task: str, images_per_digit: int) -> float:
        drawn, labels = sampled(sibling, model, self.settings), torch.arange(10).repeat(images_per_digit)
        images = drawn.generate(model, self.table, prompts(labels, TASKS[task].words), self.seed + 6000)
        return judge(task).accuracy(images, labels)

    def _train(self, base: nn.Module, task: str, space: str) -> PeftModel:
        settings, wanted = self.settings.tiny, TASKS[task]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 3000)
            model = get_peft_model(copy.deepcopy(base), adapter_config(_KINDS[space], settings.rank))
        with self.progress.shares() as show:
            fit(
                model,
                lambda generator: wanted.draw(generator, settings.adapt_batch, slice(settings.adapt_images)),
                lambda batch, generator: v_loss(model, self.table, batch, generator),
                steps=settings.adapt_steps,
                learning_rate=settings.learning_rates[_KINDS[space]],
                seed=self.seed + 4000,
                title=f"{task}, {space}",
                progress=show,
            )
        return model


_LATER = (
    "siblings",
    "tasks",
    "spaces",
    "images_per_digit",
    "calibration_batches",
    "distil_batches",
    "distil",
    "trust_batches",
    "batch",
)
"""Settings that change nothing that is trained."""
