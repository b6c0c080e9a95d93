"""What every adapter here can do that makes maps from a reference: encode it once, put it on a target, set its strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any
from weakref import WeakSet

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from xadapt.errors import some
from xadapt.finite import is_finite

from .bank import Bank, as_many, beside
from .injection import Attachment
from .matching import check_bank, check_masks, check_target, diffusers_halves, fingerprint_of
from .scales import Scale, layer_scales
from .source import IPAdapterSource
from .targets import find_attention_layers, unwrapped, working_place


class ReferenceAdapter(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """An image encoder's output in, k̄ and v̄ for each attention layer of one target out. A subclass says how: `maps_of`."""

    source: IPAdapterSource

    def __init__(self, target_layers: Sequence[str], target_dims: Sequence[int], target_class: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # diffusers' mixins have no types
        self._layers = tuple(target_layers)
        self._dims = tuple(target_dims)
        self._target_class = target_class or "the target"
        self._scale: Scale = 1.0
        self._attachments: WeakSet[Attachment] = WeakSet()  # a detached one must not keep its target alive

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str] | None, **options: Any) -> Any:
        """As every diffusers model, but nothing that the files lack is filled at random.

        Raises:
            ValueError: the weights are not those of the config, or hold NaN.
        """
        name = pretrained_model_name_or_path
        told = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, output_loading_info=True, **options)
        model, info = loaded
        wrong = [f"{what.replace('_', ' ')} {some(sorted(map(str, found)))}" for what, found in info.items() if found]
        if wrong:
            raise ValueError(
                f"{name}: its weights are not those of its config: {'; '.join(wrong)}. Copy or save it again."
            )
        broken = sorted(key for key, one in model.state_dict().items() if not one.is_meta and not is_finite(one))
        if broken:
            raise ValueError(
                f"{name}: {len(broken)} tensors hold NaN or infinity: {some(broken)}. Take an earlier checkpoint."
            )
        return (model, info) if told else model

    def maps_of(self, image_embeds: Tensor, clip_embeds: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """k̄_i, v̄_i for each layer of the target, (B, N, d̂_i) each, of one reference per row."""
        raise NotImplementedError(f"{type(self).__name__} has to say how it makes its maps.")

    def forward(self, image_embeds: Tensor, clip_embeds: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """k̄_i, v̄_i for each layer of the target, (B, n·N, d̂_i) each, from embeddings of n references per sample.

        (B, E) or, for adapters that take hidden states, (B, S, E) is one reference; (B, n, E) or (B, n, S, E) are several.
        """
        references = self._references(image_embeds)
        if isinstance(image_embeds, Tensor) and image_embeds.ndim == self.source.rank + 1:
            image_embeds = image_embeds.flatten(0, 1)
            clip_embeds = (
                clip_embeds.flatten(0, 1) if clip_embeds is not None and clip_embeds.ndim == 4 else clip_embeds
            )
        maps = self.maps_of(image_embeds, clip_embeds)
        return [(beside(key, references), beside(value, references)) for key, value in maps]

    def bank(self, maps: Sequence[tuple[Tensor, Tensor]], references: int = 1) -> Bank:
        """What `forward` returned, ready to be attached without guidance: for training, where `encode` computes too much."""
        return Bank(self._layers, tuple(maps), references=references)

    def encode(
        self,
        image_embeds: Tensor | Sequence[Tensor],
        negative_image_embeds: Tensor | None = None,
        *,
        clip_embeds: Tensor | None = None,
        negative_clip_embeds: Tensor | None = None,
    ) -> Bank:
        """The maps of B samples, to be attached; computed once. In eval mode it keeps no graph.

        Args:
            image_embeds: (B, E) or, for adapters that take hidden states, (B, S, E). One more dimension after the first holds
                several references per sample. A list of one tensor is what diffusers' prepare_ip_adapter_image_embeds
                returns under guidance: the negative half, then the positive one.
            negative_image_embeds: the same for the empty image, of B samples or of 1. By default zeros where the adapter
                takes one vector per image; hidden states have no default: embed an all-zero image.
            clip_embeds, negative_clip_embeds: for FaceID-plus, the image encoder's hidden states.
        """
        if isinstance(image_embeds, list | tuple):
            image_embeds, negative_image_embeds = diffusers_halves(image_embeds, negative_image_embeds)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            positive = self(image_embeds, clip_embeds)
            if negative_image_embeds is None and self.source.kind.pooled and clip_embeds is None:
                negative_image_embeds = positive[0][0].new_zeros(1, self.source.embed_dim)
            negative = None
            if negative_image_embeds is not None:
                negative = self(negative_image_embeds, negative_clip_embeds)
        bank = self.bank(positive, self._references(image_embeds))
        if negative is not None:
            bank = replace(bank, negative=as_many(negative, positive))
        return bank if bank.requires_grad else replace(bank, adapter=self.fingerprint())

    def _references(self, image_embeds: Any) -> int:
        several = isinstance(image_embeds, Tensor) and image_embeds.ndim == self.source.rank + 1
        return image_embeds.shape[1] if several else 1

    def attach(
        self,
        target: nn.Module,
        bank: Bank,
        scale: Scale | None = None,
        *,
        guidance: bool = True,
        num_images_per_prompt: int = 1,
        masks: Tensor | None = None,
    ) -> Attachment:
        """Puts a reference on the target, until `Attachment.detach` or the end of the `with` block that it opens. Other A4A
        adapters may be on it already.

        In training, `backward` belongs inside the block: a target with gradient checkpointing computes its activations again
        then, and would silently do so with the maps that are attached by that time.

        Args:
            target: the denoiser this adapter was trained for, or a fine-tuned sibling with the same layers.
            bank: from `encode`.
            scale: λ: a number, a list with one per layer, or a dict by block. What `set_scale` said last (at first 1.0) by
                default.
            guidance: whether the target is called with [negative; positive], as pipelines do for guidance_scale > 1, or, FLUX
                with true_cfg_scale, once for each.
            num_images_per_prompt: as it is passed to the pipeline.
            masks: (references, height, width): where each reference of a sample acts, from 0 to 1, in an image of this shape.
                Constant masks are a λ per reference.

        Raises:
            ValueError: the bank is another adapter's or for another target, or the target has other layers.
            RuntimeError: this adapter is on this target already.
        """
        target = unwrapped(target)
        layers = find_attention_layers(target)
        check_target(target, layers, list(zip(self._layers, self._dims, strict=True)), self._target_class)
        check_bank(bank, self._layers, self._dims, self.fingerprint)
        if any(one.is_attached and one.target is target for one in self._attachments):
            raise RuntimeError(
                "This adapter is attached to this target already. Detach it first; for several references at once, encode "
                "them together: image_embeds of (B, references, …)."
            )
        check_masks(masks, bank.references)
        if not bank.requires_grad:  # once, and not at each step; it is cast there if the layer is elsewhere by then
            bank = bank.to(*working_place(target))
        attachment = Attachment(
            target,
            layers,
            bank.for_call(guidance=guidance, num_images_per_prompt=num_images_per_prompt),
            halves=2 if guidance else 1,
            scale=self._scale if scale is None else scale,
            masks=masks,
        )
        self._attachments.add(attachment)
        return attachment

    attached = attach  # reads better after `with`

    def set_scale(self, scale: Scale) -> None:
        """λ, of what is attached now and of what will be: a number, a list with one per layer, or a dict by block."""
        layer_scales(scale, self._layers)
        self._scale = scale
        for attachment in self._attachments:
            if attachment.is_attached:
                attachment.set_scale(scale)

    def fingerprint(self) -> str:
        """Changes with the weights; a bank carries that of the adapter that computed it."""
        return fingerprint_of(self)
