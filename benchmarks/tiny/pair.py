"""The same comparison on two real checkpoints and the user's own text: train on the source, carry to the target, measure there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from benchmarks import provenance
from benchmarks.tiny.adapt import adapter_config
from benchmarks.tiny.checkpoints import Reader, carried, check_device, loss_on, open_checkpoint, pad, read_lines, split
from benchmarks.tiny.driver import finish
from benchmarks.tiny.pretrain import fit
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.results import SCHEMA, Cells, Results
from benchmarks.tiny.settings import SPACES
from benchmarks.tiny.summary import Part
from benchmarks.tiny.tasks import Batch

COLUMN = {"lora": "copy", "input": "input", "output": "output"}


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What `python -m benchmarks.tiny pair` was asked for."""

    source: str
    target: str
    text: str
    rank: int = 8
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    steps: int = 200
    batch: int = 8
    length: int = 128
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0,)
    retrain: bool = False
    device: str = "cpu"
    dtype: str = "float32"


def run_pair(settings: PairSettings, cells: Cells, progress: Reporter) -> Results:
    """One table: source and target by adapter, the loss on lines that no adapter has seen.

    Raises:
        ValueError: the device is not there, the text has too few lines, or a checkpoint cannot be opened.
    """
    lines = read_lines(Path(settings.text))
    check_device(settings.device)
    rows: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    notes: list[str] = []
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for seed in settings.seeds:
            name = f"pair-seed{seed}"
            made_with = {"settings": asdict(settings), "versions": provenance.versions()}
            content = cells.get(name, made_with)
            if content is None:
                content = _Pair(settings, lines, seed, Path(folder), progress).run()
                cells.put(name, made_with, content)
            else:
                progress.say(f"{name}: kept from the interrupted run")
            rows += content["rows"]
            tried += content["learning_rates"]
            notes += [note for note in content["notes"] if note not in notes]
            seconds[name] = content["seconds"]
    part = Part(
        name="pair",
        title=f"{settings.source} → {settings.target}",
        score="held-out loss per token",
        higher_is_better=False,
        digits=3,
        margin=0.005,
    )
    results: Results = {
        "schema": SCHEMA,
        "preset": "pair",
        "command": "python -m benchmarks.tiny pair",
        "parts": [asdict(part)],
        "rows": rows,
        "choices": [],
        "siblings": [],
        "learning_rates": tried,
        "seconds_by_cell": seconds,
        "images": [],
        "notes": notes,
    }
    return finish(results, asdict(settings))


class _Pair:
    """One seed of one pair."""

    def __init__(
        self, settings: PairSettings, lines: Sequence[str], seed: int, folder: Path, progress: Reporter
    ) -> None:
        self.settings, self.seed, self.folder, self.progress = settings, seed, folder, progress
        self.train, self.validation, self.held_out = split(lines, seed)
        self.rows: list[dict[str, Any]] = []
        self.tried: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        source, read = self._open(self.settings.source)
        source_ids = [read(line).tolist() for line in self.held_out]
        self._record("source", "bare", self._loss(source, read, self.held_out))
        adapters = {space: self._tuned(source, read, space) for space in SPACES}
        for space, (folder, _) in adapters.items():
            with carried(folder, source) as model:
                self._record("source", COLUMN[space], self._loss(model, read, self.held_out))
        del source
        target, read = self._open(self.settings.target)
        if [read(line).tolist() for line in self.held_out] != source_ids:
            self.notes.append("Source and target cut the text into different tokens: compare losses within a row only.")
        self._record("target", "bare", self._loss(target, read, self.held_out))
        for space, (folder, _) in adapters.items():
            try:
                with carried(folder, target) as model:
                    self._record("target", COLUMN[space], self._loss(model, read, self.held_out))
            except ValueError as error:
                self.notes.append(f"The {space} adapter does not fit the target: {error}")
        if self.settings.retrain:
            rate = adapters["lora"][1]
            folder = self._trained(target, read, "lora", rate, "the target")
            with carried(folder, target) as model:
                self._record("target", "retrained", self._loss(model, read, self.held_out))
        return {
            "rows": self.rows,
            "learning_rates": self.tried,
            "notes": self.notes,
            "seconds": time.perf_counter() - started,
        }

    def _open(self, checkpoint: str) -> tuple[PreTrainedModel, Reader]:
        self.progress.say(f"opening {checkpoint}")
        return open_checkpoint(
            checkpoint, dtype=self.settings.dtype, device=self.settings.device, length=self.settings.length
        )

    def _tuned(self, source: PreTrainedModel, read: Reader, space: str) -> tuple[Path, float]:
        """The adapter with the lowest validation loss on the source, and its learning rate."""
        folders: dict[float, Path] = {}
        losses: dict[float, float] = {}
        for rate in self.settings.learning_rates:
            folders[rate] = self._trained(source, read, space, rate, "the source")
            with carried(folders[rate], source) as model:
                losses[rate] = self._loss(model, read, self.validation)
        best = min(losses, key=losses.__getitem__)
        for rate, loss in losses.items():
            tried = {"part": "pair", "seed": self.seed, "space": space, "learning_rate": rate, "loss": loss}
            self.tried.append({**tried, "chosen": rate == best})
        return folders[best], best

    def _trained(self, model: PreTrainedModel, read: Reader, space: str, rate: float, where: str) -> Path:
        folder = self.folder / f"{self.seed}-{space}-{rate:g}-{where.replace(' ', '-')}"
        torch.manual_seed(self.seed)
        adapted = get_peft_model(model, adapter_config(space, self.settings.rank, self.settings.target_modules))
        try:
            fit(
                adapted,
                lambda generator: self._batch(read, generator, model.device),
                steps=self.settings.steps,
                learning_rate=rate,
                seed=self.seed,
                title=f"{space} at {rate:g} on {where}",
                progress=self.progress,
            )
            adapted.save_pretrained(str(folder))
        finally:
            adapted.unload()
        return folder

    def _batch(self, read: Reader, generator: torch.Generator, device: torch.device) -> Batch:
        picked = torch.randint(len(self.train), (self.settings.batch,), generator=generator).tolist()
        return pad([read(self.train[index]) for index in picked], device)

    def _loss(self, model: torch.nn.Module, read: Reader, lines: Sequence[str]) -> float:
        device = next(model.parameters()).device
        return loss_on([read(line) for line in lines], model, self.settings.batch, device)

    def _record(self, sibling: str, adapter: str, score: float) -> None:
        self.rows.append({"part": "pair", "seed": self.seed, "adapter": adapter, "sibling": sibling, "score": score})
