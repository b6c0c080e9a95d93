"""Export: an adapter as the plain LoRA that it is on one base, for loaders that know nothing of xadapt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xadapt.adapter_files import check_apart
from xadapt.base import CheckpointBase, LiveBase
from xadapt.carried_along import saved_modules
from xadapt.choices import DTYPES, LAYOUTS, NAMES
from xadapt.contract import Adapter
from xadapt.errors import did_you_mean, some
from xadapt.folding import Layer, layers_of
from xadapt.layouts import PlainLora, minimal_config, write_diffusers, write_kohya, write_peft
from xadapt.layouts.flux import is_flux
from xadapt.layouts.writing import free_file, free_folder
from xadapt.matrix import Dense, LowRank, Matrix
from xadapt.merge_shard import in_turn
from xadapt.opening import check_choices, open_for, pipeline_of
from xadapt.sources import AdapterSource, adapters_from, listed
from xadapt.truncate import EXACT, Truncation, exact_rank, truncate
from xadapt.workers import each


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer."""

    path: str
    rank: int
    residual: float
    """‖ΔW − LoRA‖ / ‖ΔW‖ (Frobenius), before the rounding to the written dtype: 0 where nothing was cut."""
    dropped_bias: float
    """‖Δb‖ of a bias that was left out by drop_bias, in the units of the layer's output; 0 where none was."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, layer by layer."""

    out: Path
    base: str
    layout: str
    dtype: str
    layers: tuple[ExportedLayer, ...]

    @property
    def exact(self) -> bool:
        """Whether the LoRA says the same as the adapter, up to rounding: residuals of 1e-5 are float32's."""
        return all(layer.residual <= EXACT and layer.dropped_bias == 0 for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "out": str(self.out), "exact": self.exact}


@dataclass(frozen=True)
class _Options:
    to: Truncation
    dtype: torch.dtype
    drop_bias: bool


@dataclass(frozen=True)
class _Part:
    """One layer of the LoRA that is being made."""

    report: ExportedLayer
    matrix: LowRank
    bias: Tensor | None


