"""The cells: a training on one model, and what either model makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.dreambooth.adapters import Adapting, carried, on_base
from benchmarks.dreambooth.settings import Compute, Family, Judge, Optimizer, Sampling, TrainingSettings
from benchmarks.dreambooth.tiny.cells import TinyPair
from benchmarks.frame.cell import Cell, Estimate, Result, how
from benchmarks.frame.worker import Worker

if TYPE_CHECKING:
    from benchmarks.dreambooth.pipelines import Loaded
    from benchmarks.dreambooth.scores import Scorer

IMAGE_MEGABYTES = 0.08
"""A JPEG of 512 x 512 pixels."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline: a hub id, a folder, or a part of a pair that is made."""

    pair: str
    family: Family
    name: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class OnModel(Cell):
    """What both cells share: a model that may have to be made, and a subject."""

    packages = ("accelerate", "prodigyopt", "bitsandbytes")

    model: Model
    made: TinyPair | None = None
    images: str
    subject: str
    class_word: str
    compute: Compute = field(default_factory=Compute, metadata={"identity": False})  # as `how`
    forward_seconds: float = how(0.0)

    def loaded(self, worker: Worker, model: Model, compute: Compute) -> Loaded:
        """The pipeline, which the worker keeps."""
        from benchmarks.dreambooth.pipelines import load_pipeline

        where = self.located(worker, model.name)
        key = f"pipeline {where} {model.revision} {compute.dtype} {compute.offload}"
        return worker.base(key, lambda: load_pipeline(model.family, where, model.revision, compute))

    def located(self, worker: Worker, name: str) -> str:
        """Where a part of the pair is."""
        return name if self.made is None else str(worker.artifacts(self.made) / name)

    def photographs(self, worker: Worker) -> list[Any]:
        from benchmarks.dreambooth.images import subject_images

        made = self.made
        folder = self.images if made is None else str(worker.artifacts(made.world) / self.images)
        return subject_images(folder, self.subject)

    def base(self) -> str:
        return f"{self.made.name if self.made else ''} {self.model.name} {self.model.revision}"


