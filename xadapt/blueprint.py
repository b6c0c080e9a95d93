"""The network that a checkpoint's config describes: its class in transformers or diffusers, built without data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xadapt.errors import did_you_mean


@dataclass(frozen=True)
class Blueprint:
    library: str
    cls: Any  # whose from_pretrained loads the network
    build: Callable[[], nn.Module]


def read_blueprint(folder: Path, config: Mapping[str, Any]) -> Blueprint:
    """Finds the class that a config.json names. Code that comes with the checkpoint is never run.

    Raises:
        ValueError: the installed transformers and diffusers have no such class.
    """
    blueprint = _in_diffusers(folder, config) if "_class_name" in config else _in_transformers(folder, config)

    def build() -> nn.Module:
        try:
            with torch.device("meta"):
                module = blueprint.build()
        except Exception as error:  # a config can be wrong in any way its class does not foresee
            raise ValueError(
                f"{folder / 'config.json'} describes no {blueprint.cls.__name__} that {blueprint.library} can build "
                f"({type(error).__name__}: {error})."
            ) from error
        return module.eval()

    return Blueprint(blueprint.library, blueprint.cls, build)


def _in_transformers(folder: Path, config: Mapping[str, Any]) -> Blueprint:
    import transformers
    from transformers import AutoConfig, AutoModel, PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path, model_type = folder / "config.json", config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise _custom_code(path, f"model_type {model_type!r}")
        raise ValueError(
            f"{path} gives model_type {model_type!r}, which transformers {transformers.__version__} does not know; "
            "if it is newer: pip install -U transformers."
        )
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        if config.get("auto_map"):
            raise _custom_code(path, f"the class {name!r}")
        cls = None
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(f"{path} is no config of a {model_type} ({type(error).__name__}: {error}).") from error
    if cls is None:
        auto: Any = AutoModel
        return Blueprint("transformers", auto, lambda: auto.from_config(copy.deepcopy(parsed)))
    return Blueprint("transformers", cls, lambda: cls._from_config(copy.deepcopy(parsed)))  # it changes its config


def _in_diffusers(folder: Path, config: Mapping[str, Any]) -> Blueprint:
    path, name = folder / "config.json", config["_class_name"]
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{path} is of diffusers, which is not installed: pip install xadapt[diffusers].") from error

    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        if config.get("auto_map"):
            raise _custom_code(path, f"the class {name!r}")
        raise ValueError(
            f"{path} names the class {name!r}, which is no model of diffusers {diffusers.__version__}; "
            "if it is newer: pip install -U diffusers."
        )
    model: Any = cls  # from_config has no types
    return Blueprint("diffusers", model, lambda: model.from_config(copy.deepcopy(dict(config))))


def _custom_code(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} asks for {what}, whose code comes with the checkpoint (auto_map) and is not run. If you trust it, load "
        "it yourself with from_pretrained(…, trust_remote_code=True) and pass the live model."
    )


def component_of(pipeline: Path, index: Mapping[str, Any], component: str | None) -> Path:
    """The folder of a pipeline's component.

    Raises:
        ValueError: none is named, or none of that name has weights; the message lists those that do.
    """
    known = [name for name in index if "/" not in name and (pipeline / name / "config.json").is_file()]
    if component is None:
        raise ValueError(f"{pipeline} is a pipeline; say which part: component='NAME'. Known: {', '.join(known)}.")
    if component not in known:
        raise ValueError(f"{pipeline} has no component {component!r} with weights. {did_you_mean(component, known)}")
    return pipeline / component
