"""Open a base: a folder, a component of a pipeline, a model of the Hub, or a live module."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from xadapt.blueprint import component_of
from xadapt.checkpoint_base import CheckpointBase
from xadapt.errors import some
from xadapt.live_base import LiveBase
from xadapt.strict_json import read_object

__all__ = ["CheckpointBase", "LiveBase", "open_base"]

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configs, indexes, tokenizers


def open_base(
    base: str | PathLike[str] | nn.Module | CheckpointBase | LiveBase,
    *,
    component: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> CheckpointBase | LiveBase:
    """Opens a base as far as its headers.

        open_base("llama/").weights()["model.norm.weight"]
        open_base("stable-diffusion-v1-5/stable-diffusion-v1-5", component="unet").skeleton()

    Args:
        base: a checkpoint's folder, the folder of a diffusers pipeline, a model id of the Hub, or a live module.
            A folder that exists goes before the Hub.
        component: which part of a pipeline: "unet", "transformer", "text_encoder", …
        revision: a branch, tag or commit on the Hub.
        variant: "fp16" reads the files with that in their names.
        allow_pickle: also read .bin files, if there are no safetensors. Only tensors are unpickled.

    Raises:
        ValueError: there is no such base, it cannot be used, or its files are damaged.
    """
    if isinstance(base, CheckpointBase | LiveBase | nn.Module):
        if component is not None or revision is not None or variant is not None or allow_pickle:
            raise ValueError(
                f"{type(base).__name__} is open already; component, revision, variant and allow_pickle are for a base "
                "given by folder or id."
            )
        return LiveBase(base) if isinstance(base, nn.Module) else base
    if not isinstance(base, str | PathLike):
        parts = getattr(base, "components", None)
        modules = [name for name, part in parts.items() if isinstance(part, nn.Module)] if _is_mapping(parts) else []
        hint = f" Pass one of its components: {some([f'pipeline.{name}' for name in modules])}." if modules else ""
        raise TypeError(f"A base is a folder, a model id or an nn.Module, not {type(base).__name__}.{hint}")
    folder, name = Path(base), str(base)
    if os.path.exists(folder):  # never raises, whatever the name
        if revision is not None:
            raise ValueError(f"{name} is a folder here, so revision={revision!r} says nothing; leave it out.")
    elif isinstance(base, str):
        folder = _from_hub(base, component, revision, variant, allow_pickle)
    else:
        raise ValueError(f"{name} is not there.")
    if component is not None:
        name = f"{name.rstrip('/')}/{component}"
    folder = _network_in(folder, component)
    config = read_object(folder / "config.json")
    return CheckpointBase(folder, config, name=name, variant=variant, allow_pickle=allow_pickle)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _network_in(folder: Path, component: str | None) -> Path:
    """The folder with the config.json: the one given, or a component's."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a base is a folder with config.json and the tensors.")
    if (folder / "model_index.json").is_file():
        return component_of(folder, read_object(folder / "model_index.json"), component)
    if component is not None:
        raise ValueError(
            f"{folder} has no model_index.json, so it is no pipeline with a component {component!r}; leave component out."
        )
    if not (folder / "config.json").is_file():
        there = some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise ValueError(f"{folder} has neither config.json nor model_index.json; it holds {there}.")
    return folder


def _from_hub(name: str, component: str | None, revision: str | None, variant: str | None, allow_pickle: bool) -> Path:
    """Downloads what is needed of a model, or finds it in the cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder that is there nor a model id ('owner/name').") from error
    asked = f"{name!r} is no folder here, and as a model of the Hub it"
    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        if component is None:  # a pipeline is told so before gigabytes are fetched
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=["config.json", "model_index.json"])
            )
            if (folder / "model_index.json").is_file():
                return folder
        patterns = _patterns(component, variant, allow_pickle)
        ignored = ["*/*"] if component is None else [f"{component}/*/*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise ValueError(
            f"{asked} is gated: ask for access on https://huggingface.co/{name}, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{asked} has no revision {revision!r}; see https://huggingface.co/{name}/tree/main."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{asked} is not there (or is private: `hf auth login`). Is it spelt right?") from error
    except Exception as error:  # no network, a full disk, a cache without it: each has a class of its own
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network?"
        raise ValueError(
            f"{asked} cannot be downloaded{at} ({offline}: {type(error).__name__}: {error}). With a network: "
            f"`hf download {name}`; then it is read from the cache, or pass the folder."
        ) from error


def _patterns(component: str | None, variant: str | None, allow_pickle: bool) -> list[str]:
    """The files to fetch: of the one variant, and of the one component."""
    stems = [("model", "safetensors"), ("diffusion_pytorch_model", "safetensors")]
    if allow_pickle:
        stems += [("pytorch_model", "bin"), ("diffusion_pytorch_model", "bin")]
    dotted = f".{variant}" if variant is not None else ""
    shard = "-?????-of-?????"
    weights = [
        f"{stem}{middle}.{suffix}"
        for stem, suffix in stems
        for middle in dict.fromkeys((dotted, f"{dotted}{shard}", f"{shard}{dotted}"))
    ]
    if component is None:
        return [*_SMALL_FILES, *weights]
    return ["model_index.json", *(f"{component}/{pattern}" for pattern in (*_SMALL_FILES, *weights))]
