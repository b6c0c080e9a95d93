"""The source: a pretrained attention adapter, as far as A4A needs it (A4A, Eq. 4-6). The model it sat on is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .files import IPAdapterTensors, read_ip_adapter
from .image_proj import FULL_FACE_TOKENS, convert, get_kind


class IPAdapterSource(nn.Module):
    """An IP-Adapter without its base: the image projection, and k and v of all l attention layers.

    Args:
        kind: of the image projection: base, full, plus, faceid or faceid_plus.
        options: the image projection's sizes, as diffusers' class names them.
        adapter_dims: the widths d_i of the layers, in the order of the file.
        shortcut: FaceID-plus version 2. The file does not say which version it is.
    """

    def __init__(
        self, kind: str, options: Mapping[str, int], adapter_dims: Sequence[int], shortcut: bool = False
    ) -> None:
        super().__init__()
        self.kind = get_kind(kind)
        self.options = dict(options)
        self.adapter_dims = tuple(adapter_dims)
        self.num_tokens = self.kind.tokens(self.options)
        self.embed_dim = self.kind.width(self.options)
        self.context_dim = self.options.get("output_dims", self.options.get("cross_attention_dim", 0))
        self.image_proj: Any = self.kind.build(**self.options)
        if shortcut and kind != "faceid_plus":
            raise ValueError(f"faceid_plus_v2 is for FaceID-plus files; this is one of kind {kind!r}. Leave it out.")
        if kind == "faceid_plus":
            self.image_proj.shortcut = shortcut
        self.to_k_ip = nn.ModuleList(nn.Linear(self.context_dim, width, bias=False) for width in self.adapter_dims)
        self.to_v_ip = nn.ModuleList(nn.Linear(self.context_dim, width, bias=False) for width in self.adapter_dims)

    @classmethod
    def load(
        cls, given: str | PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False, shortcut: bool = False
    ) -> IPAdapterSource:
        """From a published file or its state dict; see `read_ip_adapter` for what is refused."""
        return cls.from_tensors(read_ip_adapter(given, allow_pickle=allow_pickle), shortcut=shortcut)

    @classmethod
    def from_tensors(cls, tensors: IPAdapterTensors, *, shortcut: bool = False) -> IPAdapterSource:
        """From tensors already read. The weights become float32, whatever the file keeps them in."""
        kind, projection = convert(tensors.image_proj)
        options = kind.options(projection)
        source = cls(kind.name, options, [key.shape[0] for key, _ in tensors.layers.values()], shortcut)
        source.image_proj.load_state_dict(projection.state_dict())
        for number, (key, value), to_k, to_v in zip(
            tensors.layers, tensors.layers.values(), source.to_k_ip, source.to_v_ip, strict=True
        ):
            if key.shape[1] != source.context_dim:
                raise ValueError(
                    f"ip_adapter.{number}.to_k_ip.weight takes tokens of width {key.shape[1]}, but image_proj makes them "
                    f"{source.context_dim} wide. The two groups are not of one IP-Adapter."
                )
            to_k.load_state_dict({"weight": key})
            to_v.load_state_dict({"weight": value})
        return source

    def to_tensors(self) -> dict[str, Tensor]:
        """A copy of all weights by this module's own names."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def forward(self, image_embeds: Tensor, clip_embeds: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """`features` of `tokens`."""
        return self.features(self.tokens(image_embeds, clip_embeds))

    def tokens(self, image_embeds: Tensor, clip_embeds: Tensor | None = None) -> Tensor:
        """c_n, (B, N, c): the image as tokens (A4A, Eq. 4; the image encoder itself comes before).

        Args:
            image_embeds: (B, E), or (B, S, E) for the kinds that take hidden states.
            clip_embeds: (B, S, E'), for FaceID-plus only: the image encoder's hidden states beside the face embedding.
        """
        self.check(image_embeds, clip_embeds)
        image_embeds = image_embeds.to(self.dtype)
        if clip_embeds is None:
            tokens: Tensor = self.image_proj(image_embeds)
            return tokens
        self.image_proj.clip_embeds = clip_embeds.to(self.dtype)[:, None]
        try:
            tokens = self.image_proj(image_embeds)
        finally:
            self.image_proj.clip_embeds = None  # else the module would keep the last images alive
        return tokens

    def features(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """k_i and v_i of all layers, (B, N, d_i) each, from tokens (B, N, c) (A4A, Eq. 5 and 6)."""
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k_ip, self.to_v_ip, strict=True)]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def rank(self) -> int:
        """How many dimensions embeddings of a batch of images have."""
        return 2 if self.kind.pooled else 3

    def check(self, image_embeds: Any, clip_embeds: Any = None) -> None:
        """Raises unless these are embeddings that this adapter takes."""
        wanted = f"This IP-Adapter (kind {self.kind.name!r}) wants {self.kind.wants(self.options)}"
        if not isinstance(image_embeds, Tensor):
            raise TypeError(f"{wanted}, as a tensor; got {type(image_embeds).__name__}.")
        shape = "(images, width)" if self.kind.pooled else "(images, rows, width)"
        if image_embeds.ndim != self.rank:
            raise ValueError(f"{wanted}, of shape {shape}; got {tuple(image_embeds.shape)}.")
        if image_embeds.shape[-1] != self.embed_dim:
            raise ValueError(f"{wanted}; got a width of {image_embeds.shape[-1]}. Embed the image with that encoder.")
        if self.kind.name == "full" and image_embeds.shape[1] != FULL_FACE_TOKENS:
            raise ValueError(f"{wanted}; got {image_embeds.shape[1]} rows.")
        if image_embeds.shape[0] == 0:
            raise ValueError(f"{wanted}; got no image at all, {tuple(image_embeds.shape)}.")
        _check_finite(image_embeds, "image_embeds")
        self._check_clip(image_embeds, clip_embeds)

    def _check_clip(self, image_embeds: Tensor, clip_embeds: Any) -> None:
        if self.kind.name != "faceid_plus":
            if clip_embeds is not None:
                raise ValueError(f"clip_embeds are for FaceID-plus; this is kind {self.kind.name!r}. Leave them out.")
            return
        width = self.options["hidden_dims"]
        wanted = f"FaceID-plus also wants clip_embeds, (images, rows, {width}): the image encoder's hidden_states[-2]"
        if not isinstance(clip_embeds, Tensor):
            raise TypeError(f"{wanted}; got {type(clip_embeds).__name__}.")
        if clip_embeds.ndim != 3 or clip_embeds.shape[-1] != width or clip_embeds.shape[0] != image_embeds.shape[0]:
            raise ValueError(f"{wanted}, for {image_embeds.shape[0]} images; got {tuple(clip_embeds.shape)}.")
        _check_finite(clip_embeds, "clip_embeds")


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} hold NaN or infinity; embed the image in float32.")
