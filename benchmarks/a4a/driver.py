"""Runs the cells of the offline run, those that an interrupted run has finished not again, and puts the results together."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import provenance
from benchmarks.a4a.settings import ABLATIONS, METHODS, TinySettings
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.results import Cells

if TYPE_CHECKING:
    from benchmarks.a4a.judge import Judge
    from benchmarks.a4a.lab import Lab

SCHEMA = 1
SHOWN = ("a4a", "random", "scratch")  # whose images are kept
Results = dict[str, Any]


def plan(settings: TinySettings) -> list[str]:
    """The names of the cells, in the order in which they run."""
    s = settings
    pairs = [f"{target}-{regime}" for target in s.targets for regime in s.regimes]
    names = [f"models-seed{s.tuning_seed}", *(f"rates-{pair}" for pair in pairs)]
    for seed in s.seeds:
        names += [f"models-seed{seed}", *(f"main-{pair}-seed{seed}" for pair in pairs)]
        names += [f"ablations-seed{seed}"] if s.ablations else []
    return names


def run(settings: TinySettings, cells: Cells, progress: Reporter) -> Results:
    """Everything that `settings` asks for, as one JSON-able dictionary."""
    results: Results = {
        "schema": SCHEMA,
        "preset": settings.preset,
        "command": f"python -m benchmarks.a4a {settings.preset}",
        "models": [],
        "rates": [],
        "rows": [],
        "sweep": [],
        "images": [],
        "seconds_by_cell": {},
    }
    bench = _Bench(settings, cells.folder)
    made_with = {"settings": asdict(settings), "versions": provenance.versions()}
    for name in plan(settings):
        content = cells.get(name, made_with)
        if content is None or not bench.is_whole(name):
            started = time.process_time()
            with progress.shares() as show:
                content = bench.make(name, show, results["rates"])
            content["seconds"] = time.process_time() - started
            cells.put(name, made_with, content)
            progress.say(f"{name}: {content['seconds']:.0f} s")
        else:
            progress.say(f"{name}: kept from the interrupted run")
        results["seconds_by_cell"][name] = content["seconds"]
        for key in ("models", "rates", "rows", "sweep", "images"):
            results[key] += content.get(key, [])
    return {
        **results,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": sum(results["seconds_by_cell"].values()),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "git": provenance.git(),
        "settings": asdict(settings),
    }


class _Bench:
    """Makes cells. The models of a seed lie beside them, as files."""

    def __init__(self, settings: TinySettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._judge: Judge | None = None

    def lab(self, seed: int) -> Lab:
        from benchmarks.a4a.judge import Judge
        from benchmarks.a4a.lab import Lab

        if self._judge is None:
            self._judge = Judge.trained(self.settings.judge_steps)
        return Lab(self.settings, seed, self.folder / f"seed{seed}", self._judge)

    def is_whole(self, name: str) -> bool:
        """Whether the files of a cell are there too."""
        kind, _, seed = name.partition("-seed")
        return kind != "models" or all(path.is_file() for path in self.lab(int(seed)).files)

    def make(self, name: str, show: Callable[[str, float], None], rates: list[dict[str, Any]]) -> dict[str, Any]:
        what, _, seed = name.partition("-seed")
        kind, *pair = what.split("-")
        if kind == "models":
            return {"models": self.lab(int(seed)).prepare(show)}
        if kind == "rates":
            return {"rates": self._tune(pair[0], pair[1], show)}
        lab = self.lab(int(seed))
        if kind == "main":
            return self._main(lab, pair[0], pair[1], rates, show)
        return self._ablations(lab, rates, show)

    def _tune(self, target: str, regime: str, show: Callable[[str, float], None]) -> list[dict[str, Any]]:
        """Every rate of the grid for every method, by the loss on unseen references, on a seed that is used for nothing else."""
        s = self.settings
        lab = self.lab(s.tuning_seed)
        tried = []
        for number, method in enumerate(names := methods_of(s, target, regime)):
            losses = {}
            for rate in s.learning_rate_grid:
                show(f"{target}, {regime}: choosing learning rates", number / len(names))
                losses[rate] = lab.validation(method, target, regime, rate, s.tuning_steps[target])
            best = min(losses, key=losses.__getitem__)
            tried += [
                {
                    "target": target,
                    "regime": regime,
                    "method": method,
                    "rate": rate,
                    "loss": loss,
                    "chosen": rate == best,
                }
                for rate, loss in losses.items()
            ]
        return tried

    def _main(
        self, lab: Lab, target: str, regime: str, rates: list[dict[str, Any]], show: Callable[[str, float], None]
    ) -> dict[str, Any]:
        s = self.settings
        found: dict[str, Any] = {"rows": [], "sweep": [], "images": []}
        for method in s.main:
            rate = chosen(rates, target, regime, method)
            adapter, place, rows = lab.learn(method, target, regime, rate, s.stops[target], show)
            found["rows"] += rows
            about = {"target": target, "regime": regime, "method": method, "seed": lab.seed}
            if method == "a4a":
                for scale in s.scales:
                    scores = lab.exam.scores(lab.exam.generate(adapter, place, scale), lab.judge)
                    found["sweep"].append({**about, "scale": scale, **scores})
            if method in SHOWN and lab.seed == s.seeds[0]:
                from benchmarks.a4a.pictures import sheet

                found["images"].append({**about, **_stored(sheet(adapter, place, lab.exam))})
        return found

    def _ablations(self, lab: Lab, rates: list[dict[str, Any]], show: Callable[[str, float], None]) -> dict[str, Any]:
        s = self.settings
        target, regime = s.ablation_target, s.ablation_regime
        rows = []
        for method in s.ablations:
            rate = chosen(rates, target, regime, method)
            stops = s.stops[target][-1:]
            rows += lab.learn(method, target, regime, rate, stops, show)[2]
        return {"rows": rows}


def methods_of(settings: TinySettings, target: str, regime: str) -> list[str]:
    """The methods that are tried there."""
    ablated = (target, regime) == (settings.ablation_target, settings.ablation_regime)
    return [*settings.main, *(settings.ablations if ablated else ())]


def chosen(rates: list[dict[str, Any]], target: str, regime: str, method: str) -> float:
    """The learning rate chosen for a method."""
    wanted = (target, regime, method)
    return next(
        float(row["rate"]) for row in rates if row["chosen"] and (row["target"], row["regime"], row["method"]) == wanted
    )


def _stored(pixels: Any) -> dict[str, Any]:
    height, width, _ = pixels.shape
    return {"height": height, "width": width, "rgb": b64encode(pixels.tobytes()).decode()}


def title(method: str) -> str:
    """A method's name for people."""
    others = {"none": "no adapter", "source": "source's own", "native": "published for the target (PTA-UM)"}
    return METHODS[method].title if method in METHODS else others[method]


def is_ablation(method: str) -> bool:
    return method in ABLATIONS
