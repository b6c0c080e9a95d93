"""The run on real models: trains through the library's trainer, makes images with stock pipelines, measures CLIP-I, CLIP-T and IDA.

One cell per target, method and seed. A finished cell lies in a folder of its own, with its adapter, and is not run again; one that
was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import provenance
from benchmarks.a4a.full import NATIVE, FullSettings, Target, method_of
from benchmarks.a4a.gallery import page
from benchmarks.a4a.table_1 import table_1
from benchmarks.a4a.weights import fetch, fetch_pipeline
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.results import Cells, write_together
from xadapt.live_base import LiveBase
from xadapt.siblings import Pair
from xadapt_a4a import A4AModel
from xadapt_a4a.accelerators import accelerator_for
from xadapt_a4a.data import Encodable
from xadapt_a4a.encoding import ImageEncoder
from xadapt_a4a.methods import TrainA4A
from xadapt_a4a.metrics import Clip, clip_i, clip_t, face_analysis, ida
from xadapt_a4a.objective import objective_of
from xadapt_a4a.reference import ReferenceAdapter
from xadapt_a4a.run import Progress, Run
from xadapt_a4a.scratch import IPAdapterModel
from xadapt_a4a.source import IPAdapterSource
from xadapt_a4a.stream import as_batches
from xadapt_a4a.targets import find_attention_layers
from xadapt_a4a.trainer import Trainer

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Studio:
    """One target's pipeline, the references and prompts, and what measures the images made of them."""

    def __init__(self, settings: FullSettings, target: Target, references: Path, device: torch.device) -> None:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        self.settings, self.target, self.device = settings, target, device
        self.folder = fetch_pipeline(target.pipeline)
        self.pipe: Any = DiffusionPipeline.from_pretrained(self.folder).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.network: nn.Module = getattr(self.pipe, "unet" if hasattr(self.pipe, "unet") else "transformer")
        takes = inspect.signature(type(self.pipe).__call__).parameters
        self.call = {"use_resolution_binning": False} if "use_resolution_binning" in takes else {}  # the size is given
        self.encoder_folder = fetch(settings.image_encoder)
        self.source = IPAdapterSource.load(fetch(settings.ip_adapter), allow_pickle=False)
        self.encoder = ImageEncoder(self.encoder_folder, self.source)
        self.encoder.to(device)
        self.images = pictures(references, settings.references)
        self.clip = Clip(settings.clip, device)
        self.faces = face_analysis(settings.faces) if settings.faces else None

    @torch.no_grad()
    def generate(self, adapter: ReferenceAdapter, scale: float) -> list[list[Any]]:
        """For each reference an image per prompt, at the same noise for every adapter."""
        made = []
        empty = self.encoder.empty().get("negative_image_embeds")
        for number, image in enumerate(self.images):
            bank = adapter.encode(self.encoder.encode([image])["image_embeds"], empty)
            with adapter.attached(self.network, bank, scale, guidance=self.target.guidance > 1):
                made.append(
                    [
                        self.pipe(
                            prompt,
                            num_inference_steps=self.target.sampling_steps,
                            guidance_scale=self.target.guidance,
                            height=self.target.resolution,
                            width=self.target.resolution,
                            **self.call,
                            generator=torch.Generator().manual_seed(1000 * number + place),
                        ).images[0]
                        for place, prompt in enumerate(self.settings.prompts)
                    ]
                )
        return made

    def scores(self, made: list[list[Any]]) -> dict[str, float]:
        """CLIP-I, CLIP-T, and IDA with both treatments of images without a face."""
        flat = [image for row in made for image in row]
        references = [image for image, row in zip(self.images, made, strict=True) for _ in row]
        prompts = [prompt for _ in made for prompt in self.settings.prompts]
        found = {"clip_i": clip_i(self.clip, flat, references), "clip_t": clip_t(self.clip, flat, prompts)}
        if self.faces is not None:
            identity = ida(self.faces, flat, references)
            found |= {"ida": identity.found_only, "ida_as_zero": identity.as_zero, "faces": identity.detected}
        return found


