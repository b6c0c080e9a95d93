"""Layers that one architecture fuses and another has apart, and where the parts lie in the fused one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .lines import MappedLayer
from .tree import LayerShape, Node


@dataclass(frozen=True)
class Fusion:
    """A fused layer's possible names, and those of its parts in the order of its outputs. Paths from a common module."""

    wholes: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]  # each architecture's
    interleaved: bool = False  # head by head, not one part after the other


_QKV = (("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"), ("query", "key", "value"), ("wq", "wk", "wv"))
FUSIONS = (
    Fusion(("qkv_proj", "to_qkv", "Wqkv", "c_attn", "qkv"), _QKV),  # Phi-3, diffusers fused, MPT, GPT-2
    Fusion(("query_key_value",), _QKV, interleaved=True),  # GPT-NeoX, Falcon, BLOOM
    Fusion(("to_kv",), (("to_k", "to_v"),)),
    Fusion(("to_added_qkv",), (("add_q_proj", "add_k_proj", "add_v_proj"),)),
    Fusion(("gate_up_proj",), (("gate_proj", "up_proj"), ("w1", "w3"))),
    # FLUX's single blocks: diffusers has four layers, FLUX.2 one, Black Forest Labs' own layout calls it linear1.
    Fusion(
        ("attn.to_qkv_mlp_proj", "linear1"),
        (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("attn.to_qkv", "proj_mlp")),
    ),
)


def fused_lines(source: Node, target: Node) -> Iterator[MappedLayer]:
    """The lines of what is fused in one of two modules and apart in the other."""
    for fusion in FUSIONS:
        for names in fusion.parts:
            for whole_name in fusion.wholes:
                yield from _lines(source, target, fusion, names, whole_name)


def _lines(
    source: Node, target: Node, fusion: Fusion, names: tuple[str, ...], whole_name: str
) -> Iterator[MappedLayer]:
    for parts_node, whole_node in ((source, target), (target, source)):
        parts = [part for name in names if (part := parts_node.find(name))]
        whole = whole_node.find(whole_name)
        if not whole or len(parts) < len(names) or all(whole_node.find(name) for name in names):
            continue
        start = 0
        for part in parts:
            stop = start + part.shape[0]
            reason, rows = _reason(parts, part, whole, (start, stop), fusion)
            if parts_node is source:
                yield MappedLayer(part.path, whole.path, "part", f"{reason} in the target", rows)
            else:
                yield MappedLayer(whole.path, part.path, "whole", f"{reason} in the source", rows)
            start = stop


def _reason(
    parts: list[LayerShape], part: LayerShape, whole: LayerShape, rows: tuple[int, int], fusion: Fusion
) -> tuple[str, tuple[int, int] | None]:
    total = sum(one.shape[0] for one in parts)
    siblings = ", ".join(one.name for one in parts)
    if total != whole.shape[0] or part.shape[1:] != whole.shape[1:]:
        sizes = f"{siblings} are {total} × {part.shape[1]}, {whole.name} is {whole.shape[0]} × {whole.shape[1]}"
        return f"{part.name} is fused into {whole.name}, of another width ({sizes}),", None
    if fusion.interleaved:
        return f"{part.name} is fused into {whole.name}, whose outputs alternate head by head,", None
    return f"{part.name} is outputs {rows[0]} to {rows[1] - 1} of the fused {whole.name}", rows