def export_lora(
    adapter: AdapterSource | Sequence[AdapterSource],
    base: Any,
    out: str | PathLike[str],
    *,
    layout: str = "peft",
    component: str | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    drop_bias: bool = False,
    variant: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> ExportReport:
    """Writes the plain LoRA that an adapter is on one base. Reads the weights of the adapted layers, one after another.

    An adapter of LoRA's own kind, in any space, keeps its rank, and nothing is approximated; several adapters add up to the
    sum of their ranks. Products are taken in float32, and rounded once to `dtype`. NaN and infinity are refused in what is
    read; a stock LoRA is its own update on any base, so of the base's weights nothing is read for it. Memory is that of
    the LoRA; where an update is cut (`rank`, `energy`), about 30 times the largest adapted tensor of a bfloat16 base.

        xadapt.export_lora("my-adapter/", "llama-instruct/", "my-lora/")

    Args:
        adapter: a PEFT folder, a LoRA file, a PeftModel, or several of these.
        base: the checkpoint to export for: a folder, a pipeline's folder with `component`, a hub id, a live model.
        out: the folder (layout="peft") or the .safetensors file to write.
        layout: "peft", "diffusers" (`pipe.load_lora_weights`) or "kohya" (sd-scripts, ComfyUI, A1111).
        component: which part, of a pipeline and of a LoRA file that holds several: "unet", "transformer", "text_encoder" …
        name: the component in the written names (diffusers, kohya), where base and `component` do not tell it:
            "text_encoder_1" is kohya's for the first encoder of SDXL and FLUX, "text_encoder" for that of SD1.5.
        dtype: float32, bfloat16, float16 or float64, of the written tensors; the adapter's own by default.
        weights: how each of several adapters counts; 1 by default.
        rank: cut every layer to this rank at most. Adapters that are no LoRA (DoRA, LoHa, full …) need this or `energy`.
        energy: cut to the smallest rank that keeps this share of the update's squared norm, for example 0.99.
        drop_bias: leave out what moves a bias, where the layout has no place for it. The report says how much.
        variant: "fp16" reads the base's files with that in their names.

    Raises:
        ValueError: the adapter does not fit the base, is no LoRA and neither rank nor energy is given, or the layout cannot
            hold it. Nothing is written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is no layout. {did_you_mean(layout, LAYOUTS)}")
    to = Truncation(rank, energy)
    _check_dtype(dtype)
    if layout == "peft":  # the other layouts name the component in the file
        check_choices(component, variant, listed(adapter), [base])
    adapters = adapters_from(adapter, component, allow_pickle)
    opened = open_for(base, component, allow_pickle, variant)
    _refuse_saved_modules(adapters)
    named = _named(layout, name, component, opened)
    check_apart(adapter, out)
    (free_folder if layout == "peft" else free_file)(out, overwrite)
    layers = layers_of(adapters, opened, weights)
    options = _Options(to, dtype or _dtype(adapters), drop_bias)
    tensors = opened.weights()
    parts = list(each(lambda layer: _part(layer, tensors, options), layers, "exporting", progress))
    lora = _plain_lora(layers, parts, opened, options.dtype)
    path = _write(lora, layout, Path(out), named, overwrite)
    reports = tuple(part.report for part in parts)
    return ExportReport(path, opened.name, layout, str(options.dtype).removeprefix("torch."), reports)


def _check_dtype(dtype: object) -> None:
    known = ", ".join(f"torch.{name}" for name in DTYPES)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} is no torch.dtype; pass one of {known}.")
    if dtype is not None and dtype not in _dtypes():
        raise ValueError(f"dtype={dtype}: a LoRA is written in a floating-point dtype that loaders read: {known}.")


def _dtypes() -> tuple[torch.dtype, ...]:
    return tuple(getattr(torch, name) for name in DTYPES)


def _named(layout: str, name: str | None, component: str | None, base: CheckpointBase | LiveBase) -> str:
    """The component in the names of a layout; none in a PEFT folder, which is for one."""
    if layout == "peft":
        if name is not None:
            raise ValueError(f"name={name!r}: layout='peft' names no component; leave name out.")
        return ""
    pipeline = pipeline_of(base)
    if name is None and isinstance(base, CheckpointBase) and pipeline is not None:
        name = base.folder.name
        if layout == "kohya" and name == "text_encoder" and any(pipeline.get("text_encoder_2") or ()):
            name = "text_encoder_1"
    elif name is None:
        name = component or _name_by_class(layout, base)
        if layout == "kohya" and name == "text_encoder":
            raise ValueError(
                "layout='kohya' has one name for the text encoder of SD1.5 and another for the first of SDXL and FLUX, and "
                "this base is not in a pipeline that tells: pass name='text_encoder' for SD1.5, name='text_encoder_1' for "
                "the others, or the pipeline's folder with component='text_encoder'."
            )
    if name not in NAMES[layout]:
        raise ValueError(
            f"layout={layout!r} has no names for the component {name!r}: pass name=… with one of "
            f"{', '.join(NAMES[layout])}, or write layout='peft'."
        )
    if layout == "kohya" and name == "transformer" and not is_flux(base.modules()[""]):
        raise ValueError(
            f"layout='kohya' has names for FLUX's transformer alone, and this one is of class {_class_of(base)}: "
            "write layout='diffusers' or layout='peft'."
        )
    return name


def _name_by_class(layout: str, base: CheckpointBase | LiveBase) -> str:
    """What pipelines call a model of this class."""
    cls = _class_of(base)
    if "UNet" in cls:
        return "unet"
    if cls == "CLIPTextModel":
        return "text_encoder"
    if cls == "CLIPTextModelWithProjection":
        raise ValueError(
            f"layout={layout!r} names every layer by its component, and a CLIPTextModelWithProjection is the second text "
            "encoder of SDXL and SD3, and the first of SD3: pass name='text_encoder_2' or name='text_encoder'."
        )
    if "Transformer" in cls:
        return "transformer"
    raise ValueError(
        f"layout={layout!r} names every layer by its component, and this base, a {cls}, is no U-Net, transformer or CLIP "
        "text encoder of a pipeline that is known: pass component=…, or write layout='peft'."
    )


def _class_of(base: CheckpointBase | LiveBase) -> str:
    return type(base.modules()[""]).__name__


def _part(layer: Layer, weights: Mapping[str, Tensor], options: _Options) -> _Part:
    _check_convolution(layer)
    with in_turn(layer.is_large):
        update = layer.update(weights)
    matrix, residual = update.matrix, 0.0
    if isinstance(matrix, Dense) or (options.to.asked and _exceeds(matrix, options.to)):
        if not options.to.asked:
            raise ValueError(_no_lora(layer, matrix))
        matrix, residual = truncate(matrix, options.to)
    bias, dropped = update.bias, 0.0
    if bias is not None and (options.drop_bias or not bool(bias.any())):
        bias, dropped = None, float(torch.linalg.vector_norm(bias))
    cast = LowRank(_cast(layer, matrix.left, options.dtype), _cast(layer, matrix.right, options.dtype))
    report = ExportedLayer(layer.path, matrix.rank, residual, dropped)
    return _Part(report, cast, None if bias is None else _cast(layer, bias, options.dtype))


def _no_lora(layer: Layer, matrix: Matrix) -> str:
    rank = exact_rank(matrix)
    if rank is not None:
        return (
            f"{layer.path}: this adapter is no LoRA by its form, but up to rounding its update has rank {rank} here: rank={rank} "
            "would keep all of this layer. Say how closely to follow the others, with rank=… or energy=0.99 for example, or "
            "put it into the weights exactly: xadapt merge."
        )
    return (
        f"{layer.path}: this adapter is no LoRA (its update has full rank), so a LoRA can only approximate it. Say how "
        "closely, with rank=… or energy=0.99 for example, or put it into the weights exactly: xadapt merge."
    )


def _check_convolution(layer: Layer) -> None:
    """Whether a stock LoRA reads the same positions as the layer: PEFT gives it the kernel, the stride and the padding only."""
    module = layer.module
    dilated = any(step != 1 for step in getattr(module, "dilation", ()))
    padding_mode = getattr(module, "padding_mode", "zeros")
    if prod(layer.shape[2:]) > 1 and (dilated or padding_mode != "zeros"):
        what = f"dilation={module.dilation}" if dilated else f"padding_mode={padding_mode!r}"
        raise ValueError(
            f"{layer.path} is a convolution with {what}, which PEFT's LoRA does not follow: no stock loader would "
            "calculate the same. Put the adapter into the weights: xadapt merge."
        )


def _exceeds(matrix: LowRank, to: Truncation) -> bool:
    return to.energy is not None or matrix.rank > (to.rank or 0)


def _cast(layer: Layer, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not bool(torch.isfinite(result).all()):
        raise ValueError(f"{layer.path}: the LoRA has numbers above 65504, float16's largest; write it in bfloat16.")
    return result


def _plain_lora(
    layers: Sequence[Layer],
    parts: Sequence[_Part],
    base: CheckpointBase | LiveBase,
    dtype: torch.dtype,
) -> PlainLora:
    tensors: dict[str, Tensor] = {}
    with_bias = any(part.bias is not None for part in parts)
    for layer, part in zip(layers, parts, strict=True):
        a, b = part.matrix.right, part.matrix.left
        if isinstance(layer.module, nn.Embedding):
            tensors[f"{layer.path}.lora_embedding_A"], tensors[f"{layer.path}.lora_embedding_B"] = a, b
            continue
        kernel = layer.shape[2:]
        tensors[f"{layer.path}.lora_A.weight"] = a.view(a.shape[0], layer.shape[1], *kernel)
        tensors[f"{layer.path}.lora_B.weight"] = b.view(*b.shape, *[1] * len(kernel))
        if with_bias:  # lora_bias is for all layers or for none
            zeros = torch.zeros(layer.shape[0], dtype=dtype)
            tensors[f"{layer.path}.lora_B.bias"] = zeros if part.bias is None else part.bias
    ranks = {part.report.path: (part.report.rank, float(part.report.rank)) for part in parts}  # the scaling is in B
    config = minimal_config(ranks, base.modules(), **_config_options(layers, base, with_bias))
    return PlainLora(config, tensors)


def _config_options(layers: Iterable[Layer], base: CheckpointBase | LiveBase, with_bias: bool) -> dict[str, Any]:
    classes = {type(layer.module) for layer in layers}
    return {
        "lora_bias": with_bias,
        "fan_in_fan_out": Conv1D in classes and not classes & {nn.Linear},
        "base_model_name_or_path": base.name if isinstance(base, CheckpointBase) else base.config.get("_name_or_path"),
        "task_type": "CAUSAL_LM" if "ForCausalLM" in str(base.config.get("architectures")) else None,
        "inference_mode": True,
    }


def _write(lora: PlainLora, layout: str, out: Path, component: str, overwrite: bool) -> Path:
    if layout == "peft":
        return write_peft(lora, out, overwrite=overwrite)
    writer = write_diffusers if layout == "diffusers" else write_kohya
    return writer({component: lora}, out, overwrite=overwrite)


def _refuse_saved_modules(adapters: Iterable[Adapter]) -> None:
    names = sorted(name for adapter in adapters for name in saved_modules(adapter))
    if names:
        raise ValueError(
            f"The adapter brings along whole modules of its own (modules_to_save): {some(names)}. A LoRA has no place for them; "
            "xadapt merge puts them into the checkpoint."
        )


def _dtype(adapters: Iterable[Adapter]) -> torch.dtype:
    """The widest floating-point type among the adapters' tensors; float32 for the 8-bit ones, which loaders do not read."""
    dtypes = [t.dtype for adapter in adapters for t in adapter.tensors.values() if t.is_floating_point()]
    dtypes = [dtype if dtype in _dtypes() else torch.float32 for dtype in dtypes]
    return reduce(torch.promote_types, dtypes)


__all__ = ["ExportReport", "ExportedLayer", "export_lora"]