def run(settings: FullSettings, data: str, references: Path, out: Path, progress: Reporter) -> int:
    """All cells of a preset, then the tables and the page with the images."""
    cells = Cells(out / "cells")
    made_with = {"settings": asdict(settings), "data": data, "versions": provenance.versions()}
    studios: dict[str, Studio] = {}
    results: dict[str, Any] = {"preset": settings.preset, "settings": asdict(settings), "rows": [], "sweep": []}
    for target, method, seed in settings.cells():
        name = f"{target}-{method.replace(' ', '-')}-seed{seed}"
        content = cells.get(name, made_with)
        if content is None:
            progress.say(f"{name} …")
            options = _options(settings, settings.targets[target], method, seed, out / "checkpoints" / name)
            with accelerator_for(
                None, accumulate=1, mixed_precision=settings.mixed_precision, log_with="", folder=""
            ) as accelerator:
                if target not in studios:
                    studios = {target: Studio(settings, settings.targets[target], references, accelerator.device)}
                content = _cell(studios[target], options, method, data, out, name, accelerator)
                if accelerator.is_main_process:
                    cells.put(name, made_with, content)
                main = accelerator.is_main_process
                accelerator.wait_for_everyone()
            if not main:
                continue
        else:
            progress.say(f"{name}: kept from an earlier run")
        about = {"target": target, "method": method, "seed": seed}
        results["rows"] += [{**about, **row} for row in content["rows"]]
        results["sweep"] += [{**about, **row} for row in content["sweep"]]
    if int(os.environ.get("RANK", "0")) == 0:
        results |= {"versions": provenance.versions(), "hardware": provenance.hardware(), "git": provenance.git()}
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        paths = {out / f"{settings.preset}.json": text, out / f"{settings.preset}.html": page(results, out)}
        if (beside := table_1(results)) is not None:
            paths[out / f"{settings.preset}.md"] = beside.markdown() + "\n"
        write_together(paths)
        progress.say(f"written: {', '.join(map(str, paths))}")
    return 0


def _options(settings: FullSettings, target: Target, name: str, seed: int, checkpoints: Path) -> TrainA4A:
    """What the library's trainer is told. Of the baselines, only what they have is used."""
    method = method_of(name) if name != NATIVE else None
    rate = settings.rate_of(name)
    rates = {group: rate * factor for group, factor in (method.rates if method else {}).items()}
    extra = dict(method.options) if method and method.maker != "scratch" else {}
    return TrainA4A(
        **{
            **rates,
            "depth": settings.depth,
            "head_dim": settings.head_dim,
            **extra,
        },
        steps=settings.steps,
        train_pta=method.train_source if method else True,
        weight_decay=settings.weight_decay,
        mixed_precision=settings.mixed_precision,
        checkpointing=settings.checkpointing,
        checkpoints=str(checkpoints),
        checkpoint_every=settings.checkpoint_every,
        batch_size=settings.batch,
        pipeline=fetch_pipeline(target.pipeline),
        image_encoder=fetch(settings.image_encoder),
        cache=str(checkpoints.parents[1] / "encoded"),
        resolution=target.resolution,
        seed=seed,
    )


