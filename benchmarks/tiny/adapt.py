"""Train an adapter on one model, put it into a folder, load the folder into another model. Stock PEFT and xadapt throughout."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import xadapt
from benchmarks.tiny.pretrain import Draw, fit
from benchmarks.tiny.progress import Reporter

Plan = Mapping[str, Sequence[str]]  # space -> the modules that are adapted there


def adapter_config(space: str, rank: int, target_modules: Sequence[str]) -> PeftConfig:
    """The config of one space. All three have the same rank and scale, and on square layers the same number of parameters."""
    configs = {"lora": LoraConfig, "input": xadapt.InputAdaConfig, "output": xadapt.OutputAdaConfig}
    return configs[space](r=rank, lora_alpha=rank, target_modules=list(target_modules))


def train_adapter(
    source: PreTrainedModel,
    plan: Plan,
    rank: int,
    draw: Draw,
    folder: Path,
    *,
    steps: int,
    learning_rates: Mapping[str, float],
    seed: int,
    title: str,
    progress: Reporter,
) -> PreTrainedModel:
    """Train the adapters of `plan` together on a copy of `source`, save one PEFT folder per space, return the adapted copy."""
    torch.manual_seed(seed)
    model = copy.deepcopy(source)
    wrappers = _attach(model, plan, rank)
    fit(
        model,
        draw,
        steps=steps,
        learning_rate={f"{space}_space": rate for space, rate in learning_rates.items()},
        seed=seed + 2000,  # other lines than in pre-training and drift
        title=title,
        progress=progress,
    )
    for space, wrapper in zip(plan, wrappers, strict=True):
        own = {name: tensor for name, tensor in wrapper.state_dict().items() if f".{space}_space." in name}
        wrapper.save_pretrained(str(folder), state_dict=own)
    return model


def carry(folder: Path, target: PreTrainedModel, layers: Mapping[int, int] | None = None) -> torch.nn.Module:
    """A copy of `target` with the trained adapters of `folder` on it. `layers` renumbers them (source layer -> target layer)."""
    model: torch.nn.Module = copy.deepcopy(target)
    spaces = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.endswith(".renumbered"))
    for index, space in enumerate(spaces):
        loaded = xadapt.load(model, renumber(space, layers) if layers else space)
        # Adapters of several spaces sit on different layers, so merging one after the other is exact.
        model = loaded if index == len(spaces) - 1 else loaded.merge_and_unload()
    return model.eval()


def renumber(folder: Path, layers: Mapping[int, int]) -> Path:
    """The adapter in `folder` for a model that kept only some layers: a new folder beside it."""
    renumbered = folder.with_name(folder.name + ".renumbered")
    renumbered.mkdir(exist_ok=True)
    (renumbered / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        assert match is not None, name
        if int(match[1]) in layers:
            tensors[f"{name[: match.start(1)]}{layers[int(match[1])]}{name[match.end(1) :]}"] = tensor
    save_file(tensors, renumbered / "adapter_model.safetensors")
    return renumbered


def trainable(model: torch.nn.Module) -> int:
    """How many parameters ask for gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _attach(model: PreTrainedModel, plan: Plan, rank: int) -> list[PeftModel]:
    wrappers: list[PeftModel] = []
    for space, modules in plan.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
            wrappers.append(get_peft_model(model, adapter_config(space, rank, modules), adapter_name=f"{space}_space"))
        del model.peft_config  # PEFT keeps one list of adapters per model; here every space is a tuner of its own
    for wrapper in wrappers:  # the last tuner froze what the others had made trainable
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_("_space" in name)
    return wrappers
