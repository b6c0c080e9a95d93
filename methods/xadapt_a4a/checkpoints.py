"""Checkpoints of a training run: written whole or not at all, read without pickle, refused where the settings differ.

checkpoint-00000500/
    config.json, diffusion_pytorch_model.safetensors   the adapter at this step; `from_pretrained` opens it
    ema/                                               the same with averaged weights, where an average is kept
    training.safetensors                               the optimiser, the losses so far
    training.json                                      the step, the settings, and what was trained on
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xadapt.errors import some
from xadapt.files import save_tensors
from xadapt.strict_json import read_object

_NAME = re.compile(r"checkpoint-(\d{8,})")
_PART = ".checkpoint-"  # what temporary folders are called, so that a crash's leftovers are known
_NUMBERS, _FACTS = "training.safetensors", "training.json"


@dataclass
class RunState:
    """Where a run stands, beside the weights of its model."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    """What must be the same when it goes on."""

    batch: list[float] = field(default_factory=list)
    """What is remembered of a batch (`signature`), which tells whether the data is the same."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else the run keeps, as JSON: the gradient scaler, the number of averaged steps."""


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they lie. It is made if need be.
        keep: how many stay, the newest ones.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder = Path(folder)
        if keep < 1:
            raise ValueError(f"keep_checkpoints={keep}: at least the newest has to stay; write 1 or more.")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; checkpoints={str(self.folder)!r} should name a folder.")
        self._keep = keep

    def newest(self) -> Path | None:
        """The last checkpoint that was finished."""
        found = self._all()
        return found[-1] if found else None

    def write(self, step: int, fill: Callable[[Path], None]) -> Path:
        """A checkpoint, put together by `fill` in a temporary folder and moved into its place when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"checkpoint-{step:08d}"
        part = Path(tempfile.mkdtemp(prefix=f"{_PART}{step:08d}.", dir=self.folder))
        try:
            fill(part)
            if place.exists():  # of a run that was interrupted between here and its next step
                self._remove(place)
            os.replace(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self._all()[: -self._keep]:
            self._remove(old)
        return place

    def sweep(self) -> None:
        """Removes what a crash has left half-written."""
        for path in self.folder.glob(f"{_PART}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(
            (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()),
            key=lambda path: int(path.name.partition("-")[2]),
        )

    def _remove(self, path: Path) -> None:
        """Under another name first: a half-removed checkpoint must not look like one."""
        away = path.with_name(f"{_PART}old-{path.name}")
        os.replace(path, away)
        shutil.rmtree(away, ignore_errors=True)


def write_state(folder: Path, state: RunState, optimizer: torch.optim.Optimizer) -> None:
    """training.safetensors and training.json."""
    tensors = optimizer_tensors(optimizer)
    tensors["losses"] = torch.tensor(state.losses, dtype=torch.float64)
    save_tensors(tensors, folder / _NUMBERS)
    facts = {"step": state.step, "batch": state.batch, "settings": state.settings, "facts": state.facts}
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_state(folder: Path, optimizer: torch.optim.Optimizer) -> RunState:
    """What `write_state` wrote; the optimiser gets its own part.

    Raises:
        ValueError: a file is damaged, or belongs to another optimiser.
    """
    facts = read_object(folder / _FACTS)
    tensors = read_tensors(folder / _NUMBERS)
    try:
        losses: list[float] = tensors.pop("losses").tolist()
        state = RunState(facts["step"], losses, facts["settings"], facts["batch"], facts["facts"])
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error}. {_go_back(folder)}") from error
    load_optimizer(optimizer, tensors, folder)
    return state


def check_settings(folder: Path, now: Mapping[str, Any]) -> None:
    """ValueError, naming what differs, unless a checkpoint's run had these settings."""
    then = read_object(folder / _FACTS).get("settings", {})
    now = json.loads(json.dumps(dict(now)))
    differing = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
    if differing:
        changes = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in differing]
        raise ValueError(
            f"{folder} is of a run with other settings: {some(changes, 8, '; ')}. Set them back to go on with it, or name another "
            "folder in checkpoints=… to begin anew."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file; ValueError says how to go on without it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not there ({error}). {_go_back(path.parent)}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """A file's tensors into a module, in place.

    Raises:
        ValueError: it is damaged, or of another module.
    """
    try:
        module.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit: {str(error).splitlines()[-1].strip()} {_go_back(path.parent)}"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `optimizer.{parameter's number}.{exp_avg …}`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in state.items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Inverse of `optimizer_tensors`. Learning rates and the like stay as the optimiser has them."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        _, number, name = key.split(".", 2)
        state.setdefault(int(number), {})[name] = tensor
    parameters: Sequence[Tensor] = [one for group in optimizer.param_groups for one in group["params"]]
    for place, values in state.items():
        wrong = place >= len(parameters) or any(
            value.ndim and value.shape != parameters[place].shape for value in values.values()
        )
        if wrong:
            raise ValueError(f"{folder} holds the state of another optimiser. {_go_back(folder)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _go_back(folder: Path) -> str:
    return f"Remove {folder} to go on from the checkpoint before it, or from the start."
