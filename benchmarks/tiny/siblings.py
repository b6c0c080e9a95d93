"""Siblings that compute the same function as the source in another basis. Every one is exact up to rounding.

What an adapter sees there, layer by layer (x into a projection, y out of it):

============  =====================================================  ==================  ==================
sibling       changed                                                x of q, v           y of q, v
============  =====================================================  ==================  ==================
`reparam`   inside attention and MLP: head and RoPE-plane          the same            rotated
              rotations, a permutation of the hidden MLP channels
`rot`       the residual stream, norm gains folded (as SpinQuant   rotated             the same
              and QuaRot do before quantising)
`smooth`    channel scales moved from the norms into the weights   rescaled            the same
              (as SmoothQuant does)
============  =====================================================  ==================  ==================

So on q and v, input adaptation is exact on the first and output adaptation on the other two.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


@torch.no_grad()
def reparam(source: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Rotate V against O within each head and q against k within each RoPE plane, permute the hidden MLP channels."""
    model = copy.deepcopy(source)
    heads = model.config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        size = attention.head_dim
        values = torch.block_diag(*(random_rotation(size, generator) for _ in range(heads)))
        planes = torch.block_diag(*(random_plane_rotation(size, generator) for _ in range(heads)))
        _set(attention.v_proj, values @ attention.v_proj.weight)
        _set(attention.o_proj, attention.o_proj.weight @ values.T)
        _set(attention.q_proj, planes @ attention.q_proj.weight)
        _set(attention.k_proj, planes @ attention.k_proj.weight)
        order = torch.randperm(mlp.down_proj.in_features, generator=generator)
        _set(mlp.gate_proj, mlp.gate_proj.weight[order])
        _set(mlp.up_proj, mlp.up_proj.weight[order])
        _set(mlp.down_proj, mlp.down_proj.weight[:, order])
    return model


@torch.no_grad()
def rot(source: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Fold the norm gains into the weights behind them, then rotate the whole residual stream."""
    model = copy.deepcopy(source)
    rotation = random_rotation(model.config.hidden_size, generator)
    for norm, readers in _norms(model):
        for reader in readers:
            _set(reader, reader.weight * norm.weight @ rotation.T)
        norm.weight.fill_(1.0)  # a norm without gain commutes with the rotation
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _set(writer, rotation @ writer.weight)
    _set(model.model.embed_tokens, model.model.embed_tokens.weight @ rotation.T)
    return model


@torch.no_grad()
def smooth(source: LlamaForCausalLM, generator: torch.Generator) -> LlamaForCausalLM:
    """Move a factor per channel, log-uniform between 1/2 and 2, from each norm into the weights behind it."""
    model = copy.deepcopy(source)
    for norm, readers in _norms(model):
        scale = torch.exp2(2.0 * torch.rand(norm.weight.shape, generator=generator) - 1.0)
        norm.weight.div_(scale)
        for reader in readers:
            _set(reader, reader.weight * scale)
    return model


EXACT: dict[str, Callable[[LlamaForCausalLM, torch.Generator], LlamaForCausalLM]] = {
    "reparam": reparam,
    "rot": rot,
    "smooth": smooth,
}


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size), uniform: QR with the signs of R's diagonal put into Q."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return q * r.diagonal().sign()


def random_plane_rotation(size: int, generator: torch.Generator) -> Tensor:
    """(size, size): a random angle in each plane (i, i + size/2). These are the planes RoPE turns, so it commutes with RoPE."""
    angles = 2.0 * math.pi * torch.rand(size // 2, generator=generator)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def _norms(model: LlamaForCausalLM) -> list[tuple[Any, list[Any]]]:
    """Each norm with the linears that read what it returns."""
    pairs: list[tuple[Any, list[Any]]] = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    pairs.append((model.model.norm, [model.lm_head]))
    return pairs


def _set(module: Any, weight: Tensor) -> None:
    module.weight.copy_(weight)
