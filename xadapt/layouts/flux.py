"""FLUX's layers under their kohya names, which are those of the original code: q, k and v (and the MLP) are one layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WIDTH = 3072  # FLUX has one width, and diffusers' reader counts on it


@dataclass(frozen=True)
class Side:
    """A layer's A, B and scaling."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class _Place:
    name: str  # of the kohya layer
    parts: tuple[tuple[str, int, int], ...]  # (diffusers' layer, inputs, outputs), the last two in widths


_DOUBLE = (
    _Place("img_attn_qkv", (("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1))),
    _Place("txt_attn_qkv", (("attn.add_q_proj", 1, 1), ("attn.add_k_proj", 1, 1), ("attn.add_v_proj", 1, 1))),
    _Place("img_attn_proj", (("attn.to_out.0", 1, 1),)),
    _Place("txt_attn_proj", (("attn.to_add_out", 1, 1),)),
    _Place("img_mlp_0", (("ff.net.0.proj", 1, 4),)),
    _Place("img_mlp_2", (("ff.net.2", 4, 1),)),
    _Place("txt_mlp_0", (("ff_context.net.0.proj", 1, 4),)),
    _Place("txt_mlp_2", (("ff_context.net.2", 4, 1),)),
    _Place("img_mod_lin", (("norm1.linear", 1, 6),)),
    _Place("txt_mod_lin", (("norm1_context.linear", 1, 6),)),
)
_SINGLE = (
    _Place("linear1", (("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1), ("proj_mlp", 1, 4))),
    _Place("linear2", (("proj_out", 5, 1),)),
    _Place("modulation_lin", (("norm.linear", 1, 3),)),
)
_BLOCK = re.compile(r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.(?P<layer>.+)")
_COUNTS = {"double": 19, "single": 38}


def is_flux(model: nn.Module) -> bool:
    """By its class: others (SD3, AuraFlow, Chroma) have layers of the same names, and some of the same width."""
    return any(cls.__name__ == "FluxTransformer2DModel" for cls in type(model).__mro__)


def place(path: str, side: Side) -> tuple[str, int] | str:
    """(kohya layer, which part of it), or why there is none."""
    match = _BLOCK.fullmatch(path)
    if match is None:
        return "outside the blocks, where diffusers' reader of kohya files loses it"
    kind = "single" if match["single"] else "double"
    if int(match["number"]) >= _COUNTS[kind]:
        return f"FLUX has {_COUNTS[kind]} such blocks"
    for spot in _SINGLE if kind == "single" else _DOUBLE:
        for index, (layer, inputs, outputs) in enumerate(spot.parts):
            if layer == match["layer"]:
                if (side.a.shape[1], side.b.shape[0]) != (inputs * WIDTH, outputs * WIDTH):
                    return f"{side.a.shape[1]} → {side.b.shape[0]} is not FLUX's {inputs * WIDTH} → {outputs * WIDTH}"
                return f"lora_unet_{kind}_blocks_{match['number']}_{spot.name}", index
    return "not a layer of FLUX's blocks"


def fuse(name: str, parts: Mapping[int, Side]) -> Side:
    """The parts of one kohya layer as one LoRA: A stacked, B block-diagonal, ranks added; exact for any ranks.

    Parts that share one A, as those of a LoRA trained on the fused layer do, keep it and its rank. One layer has one
    scaling: where the parts' differ, the difference goes into B.
    """
    spots = _SINGLE if "_single_blocks_" in name else _DOUBLE
    (spot,) = (spot for spot in spots if name.endswith(f"_{spot.name}"))
    if len(spot.parts) == 1:
        return parts[0]
    first = next(iter(parts.values()))
    if all(side.scaling == first.scaling and torch.equal(side.a, first.a) for side in parts.values()):
        rank = first.a.shape[0]
        columns = [
            parts[index].b if index in parts else first.b.new_zeros(outputs * WIDTH, rank)
            for index, (_, _, outputs) in enumerate(spot.parts)
        ]
        return Side(first.a, torch.cat(columns), first.scaling)
    scaling = next((side.scaling for side in parts.values() if side.scaling), 0.0)
    scaled = {i: rescale(side, scaling) for i, side in parts.items()}
    dtype = torch.float32 if any(side.a.dtype == torch.float32 for side in scaled.values()) else None
    rows, blocks = [], []
    for index, (_, _, outputs) in enumerate(spot.parts):
        if index in scaled:
            rows.append(scaled[index].a.to(dtype or scaled[index].a.dtype))
            blocks.append(scaled[index].b.to(dtype or scaled[index].b.dtype))
        else:  # not adapted: its outputs get nothing
            blocks.append(torch.zeros(outputs * WIDTH, 0, dtype=dtype or next(iter(scaled.values())).b.dtype))
    b: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]  # torch has no types for it
    return Side(torch.cat(rows), b, scaling)


def rescale(side: Side, scaling: float) -> Side:
    """The same product under another scaling: what it differs by goes into B.

    In half precision that may round. Then both sides become float32, in which it rounds as little as a product does.
    """
    if math.isclose(side.scaling, scaling, rel_tol=1e-12):  # alpha / rank * rank may miss alpha by its last bit
        return side
    product = side.b.double() * (side.scaling / scaling if scaling else 0.0)
    b = product.to(side.b.dtype)
    if b.dtype == torch.float32 or torch.equal(b.double(), product):
        return Side(side.a, b, scaling)
    return Side(side.a.float(), product.float(), scaling)
