"""The pieces of the offline run: models and source adapters of a seed, an adapter by any method, its examination."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.a4a import models, world
from benchmarks.a4a.adapt import Place, References, learn
from benchmarks.a4a.evaluate import Exam
from benchmarks.a4a.judge import Judge
from benchmarks.a4a.pretrain import Progress, pretrain
from benchmarks.a4a.settings import METHODS, TinySettings
from xadapt_a4a import A4AModel
from xadapt_a4a.scratch import IPAdapterModel
from xadapt_a4a.targets import find_attention_layers

SOURCE = "sd15"
Row = dict[str, Any]


class Lab:
    """The models of one seed, from `folder` once `prepare` has put them there."""

    def __init__(self, settings: TinySettings, seed: int, folder: Path, judge: Judge) -> None:
        self.settings, self.seed, self.folder, self.judge = settings, seed, folder, judge

    @property
    def files(self) -> list[Path]:
        """What `prepare` writes."""
        names = [SOURCE, *self.settings.targets, "ip-adapter"]
        return [self.folder / f"{name}.safetensors" for name in names]

    def prepare(self, progress: Progress) -> list[Row]:
        """Pre-trains the models and an IP-Adapter on the source; how well they do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        s = self.settings
        for name in (SOURCE, *s.targets):
            model = pretrain(
                name,
                self.seed,
                steps=s.pretraining[name].steps,
                batch=s.pretraining[name].batch,
                learning_rate=s.pretraining[name].learning_rate,
                text_drop=s.text_drop,
                progress=progress,
            )
            save_file(dict(model.state_dict()), self.folder / f"{name}.safetensors")
            rows.append(self._row(name, "none", 0, examine(None, self.place(name), self.exam, self.judge)))
        return [*rows, self._row(SOURCE, "source", s.source_steps, self._source(progress))]

    def place(self, name: str) -> Place:
        """That model, frozen, with its text encoder and the image encoder."""
        model = models.build(name, self.seed)
        model.load_state_dict(load_file(self.folder / f"{name}.safetensors"))
        seen = world.Encoder(self.settings.embedding, self.settings.encoder_depth, self.settings.encoder_gain)
        return Place.of(model.requires_grad_(False), models.Text(name, self.seed), seen)

    @property
    def exam(self) -> Exam:
        s = self.settings
        return Exam(s.exam_references, s.exam_prompts, s.sampling_steps, s.guidance, s.exam_losses)

    def make(self, name: str, place: Place, rate: float) -> tuple[Any, list[dict[str, Any]]]:
        """An untrained adapter by that method, and the groups of its optimiser."""
        method, s = METHODS[name], self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if method.maker == "scratch":
                scratch = IPAdapterModel.fresh(place.target, "base", self._projection(place.target), **method.options)
                return scratch, scratch.param_groups(rate)
            options = {"depth": s.depth, "head_dim": s.head_dim, **method.options}
            model = A4AModel.from_ip_adapter(self.folder / "ip-adapter.safetensors", place.target, **options)
            if method.maker == "random":
                model.randomize_source()
        rates = {group: rate * factor for group, factor in method.rates.items()}
        return model, model.param_groups(**rates, train_pta=method.train_source)

    def learn(
        self, name: str, target: str, regime: str, rate: float, stops: Sequence[int], progress: Progress
    ) -> tuple[Any, Place, list[Row]]:
        """A trained adapter, where it was trained, and what it scored at each of the stops."""
        s, place = self.settings, self.place(target)
        adapter, groups = self.make(name, place, rate)
        references = References(s.few if regime == "few" else 0, s.batch, s.text_drop)
        rows = []
        for done in learn(
            adapter,
            place,
            references,
            groups,
            stops,
            image_drop=s.image_drop,
            weight_decay=s.weight_decay,
            seed=1000 + self.seed,
        ):
            progress(f"{target}, {regime}: {METHODS[name].title}", done / stops[-1])
            scores = examine(adapter, place, self.exam, self.judge)
            row = self._row(target, name, done, scores)
            rows.append({**row, "regime": regime, "parameters": _trained(groups)})
        return adapter, place, rows

    def validation(self, name: str, target: str, regime: str, rate: float, steps: int) -> float:
        """The loss on unseen references after so many steps, for choosing the rate."""
        s, place = self.settings, self.place(target)
        adapter, groups = self.make(name, place, rate)
        references = References(s.few if regime == "few" else 0, s.batch, s.text_drop)
        options: dict[str, Any] = {"image_drop": s.image_drop, "weight_decay": s.weight_decay, "seed": 1000 + self.seed}
        list(learn(adapter, place, references, groups, [steps], **options))
        return self.exam.loss(adapter, place)

    def _source(self, progress: Progress) -> dict[str, float]:
        """Trains the IP-Adapter that is to be carried, writes it as published files are, and examines it as read back."""
        s, place = self.settings, self.place(SOURCE)
        progress("IP-Adapter on the source", 0.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapter = IPAdapterModel.fresh(place.target, "base", self._projection(place.target), init="plain")
        groups = adapter.param_groups(s.source_learning_rate)
        options: dict[str, Any] = {"image_drop": s.image_drop, "weight_decay": s.weight_decay, "seed": self.seed}
        list(learn(adapter, place, References(0, s.batch, s.text_drop), groups, [s.source_steps], **options))
        path = self.folder / "ip-adapter.safetensors"
        adapter.save_ip_adapter(path)
        return examine(IPAdapterModel.from_ip_adapter(path, place.target), place, self.exam, self.judge)

    def _projection(self, target: nn.Module) -> dict[str, int]:
        keys: Any = find_attention_layers(target)[0].module.to_k
        tokens = 4  # published files of this kind do not say how many, and diffusers takes 4
        return {
            "image_embed_dim": self.settings.embedding,
            "cross_attention_dim": keys.in_features,
            "num_image_text_embeds": tokens,
        }

    def _row(self, target: str, method: str, step: int, scores: dict[str, float]) -> Row:
        samples = step * self.settings.batch
        row = {"seed": self.seed, "target": target, "method": method}
        return {**row, "step": step, "samples": samples, **scores}


def examine(adapter: Any, place: Place, exam: Exam, judge: Judge) -> dict[str, float]:
    """The loss on unseen references, and the judge's scores."""
    return {"loss": exam.loss(adapter, place), **exam.scores(exam.generate(adapter, place), judge)}


def _trained(groups: Sequence[dict[str, Any]]) -> int:
    return sum(parameter.numel() for group in groups for parameter in group["params"])
