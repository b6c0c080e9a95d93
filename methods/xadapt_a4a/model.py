"""The A4A adapter: an IP-Adapter's features, carried to the attention layers of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from xadapt.version import __version__

from .alignment import Alignment
from .bank import Bank, as_many, beside
from .branch import Branch
from .coupling import CouplingProjection, coupling_dim
from .files import read_ip_adapter
from .injection import Attachment
from .matching import check_bank, check_masks, check_target, diffusers_halves, fingerprint_of
from .scales import Scale, layer_scales
from .source import IPAdapterSource
from .targets import find_attention_layers, target_fingerprint, unwrapped, working_place
from .upgraded import MAX_ROWS, build_mapping


class A4AModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An adapter for an adapter: `from_ip_adapter` makes a fresh one, `from_pretrained` opens a trained one.

        adapter = A4AModel.from_pretrained("a4a-sdxl/")
        bank = adapter.encode(image_embeds)  # once per reference
        with adapter.attached(pipe.unet, bank, scale=0.8):
            pipe(prompt)

    The arguments of the constructor are its config, with which it can be built without the IP-Adapter and the target.

    Args:
        projection_kind, projection_options, adapter_dims, faceid_plus_v2: the source, see `IPAdapterSource`.
        target_layers, target_dims: the target's attention layers by path, and their widths.
        depth: R, the number of rounds of Eq. 9.
        head_dim, ffn_ratio: the size of an attention head in it, and how much wider its FFN is.
        coupling_ratio: the coupling space's width as a multiple of the least common multiple (0.5, 1 or 2 in the paper).
        coupling_width: that width itself, instead.
        share: "width" has one linear layer per distinct width in projection and alignment, "layer" one per layer.
        projection, alignment, mapping: "interpolate", "pool" and "linear" are the paper's ablations (Sec. 8.2, 8.3).
        max_rows: the most rows that the mapping's attention may run over.
        ip_adapter, target_class, ip_adapter_fingerprint, target_fingerprint, xadapt_version: where it comes from.
    """

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        *,
        projection_kind: str,
        projection_options: dict[str, int],
        adapter_dims: Sequence[int],
        target_layers: Sequence[str],
        target_dims: Sequence[int],
        faceid_plus_v2: bool = False,
        depth: int = 4,
        head_dim: int = 64,
        ffn_ratio: int = 4,
        coupling_ratio: float = 1.0,
        coupling_width: int | None = None,
        share: str = "width",
        projection: str = "linear",
        alignment: str = "linear",
        mapping: str = "attention",
        max_rows: int = MAX_ROWS,
        ip_adapter: str = "",
        target_class: str = "",
        ip_adapter_fingerprint: str = "",
        target_fingerprint: str = "",
        xadapt_version: str = __version__,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.source = IPAdapterSource(projection_kind, projection_options, adapter_dims, faceid_plus_v2)
        dim = coupling_width or coupling_dim(adapter_dims, coupling_ratio)
        tokens = self.source.num_tokens

        def branch() -> Branch:
            rows = len(adapter_dims) * tokens, len(target_dims) * tokens
            return Branch(
                CouplingProjection(adapter_dims, dim, share=share, mode=projection),
                build_mapping(
                    mapping, *rows, dim, depth=depth, head_dim=head_dim, ffn_ratio=ffn_ratio, max_rows=max_rows
                ),
                Alignment(dim, target_dims, share=share, mode=alignment),
            )

        self.key_branch, self.value_branch = branch(), branch()
        self._layers = tuple(target_layers)
        self._dims = tuple(target_dims)
        self._target_class = target_class or "the target"
        self._scale: Scale = 1.0
        self._attachments: WeakSet[Attachment] = WeakSet()  # a detached one must not keep its target alive

    @classmethod
    def from_ip_adapter(
        cls,
        ip_adapter: str | PathLike[str] | Mapping[str, Any],
        target: nn.Module,
        *,
        allow_pickle: bool = False,
        **options: Any,
    ) -> A4AModel:
        """A fresh adapter, to be trained: the IP-Adapter as it is, everything after it random.

        Args:
            ip_adapter: a published file (.safetensors; .bin with allow_pickle), or its state dict.
            target: the denoiser to carry it to: `pipe.unet` or `pipe.transformer`. Only its layers are looked at.
            options: depth, coupling_ratio, share, …: see the class.

        Raises:
            ValueError: the file is no IP-Adapter, or the target has no layer that could take it.
        """
        source = IPAdapterSource.from_tensors(
            read_ip_adapter(ip_adapter, allow_pickle=allow_pickle), shortcut=options.get("faceid_plus_v2", False)
        )
        target = unwrapped(target)
        layers = find_attention_layers(target)
        model: A4AModel = cls(
            projection_kind=source.kind.name,
            projection_options=source.options,
            adapter_dims=list(source.adapter_dims),
            target_layers=[layer.name for layer in layers],
            target_dims=[layer.width for layer in layers],
            ip_adapter="" if isinstance(ip_adapter, Mapping) else Path(ip_adapter).name,
            target_class=type(target).__name__,
            ip_adapter_fingerprint=fingerprint_of(source),
            target_fingerprint=target_fingerprint(layers),
            **options,
        )
        model.source = source
        return model

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
        features = self.source(image_embeds, clip_embeds)
        keys, values = ([pair[half] for pair in features] for half in (0, 1))
        maps = zip(self.key_branch(keys), self.value_branch(values), strict=True)
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
            guidance: whether the target is called with [negative; positive], as pipelines do for guidance_scale > 1. Pipelines
                that call it twice instead (FLUX with true_cfg_scale) cannot be served.
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

    def param_groups(
        self, lr1: float = 1e-4, lr2: float = 1e-5, lr3: float = 1e-5, *, train_pta: bool = True
    ) -> list[dict[str, Any]]:
        """The optimiser's groups (A4A, Sec. 3.4); each parameter is in one of them. Freezes the source unless train_pta.

        Args:
            lr1: of the learnable features and the blocks.
            lr2: of projection and alignment.
            lr3: of the pretrained adapter.
        """
        self.source.requires_grad_(train_pta)
        branches = (self.key_branch, self.value_branch)
        groups = {
            "mapping": (lr1, [p for branch in branches for p in branch.mapping.parameters()]),
            "projection": (
                lr2,
                [p for branch in branches for part in (branch.projection, branch.alignment) for p in part.parameters()],
            ),
            "source": (lr3, list(self.source.parameters()) if train_pta else []),
        }
        return [{"name": name, "lr": lr, "params": params} for name, (lr, params) in groups.items() if params]

    def fingerprint(self) -> str:
        """Changes with the weights; a bank carries that of the adapter that computed it."""
        return fingerprint_of(self)