def make(studio: Studio, options: TrainA4A, name: str) -> tuple[ReferenceAdapter, Any]:
    """An untrained adapter by that method, and what makes its optimiser."""
    torch.manual_seed(options.seed)
    file = fetch(studio.settings.ip_adapter)
    if name == NATIVE:
        return IPAdapterModel.from_ip_adapter(fetch(studio.target.native), studio.network), None
    method = method_of(name)
    if method.maker == "scratch":
        keys: Any = find_attention_layers(studio.network)[0].module.to_k
        wanted = {**studio.source.options, _context(studio.source.options): keys.in_features}
        scratch = IPAdapterModel.fresh(studio.network, studio.source.kind.name, wanted, **method.options)
        rate = studio.settings.rate_of(name)
        return scratch, lambda one: torch.optim.AdamW(one.param_groups(rate), weight_decay=options.weight_decay)
    model = A4AModel.from_ip_adapter(
        file, studio.network, **{"depth": options.depth, "head_dim": options.head_dim, **method.options}
    )
    if method.maker == "random":
        model.randomize_source()
    groups = (options.lr1, options.lr2, options.lr3)
    return model, lambda one: torch.optim.AdamW(
        one.param_groups(*groups, train_pta=options.train_pta), weight_decay=options.weight_decay
    )


def _context(options: Mapping[str, int]) -> str:
    """What the image projection calls the width of its tokens."""
    return "output_dims" if "output_dims" in options else "cross_attention_dim"


def _cell(
    studio: Studio, options: TrainA4A, name: str, data: str, out: Path, cell: str, accelerator: Any
) -> dict[str, Any]:
    """Trains, measuring at the stops, and then over λ."""
    settings = studio.settings
    adapter, optimizer = make(studio, options, name)
    samples = settings.batch * accelerator.num_processes
    kept = out / "checkpoints" / cell / "rows.json"  # what was measured before an interruption
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []

    def watch(now: Progress) -> None:
        if now.step in settings.stops and all(row["step"] != now.step for row in rows):
            scores = studio.scores(studio.generate(now.model, settings.scale))
            rows.append({"step": now.step, "samples": now.step * samples, "loss": now.loss, **scores})
            write_together({kept: json.dumps(rows)})

    if optimizer is None:
        nn.Module.to(adapter, studio.device)
    else:
        batches: Any = options.batches(data, Pair(None, LiveBase(studio.network)))
        stream = (
            batches.encoded(adapter.source, studio.network, accelerator) if isinstance(batches, Encodable) else batches
        )
        objective = objective_of(studio.network, "auto", options.pipeline, "scheduler")
        run = Run(
            steps=options.steps,
            seed=options.seed,
            image_drop=options.image_drop,
            text_drop=options.text_drop,
            both_drop=options.both_drop,
            recompute=options.checkpointing,
            checkpoints=options.checkpoints,
            checkpoint_every=options.checkpoint_every,
            settings={"method": name, "rate": settings.rate_of(name), "data": data},
        )
        Trainer(adapter, studio.network, objective, optimizer, run, accelerator, watch).train(as_batches(stream))
    if not accelerator.is_main_process:
        return {"rows": [], "sweep": []}
    adapter.save_pretrained(out / "adapters" / cell)
    sweep = []
    for scale in settings.scales:
        made = studio.generate(adapter, scale)
        sweep.append({"scale": scale, **studio.scores(made)})
        if scale == settings.scale:
            save_sheet(studio.images, made, out / "images" / f"{cell}.jpg")
    return {"rows": rows, "sweep": sweep}


def save_sheet(references: Iterable[Any], made: list[list[Any]], path: Path, tile: int = 160, most: int = 8) -> None:
    """A row per reference, at most so many: the reference, then an image per prompt."""
    from PIL import Image

    rows = list(zip(references, made, strict=True))[:most]
    sheet = Image.new("RGB", (tile * (1 + len(rows[0][1])), tile * len(rows)), "grey")
    for top, (reference, images) in enumerate(rows):
        for left, image in enumerate((reference, *images)):
            sheet.paste(image.convert("RGB").resize((tile, tile)), (left * tile, top * tile))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(part, format="JPEG", quality=88)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def pictures(folder: Path, count: int) -> list[Any]:
    """The first so many images of a folder, by name."""
    from PIL import Image

    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder} holds no reference images ({', '.join(PICTURES)}).")
    return [Image.open(path).convert("RGB") for path in paths[:count]]