@dataclass(frozen=True, kw_only=True)
class Training(OnModel):
    """One adapter for one subject. Keeps the adapter's folder."""

    adapting: Adapting
    learning_rate: float
    optimizer: Optimizer
    settings: TrainingSettings
    guidance: float
    text_length: int | None
    seed: int
    megabytes: float = how(0.0)

    def run(self, worker: Worker) -> Result:
        import torch
        from peft import get_peft_model

        import xadapt
        from benchmarks.dreambooth.loop import Schedule, fit

        loaded = self.loaded(worker, self.model, dataclasses.replace(self.compute, offload="none"))
        lessons = self._lessons(loaded, worker)
        torch.manual_seed(self.seed)
        model: Any = get_peft_model(loaded.denoiser, self.adapting.config())
        try:
            learnt = fit(
                loaded,
                model,
                lessons,
                Schedule(
                    self.settings.steps,
                    self.settings.batch,
                    self.learning_rate,
                    self.optimizer,
                    self.guidance,
                    self.seed,
                ),
                self.compute,
                quiet=worker.quiet,
                logs=worker.out / "logs",
            )
            parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
            if worker.is_main:
                xadapt.save(model, worker.out / "adapter")
        finally:
            model.unload()
        return {"loss": learnt.loss, "seconds_per_step": learnt.seconds_per_step, "parameters": parameters}

    def _lessons(self, loaded: Loaded, worker: Worker) -> list[Any]:
        import torch

        from benchmarks.dreambooth.examples import encode
        from benchmarks.dreambooth.loop import Lesson

        chosen = self.settings
        token = chosen.unique_token
        told = chosen.prompt.format(f"{token} {self.class_word}" if token else self.class_word)
        generator = torch.Generator().manual_seed(self.seed)
        photographs = self.photographs(worker)
        examples = encode(loaded, photographs, chosen.resolution, chosen.crops, generator)
        lessons = [Lesson(examples, loaded.conditions([told], self.text_length))]
        if chosen.prior_weight:
            plain = chosen.prompt.format(self.class_word)
            sampling = Sampling(steps=30, guidance=self.guidance, text_length=self.text_length)
            seeds = [_noise_seed(self.subject, "prior", index) for index in range(chosen.prior_images)]
            prior = list(
                loaded.generate([plain] * len(seeds), seeds, chosen.resolution, sampling, self.compute.image_batch)
            )
            own = encode(loaded, prior, chosen.resolution, 1, generator)
            lessons.append(Lesson(own, loaded.conditions([plain], self.text_length), chosen.prior_weight))
        return lessons

    def estimate(self) -> Estimate:
        # Forward, and as much again for the gradient of the activations; checkpointing adds one forward more.
        calls = self.settings.steps * self.settings.batch * (3 if self.compute.gradient_checkpointing else 2)
        return Estimate(calls * self.forward_seconds / 3600, self.megabytes)

    def process_count(self) -> int:
        return self.compute.processes

    def describe(self) -> str:
        how_far = self.adapting
        split = (
            f" {how_far.feature_rank}+{how_far.rank - how_far.feature_rank}" if how_far.adaptation == "hybrid" else ""
        )
        return (
            f"{self.model.pair} on {self.model.name}: {how_far.method} {how_far.adaptation}{split} rank {how_far.rank}, "
            f"{self.subject}, lr {self.learning_rate:g}, seed {self.seed}"
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(OnModel):
    """Images of one subject from one model, scored one by one.

    Without a training, the bare model; with one, its adapter as it is, or carried by a transfer method.
    """

    training: Training | None = None
    side: str
    carry: str = "copy"
    prompts: tuple[str, ...]
    """What the images are compared with, and what seeds their noise: without a rare token."""
    told: tuple[str, ...] = how(())
    """What the model is asked, where the training has a rare token; the prompts themselves if empty."""
    image_seeds: tuple[int, ...]
    sampling: Sampling
    resolution: int
    judge: Judge
    seed: int
    """Of the training, 0 of a bare model: what the table takes the spread over."""

    def run(self, worker: Worker) -> Result:
        loaded = self.loaded(worker, self.model, self.compute)
        evidence: dict[str, Any] = {}
        with self._adapter(worker, loaded) as found:
            evidence |= found or {}
            images = self._images(loaded, worker.quiet)
        scorer = self._scorer(worker)
        asked = [prompt for prompt, _ in self._questions()]
        photographs = self.photographs(worker)
        rows = scorer.rows(images, asked, photographs, self.subject)
        questions = list(enumerate(self._questions()))
        for (index, (prompt, image_seed)), row in zip(questions, rows, strict=True):
            row |= {"prompt": prompt, "image_seed": image_seed}  # type: ignore[dict-item]  # a row holds numbers and texts
            if self.compute.keep_images == "all" or (
                self.compute.keep_images == "first" and image_seed == self.image_seeds[0]
            ):
                _save(images[index], worker.out / "images" / f"{index // len(self.image_seeds):02d}-{image_seed}.jpg")
        if self.training is None and self.compute.keep_images != "none":
            for index, photograph in enumerate(photographs):
                photograph.thumbnail((self.resolution, self.resolution))
                _save(photograph, worker.out / "images" / f"real-{index}.jpg")
        return {"rows": rows, "carried": evidence}

    def _questions(self) -> list[tuple[str, int]]:
        return [(prompt, image_seed) for prompt in self.prompts for image_seed in self.image_seeds]

    def _adapter(self, worker: Worker, loaded: Loaded) -> Any:
        if self.training is None:
            return nullcontext()
        folder = worker.artifacts(self.training) / "adapter"
        if self.carry == "copy":
            return on_base(loaded.denoiser, folder)
        source = self.loaded(worker, self.training.model, self.compute)
        return carried(loaded.denoiser, source.denoiser, folder, self.carry)

    def _images(self, loaded: Loaded, quiet: bool) -> list[Any]:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # tqdm has no types

        questions = self._questions()
        told = dict(zip(self.prompts, self.told or self.prompts, strict=True))
        prompts = [told[prompt] for prompt, _ in questions]
        seeds = [_noise_seed(self.subject, prompt, image_seed) for prompt, image_seed in questions]
        made = loaded.generate(prompts, seeds, self.resolution, self.sampling, self.compute.image_batch)
        return list(tqdm(made, total=len(prompts), desc="images", leave=False, disable=quiet))

    def _scorer(self, worker: Worker) -> Scorer:
        from benchmarks.dreambooth.pipelines import default_device
        from benchmarks.dreambooth.scores import load_scorer

        judge = self.judge
        if self.made is not None:
            folder = worker.artifacts(self.made.world)
            classifier = None if judge.classifier is None else str(folder / judge.classifier)
            judge = dataclasses.replace(
                judge, clip=str(folder / judge.clip), dino=str(folder / judge.dino), classifier=classifier
            )
        return worker.base(f"judge {judge}", lambda: load_scorer(judge, default_device()))

    def estimate(self) -> Estimate:
        guided = self.sampling.guidance > 1 and self.model.family != "flux"
        count = len(self.prompts) * len(self.image_seeds)
        calls = count * self.sampling.steps * (2 if guided else 1)
        kept = {"all": count, "first": len(self.prompts), "none": 0}[self.compute.keep_images]
        return Estimate(calls * self.forward_seconds / 3600, kept * IMAGE_MEGABYTES)

    def describe(self) -> str:
        of = "bare" if self.training is None else f"{self.carry} of {self.training.name}"
        return f"{self.model.pair}, {self.side}: {of}, {self.subject}"


def _noise_seed(subject: str, prompt: str, seed: int) -> int:
    """One noise for a subject, a prompt and a seed, on whichever model."""
    return int.from_bytes(hashlib.sha256(f"{subject}/{prompt}/{seed}".encode()).digest()[:6], "big")


def _save(image: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    image.save(path, quality=92, subsampling=0)
