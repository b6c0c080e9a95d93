"""Runs the cells of a preset, those that an interrupted run has finished not again, and puts the results together."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

from benchmarks import provenance
from benchmarks.tiny.denoiser_settings import HEADINGS, DenoiserSettings
from benchmarks.tiny.denoiser_settings import PART as DENOISER
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.results import SCHEMA, Cells, Results
from benchmarks.tiny.settings import SIBLINGS, LmSettings, Settings, with_learning_rates
from benchmarks.tiny.summary import REAL, Part

PARTS = ("lm", "denoiser")
ONE_SEED = (
    "One seed. The changes of basis come out alike every time; on the drifted siblings the order of the adapters changes from seed "
    "to seed, so read those rows in the results over three seeds: benchmarks/tiny/results/full.md."
)
DENOISER_NOTE = (
    "Two denoisers trained from different seeds share one thing, the table of word vectors that both are asked with. They have drawn "
    "all styles; what is new is a name for one of them. Tied input: one adapter, shared by all layers that read the words, with a "
    "sixth of the parameters. It changes the words themselves, so it means the same wherever they are read. That carries a new "
    "name for what a model can draw already, and nothing that it has not seen: the full run checks this with the style held out."
)


def plan(settings: Settings, only: Sequence[str] = PARTS) -> list[str]:
    """The names of the cells, in the order in which they run."""
    names = ["lm-learning-rates"] if "lm" in only and settings.lm.learning_rate_grid else []
    return names + [f"{part}-seed{seed}" for part in PARTS if part in only for seed in settings.seeds]


def run(settings: Settings, cells: Cells, progress: Reporter, only: Sequence[str] = PARTS) -> Results:
    """Everything that `settings` asks for, as one JSON-able dictionary."""
    results: Results = {
        "schema": SCHEMA,
        "preset": settings.preset,
        "command": "python -m benchmarks.tiny " + {"short": "demo --short"}.get(settings.preset, settings.preset),
        "parts": [],
        "rows": [],
        "choices": [],
        "siblings": [],
        "learning_rates": [],
        "seconds_by_cell": {},
        "images": [],
        "notes": [],
    }
    lm = settings.lm
    for name in plan(settings, only):
        made_with = {
            "settings": asdict(lm if name.startswith("lm") else settings.denoiser),
            "versions": provenance.versions(),
        }
        content = cells.get(name, made_with)
        if content is None:
            started = time.perf_counter()
            content = _make(name, settings, lm, progress)
            content["seconds"] = time.perf_counter() - started
            cells.put(name, made_with, content)
            progress.say(f"{name}: {content['seconds']:.0f} s")
        else:
            progress.say(f"{name}: kept from the interrupted run")
        results["seconds_by_cell"][name] = content["seconds"]
        if name == "lm-learning-rates":
            content["learning_rates"], lm = _choose(content["learning_rates"], lm)
        for key in ("rows", "choices", "siblings", "learning_rates"):
            results[key] += content.get(key, [])
        results["images"] = results["images"] or content.get("images", [])  # of the first seed only
    results["notes"] = _notes(settings, only)
    results["parts"] = [asdict(part) for part in _parts(settings, only)]
    return finish(results, asdict(replace(settings, lm=lm)))


def finish(results: Results, settings: dict[str, Any]) -> Results:
    """Add what is the same for every kind of run: when, where, with which settings and versions."""
    return {
        **results,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": sum(results["seconds_by_cell"].values()),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "git": provenance.git(),
        "settings": settings,
    }


def _make(name: str, settings: Settings, lm: LmSettings, progress: Reporter) -> dict[str, Any]:
    """What one cell brings to the results."""
    part, _, seed = name.partition("-seed")
    if part == "denoiser":
        return _denoise(settings.denoiser, int(seed), progress)
    from benchmarks.tiny.lm import run_lm, tune  # transformers takes seconds to import, and --plan must not

    return run_lm(lm, int(seed), progress) if part == "lm" else tune(lm, settings.seeds[0], progress)


def _denoise(settings: DenoiserSettings, seed: int, progress: Reporter) -> dict[str, Any]:
    from benchmarks.tiny.denoiser import run_denoiser  # and so does diffusers
    from benchmarks.tiny.denoiser_eval import contact_sheet
    from benchmarks.tiny.denoiser_world import TRAINING_IMAGES, concept_images

    with progress.shares() as show:
        result = run_denoiser(settings, seed, show)
    real = {(REAL, "source"): contact_sheet(*concept_images(slice(TRAINING_IMAGES)))}
    images = [
        {
            "part": DENOISER,
            "seed": seed,
            "adapter": adapter,
            "sibling": sibling,
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "grey": b64encode(pixels.tobytes()).decode(),
        }
        for (adapter, sibling), pixels in (real | result.images).items()
    ]
    return {"rows": result.rows, "learning_rates": result.learning_rates, "images": images}


def _notes(settings: Settings, only: Sequence[str]) -> list[str]:
    notes = [ONE_SEED] if len(settings.seeds) == 1 else []
    fixed: dict[str, Mapping[str, float]] = {}
    if "lm" in only and not settings.lm.learning_rate_grid:
        fixed |= {placement.part: placement.learning_rates for placement in settings.lm.placements}
    if "denoiser" in only and not settings.denoiser.learning_rate_grid:
        fixed["the denoiser"] = settings.denoiser.learning_rates
    for part, rates in fixed.items():
        shown = ", ".join(f"{'LoRA' if space in ('lora', 'copy') else space} {rate:g}" for space, rate in rates.items())
        notes.append(
            f"Learning rates for {part}: {shown}. The full run chose them on the source; this run did not search again."
        )
    return notes


def _choose(tried: list[dict[str, Any]], lm: LmSettings) -> tuple[list[dict[str, Any]], LmSettings]:
    """Mark the chosen learning rates, and the settings that use them."""
    from benchmarks.tiny.lm import chosen_learning_rates

    chosen = {placement.part: chosen_learning_rates(tried, placement.part) for placement in lm.placements}
    marked = [{**row, "chosen": chosen[row["part"]][row["space"]] == row["learning_rate"]} for row in tried]
    placements = tuple(with_learning_rates(placement, chosen[placement.part]) for placement in lm.placements)
    return marked, replace(lm, placements=placements)


def _parts(settings: Settings, only: Sequence[str]) -> list[Part]:
    found = [
        Part(
            name=placement.part,
            title=f"A tiny language model learns a new task: adapters on {placement.part}",
            score=f"exact match on {settings.lm.eval_lines} unseen lines",
            headings=SIBLINGS,
        )
        for placement in settings.lm.placements
        if "lm" in only
    ]
    denoiser = Part(
        name=DENOISER,
        title="A tiny denoiser learns a new name for a style",
        score=f"share of {10 * settings.denoiser.images_per_digit} generated digits that show the digit and the style asked for",
        headings=HEADINGS,
        note=DENOISER_NOTE,
    )
    return [*found, denoiser] if "denoiser" in only else found
