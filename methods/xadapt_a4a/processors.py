"""Injection: attention processors that add the decoupled term of A4A, Eq. 13.

    Z = Attention(q, k, v) + Σ λ · Attention(q, k̄, v̄)

One plain object per layer, chosen by the exact class of the processor in place. A plain object, as a module would put its
tensors into the target's state dict; the tensors on it and not in a bank with an index, as torch.compile would otherwise
compile each layer anew. Without arguments each makes an empty one, because diffusers' unload_ip_adapter re-creates them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    HunyuanAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

STOCK_IP_ADAPTER = (
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SD3IPAdapterJointAttnProcessor2_0,
)


@dataclass(eq=False)
class Term:
    """One adapter's maps for one layer, and how strongly they act."""

    key: Tensor  # (halves·B, M, d̂): under guidance the negative half comes first
    value: Tensor
    halves: int = 1  # 2 under guidance
    scale: float = 1.0
    masks: Tensor | None = None  # (references, height, width): where in the image each reference acts, and how strongly
    half: int | None = None  # of targets that are called once per half: 0 while it is the negative one's turn, else 1

    def attended(self, query: Tensor, scale: float | None) -> Tensor:
        """Attention(q, k̄, v̄), (B, H, S, D). With masks each reference has a softmax of its own, as in diffusers."""
        key, value = (by_heads(self.rows(tensor, query), query.shape[1]) for tensor in (self.key, self.value))
        if self.masks is None:
            return F.scaled_dot_product_attention(query, key, value, scale=scale)
        count = self.masks.shape[0]
        total: Any = 0
        for mask, own_key, own_value in zip(self.masks, key.chunk(count, 2), value.chunk(count, 2), strict=True):
            region = IPAdapterMaskProcessor.downsample(mask[None], 1, query.shape[2], 1).to(query.device, query.dtype)
            total = total + region[:, None] * F.scaled_dot_product_attention(query, own_key, own_value, scale=scale)
        combined: Tensor = total
        return combined

    def rows(self, tensor: Tensor, query: Tensor) -> Tensor:
        """The map for the model's batch, on the query's device and in its dtype. The maps of one image serve any batch."""
        halves = self.halves
        if self.half is not None:
            tensor, halves = tensor.chunk(2)[self.half], 1
        batch, given = query.shape[0], tensor.shape[0]
        if given != batch:
            if given != halves or batch % given:
                raise ValueError(
                    f"The model runs on a batch of {batch}, the attached maps are for one of {given}"
                    f"{' ([negative; positive])' if halves == 2 else ''}. Say how the pipeline is called: "
                    "attached(…, guidance=True) where it doubles the batch for classifier-free guidance (guidance_scale > 1), "
                    "num_images_per_prompt=n as it is passed to the pipeline, and one reference per prompt, or one for all."
                )
            tensor = tensor.repeat_interleave(batch // given, dim=0)
        return tensor.to(query.device, query.dtype)


class Decoupled:
    """What all these processors have: the one that was in place, and the terms to add."""

    stock: ClassVar[Any] = AttnProcessor2_0

    def __init__(self, base: Any = None) -> None:
        self.base = base if base is not None else self.stock()
        self.terms: list[Term] = []

    def active(self) -> list[Term]:
        """The terms that do something. Where there are none, the base processor runs, so the target is untouched to the bit."""
        return [term for term in self.terms if term.scale != 0]


def decoupled(query: Tensor, terms: list[Term], scale: float | None = None) -> Tensor:
    """Σ λ · Attention(q, k̄, v̄), (B, S, H·D), for queries (B, H, S, D)."""
    total: Any = 0
    for term in terms:
        total = total + term.scale * term.attended(query, scale)
    result: Tensor = total.transpose(1, 2).flatten(2)
    return result


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H, S, D) from (B, S, H·D)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class DecoupledAttnProcessor2_0(Decoupled):
    """`AttnProcessor2_0` with the decoupled term before `to_out`: the query and the output projection are shared."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        terms = self.active()
        if not terms:
            untouched: Tensor = self.base(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return untouched
        residual = hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch = context.shape[0]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            by_heads(linear(x), attn.heads)
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        attended = attended.transpose(1, 2).flatten(2) + decoupled(query, terms)
        output: Tensor = attn.to_out[1](attn.to_out[0](attended))
        if attn.residual_connection:
            output = output + residual
        rescaled: Tensor = output / attn.rescale_output_factor
        return rescaled


class DecoupledAround(Decoupled):
    """Any other processor, run as it is, with the term added after `to_out`: exact, as `to_out` is linear.

    It declares every argument that one of the bases takes, as `Attention.forward` passes on only what is declared.
    """

    norm_before_heads: ClassVar[bool] = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        temb: Tensor | None = None,
    ) -> Any:
        optional = {"image_rotary_emb": image_rotary_emb, "temb": temb}
        given = {name: value for name, value in optional.items() if value is not None}
        result = self.base(attn, hidden_states, encoder_hidden_states, attention_mask, **given)
        terms = self.active()
        if not terms:
            return result
        extra = self._term(attn, hidden_states, terms)
        if isinstance(result, tuple):  # joint attention: the image rows, then the text rows
            return (result[0] + extra, *result[1:])
        return result + extra

    def _term(self, attn: Any, hidden_states: Tensor, terms: list[Term]) -> Tensor:
        query = attn.to_q(hidden_states)
        norm = attn.norm_q if attn.norm_q is not None else _as_it_is
        if self.norm_before_heads:
            query = norm(query)
        query = by_heads(query, attn.heads)
        if not self.norm_before_heads:
            query = norm(query)
        attended = decoupled(query, terms, getattr(attn, "scale", None))
        extra: Tensor = attn.to_out[0](attended)
        if attn.to_out[0].bias is not None:  # the base has added it already. It may be offloaded outside of a call
            extra = extra - attn.to_out[0](attended.new_zeros(1, 1, attended.shape[-1]))
        return extra / getattr(attn, "rescale_output_factor", 1.0)


def _as_it_is(query: Tensor) -> Tensor:
    return query


class DecoupledAttnProcessor(DecoupledAround):
    stock = AttnProcessor


class DecoupledHunyuan(DecoupledAround):
    stock = HunyuanAttnProcessor2_0


class DecoupledSana(DecoupledAround):
    stock = SanaAttnProcessor2_0
    norm_before_heads = True


class DecoupledJoint(DecoupledAround):
    """SD3: the image rows' own queries, after their norm, attend to the maps."""

    stock = JointAttnProcessor2_0


class DecoupledFlux(DecoupledAround):
    """FLUX, double blocks: the image rows' queries before the rotary embedding, as the maps have no position."""

    stock = FluxAttnProcessor


CROSS: dict[Any, type[Decoupled]] = {
    cls.stock: cls for cls in (DecoupledAttnProcessor2_0, DecoupledAttnProcessor, DecoupledHunyuan, DecoupledSana)
}
JOINT: dict[Any, type[Decoupled]] = {DecoupledJoint.stock: DecoupledJoint}


def around(processor: Any) -> Decoupled:
    """The processor that does what this one does, and takes terms."""
    if isinstance(processor, Decoupled):
        return processor
    made: type[Decoupled] = {**CROSS, **JOINT, DecoupledFlux.stock: DecoupledFlux}[type(processor)]
    return made(processor)
