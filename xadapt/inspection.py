"""Look at an adapter: what it is, what it adapts and how strongly; with a base, whether it was trained on that one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xadapt.attached import WIDE
from xadapt.contract import Adapter, Base
from xadapt.factors import scaling_of
from xadapt.fingerprint import Match, compare
from xadapt.folding import layers_of
from xadapt.kinds import FileKind
from xadapt.layouts.names import in_base, places_in
from xadapt.matrix import LowRank
from xadapt.opening import check_choices, open_for
from xadapt.peft_internals import PEFT_TYPE_TO_PREFIX_MAPPING, PeftType
from xadapt.reading import read_adapter
from xadapt.sources import file_kind_of
from xadapt.workers import each


@dataclass(frozen=True)
class InspectedLayer:
    """One adapted layer."""

    path: str
    rank: int | None
    """Of a LoRA's factors; None for other methods."""
    scaling: float | None
    parameters: int
    norm: float
    """Frobenius norm: of s·BA for a LoRA's factors, else of all the layer's tensors together."""
    match: Match | None = None
    """The base against the one it was trained on; None without a base or a recorded fingerprint."""
    update: float | None = None
    """‖ΔW‖ / ‖W‖ on that base; None without one."""


@dataclass(frozen=True)
class Inspection:
    """What `xadapt inspect` shows."""

    source: str
    kind: str
    method: str
    """The PEFT method, whatever space it acts in."""
    space: str
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    trained_on: str | None
    revision: str | None
    xadapt_version: str | None
    modules_to_save: tuple[str, ...]
    layers: tuple[InspectedLayer, ...]
    base: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a format that is not PEFT's says of itself."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur."""
        return tuple(sorted({layer.rank for layer in self.layers if layer.rank is not None}))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ranks": list(self.ranks)}


def inspect(
    adapter: str | PathLike[str],
    base: Any = None,
    *,
    component: str | None = None,
    allow_pickle: bool = False,
    variant: str | None = None,
    progress: bool = False,
) -> Inspection:
    """Reads an adapter, and of a base the adapted layers.

    Args:
        adapter: a PEFT folder, a LoRA file of diffusers or kohya, or what an installed plug-in reads.
        base: a checkpoint's folder, a hub id or a live model to hold it against.
        component: which part of a LoRA file or a pipeline.
        variant: "fp16" reads the base's files with that in their names.

    Raises:
        ValueError: the adapter cannot be read, or does not fit the base.
    """
    check_choices(component, variant, [adapter], [] if base is None else [base])
    own = file_kind_of(adapter)
    if own is not None:
        return _inspect_files(own, Path(adapter), base, allow_pickle)
    read = read_adapter(adapter, component=component, allow_pickle=allow_pickle)
    config: Any = read.config
    groups = _by_layer(read)
    layers = [_look(path, tensors, config) for path, tensors in groups.items()]
    name = None
    if base is not None:
        opened = open_for(base, component, allow_pickle, variant)
        layers, name = _hold_against(layers, read, opened, progress), opened.name
    tensors = read.tensors.values()
    return Inspection(
        source=str(Path(adapter)),
        kind=read.kind.name,
        method=_method(config),
        space=str(getattr(config, "space", "parameter")),
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        trained_on=config.base_model_name_or_path,
        revision=config.revision,
        xadapt_version=getattr(config, "xadapt_version", None),
        modules_to_save=tuple(sorted(getattr(config, "modules_to_save", None) or ())),
        layers=tuple(layers),
        base=name,
    )


def _inspect_files(kind: FileKind, path: Path, base: Any, allow_pickle: bool) -> Inspection:
    """Of a format with files of its own, whose tensors belong to modules of the adapter and not to layers of a base."""
    if base is not None:
        raise ValueError(
            f"{path} is of kind {kind.name!r}, which adds nothing to single layers of a base, so that there is nothing to hold "
            "against one. Leave base out (--base)."
        )
    read = kind.read(path, allow_pickle)
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in read.tensors.items():
        groups.setdefault(".".join(name.split(".")[:2]), []).append(tensor)
    tensors = read.tensors.values()
    return Inspection(
        source=str(path),
        kind=kind.name,
        method="",
        space="",
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        trained_on=None,
        revision=None,
        xadapt_version=read.config.get("xadapt_version") if isinstance(read.config, Mapping) else None,
        modules_to_save=(),
        layers=tuple(
            InspectedLayer(name, None, None, sum(one.numel() for one in group), _norm(group))
            for name, group in groups.items()
        ),
        facts=kind.describe(read),
    )


def _method(config: Any) -> str:
    hosted = str(PeftType(config.peft_type).value)
    for family in ("INPUT_ADA", "OUTPUT_ADA"):
        if hosted == family:
            hosted = "LORA"
        hosted = hosted.removeprefix(f"{family}_")
    if hosted == "LORA" and getattr(config, "use_dora", False):
        return "DoRA"
    return {"LORA": "LoRA", "HYBRID_ADA": "LoRA (hybrid)", "FULL_ADA": "full"}.get(hosted, hosted)


def _by_layer(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by the path of the layer they belong to."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(adapter.config.peft_type)]
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        path, found, _ = name.partition(f".{prefix}")
        if found and not name.startswith(WIDE):
            path = path.removesuffix(".parameter_space")  # of a hybrid
            groups.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    return groups


def _look(path: str, tensors: Mapping[str, Tensor], config: Any) -> InspectedLayer:
    parameters = sum(tensor.numel() for tensor in tensors.values())
    a = [tensor for name, tensor in tensors.items() if "lora_A.weight" in name or "lora_embedding_A" in name]
    b = [tensor for name, tensor in tensors.items() if "lora_B.weight" in name or "lora_embedding_B" in name]
    fit = len(a) == len(b) > 0 and all(down.shape[0] == up.shape[1] for down, up in zip(a, b, strict=True))
    if not fit or not hasattr(config, "use_rslora"):  # BD-LoRA keeps only the blocks of one of the two
        return InspectedLayer(path, None, None, parameters, _norm(tensors.values()))
    rank = sum(part.shape[0] for part in a)
    scaling = scaling_of(config, path, rank)
    factors = [LowRank(up.float().flatten(1) * scaling, down.float().flatten(1)) for down, up in zip(a, b, strict=True)]
    norm = math.sqrt(sum(factor.energy for factor in factors))
    return InspectedLayer(path, rank, scaling, parameters, norm)


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _hold_against(layers: list[InspectedLayer], adapter: Adapter, base: Base, progress: bool) -> list[InspectedLayer]:
    weights, modules = base.weights(), base.modules()
    recorded = getattr(adapter.config, "base_fingerprint", None) or {}
    matches = compare({in_base(path, modules) or path: text for path, text in recorded.items()}, weights)
    adapted = layers_of([adapter], base)
    places = places_in([layer.path for layer in layers], modules)

    def relative(layer: Any) -> tuple[str, float]:
        matrix = layer.update(weights).matrix
        weight = weights[layer.weight_name]
        energy = sum((float(rows.float().square().sum()) for rows in torch.split(weight, 1024)), 0.0)
        return layer.path, math.sqrt(matrix.energy / energy) if energy else math.inf

    updates = dict(each(relative, adapted, "holding against the base", progress))
    known = {places[layer.path]: replace(layer, path=places[layer.path]) for layer in layers}
    # A tied adapter is stored with the first of its layers; the others have nothing of their own.
    return [
        InspectedLayer(
            **{
                **asdict(known.get(path, InspectedLayer(path, None, None, 0, 0.0))),
                "match": matches.get(path),
                "update": update,
            }
        )
        for path, update in updates.items()
    ]
